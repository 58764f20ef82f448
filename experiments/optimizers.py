"""Tutorial T2: eight solvers on the same network and budget, each with a tuned learning rate."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax

import jaxtrain as jt
from jaxtrain._arguments import check_integer
from jaxtrain.cli import command, flags, plots, resuming, runs, tables

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}

# Learning rates to choose from, a factor of about 3 apart around each solver's usual one. L-BFGS
# has a line search instead.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adam": (0.0003, 0.001, 0.003, 0.01),
    "adamw": (0.0003, 0.001, 0.003, 0.01),
    "rmsprop": (0.0001, 0.0003, 0.001, 0.003),
    "rprop": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "adagrad": (0.003, 0.01, 0.03, 0.1),
    "adadelta": (0.1, 0.3, 1.0, 3.0),
    "lbfgs": (1.0,),
}
# These compare a step with the previous one, so every step uses all examples.
FULL_BATCH = ("rprop", "lbfgs")


@dataclass(frozen=True)
class Config(flags.DatasetFlags, flags.TrainingFlags):
    """Flags of this experiment."""

    output_dir: Path = Path("runs/optimizers")
    examples: int = 10_000
    """Training images; a tenth of them is held out to choose the rates."""
    epochs: int = 10
    """Budget of every solver: passes over the training images."""
    sweep_epochs: int = 2
    """Passes per candidate rate; a full-batch solver, one step per pass, gets the full budget."""
    batch_size: int = 64
    """Examples per step; rprop and lbfgs use all."""
    seed: int = 42
    """Seed of the initial parameters and the order of examples, shared by all solvers."""
    log_interval: int = 1
    """0 prints nothing; any other number prints one line per optimizer."""


def run(config: Config) -> dict[str, Any]:
    """Trains the T2 network, without dropout, by each solver at the best of several rates."""
    check_integer(config.epochs, "epochs", minimum=1)
    check_integer(config.sweep_epochs, "sweep_epochs", minimum=1)
    check_integer(config.log_interval, "log_interval", minimum=0)
    with command.run_folder(config) as folder:
        data = command.load_images(config)
        train_data, validation_data = split(config, data)
        results = {}
        for name in CANDIDATES:
            rate = choose_rate(name, config, data.name, train_data, validation_data)
            results[name] = (rate, *train(name, rate, config, data, train_data, folder))
            if config.log_interval:
                accuracy = results[name][1]["test_accuracy"][-1]
                clipped = config.safety.max_gradient_norm is None or name != "lbfgs"
                note = "" if clipped else ", its gradients not clipped"
                print(f"{name}: rate {rate:g}, accuracy {accuracy:.2%}{note}", file=sys.stderr)
        folder.write_picture("optimizers.png", draw(results, data.name))
        rows = {name: describe(*result) for name, result in results.items()}
        best = max(results, key=lambda name: results[name][1]["test_accuracy"][-1])
        history = results[best][1]
        summary = folder.write_summary(
            experiment="optimizers",
            dataset=data.name,
            notice=data.notice,
            epochs=config.epochs,
            seed=config.seed,
            train_loss=history["train_loss"][-1],
            test_loss=history["test_loss"][-1],
            test_accuracy=history["test_accuracy"][-1],
            best=best,
            solvers={
                name: {
                    "learning_rate": rate,
                    "test_loss": history["test_loss"][-1],
                    "test_accuracy": history["test_accuracy"][-1],
                    "seconds": seconds,
                }
                for name, (rate, history, seconds) in results.items()
            },
        )
    tables.print_summary(
        f"T2: solvers on {data.name}, {config.epochs} passes", rows, config.output_dir
    )
    return summary


def split(config: Config, data: jt.data.Resolved) -> tuple[jt.Dataset, jt.Dataset]:
    """Returns the training images, and those held out to choose the rates."""
    check_integer(config.examples, "examples", minimum=20)
    return data.train[: config.examples].split(0.1, flags.seed_key(config.seed))


def batch_size_of(name: str, config: Config, train_data: jt.Dataset) -> int:
    """Returns the number of examples per step."""
    return len(train_data) if name in FULL_BATCH else config.batch_size


def make_optimizer(name: str, rate: Any, config: Config) -> optax.GradientTransformation:
    """Returns the optimizer with safeguards; clipping would break the line search of L-BFGS."""
    safety = config.safety
    if name == "lbfgs":
        safety = replace(safety, max_gradient_norm=None)
    return flags.with_safeguards(jt.optimizers.make(name, rate), safety)


def start(name: str, rate: Any, config: Config, dataset: str, data: jt.Dataset) -> jt.TrainState:
    """Returns the start, the same for every solver; no dropout, for L-BFGS's line search."""
    mean, std = jt.data.STATISTICS[dataset]
    return jt.init_state(
        jt.models.FeedForward(dropout_rate=0.0, mean=mean, std=std),
        make_optimizer(name, rate, config),
        data.inputs[:1],
        key=flags.seed_key(config.seed),
    )


def choose_rate(
    name: str, config: Config, dataset: str, train_data: jt.Dataset, validation_data: jt.Dataset
) -> float:
    """Returns the candidate with the smallest validation loss after a short run."""
    candidates = CANDIDATES[name]
    if len(candidates) == 1:
        return candidates[0]
    # Exclude rates that diverge, even with --on-nonfinite skip.
    config = replace(config, safety=replace(config.safety, on_nonfinite="stop"))
    epochs = config.epochs if name in FULL_BATCH else config.sweep_epochs
    size = batch_size_of(name, config, train_data)

    def short_run(learning_rate: jax.Array) -> tuple[jt.TrainState, dict[str, jax.Array]]:
        return jt.train(
            start(name, learning_rate, config, dataset, train_data),
            train_data,
            validation=validation_data,
            loss_fn=LOSS,
            epochs=epochs,
            batch_size=size,
            key=flags.seed_key(config.seed),
        )

    result = jt.sweep(
        short_run, {"learning_rate": candidates}, at_once=len(candidates), callbacks=[]
    )
    return result.best("validation_loss").configuration["learning_rate"]


def train(
    name: str,
    rate: float,
    config: Config,
    data: jt.data.Resolved,
    train_data: jt.Dataset,
    folder: runs.RunFolder,
) -> tuple[jt.History, float]:
    """Returns the history, and the seconds of training without compiling."""
    # The budget decides the rates of some solvers: another budget is another run.
    known = {"dataset": data.name, "epochs": config.epochs}
    _, history = jt.fit(
        start(name, rate, config, data.name, train_data),
        train_data,
        data.test,
        loss_fn=LOSS,
        metric_fns=METRICS,
        epochs=config.epochs,
        batch_size=batch_size_of(name, config, train_data),
        key=flags.seed_key(config.seed),
        callbacks=[
            *folder.callbacks(name, solver=name),
            *resuming.checkpoint_callbacks(config, part=name, **known),
        ],
    )
    return history, float(history["seconds"].sum())


def describe(rate: float, history: jt.History, seconds: float) -> str:
    """Returns one solver's line in the table."""
    return (
        f"rate {rate:<7g} test loss {history['test_loss'][-1]:.4f}  "
        f"accuracy {history['test_accuracy'][-1]:.2%}  {seconds:.1f} s"
    )


def draw(results: dict[str, tuple[float, jt.History, float]], dataset: str) -> plots.Figure:
    """Draws test loss and accuracy of every solver against the passes over the data."""
    figure = plots.Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = [plots.BLUE, plots.VERMILION, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.SKY]
    colors += ["black", plots.GREY]
    for (name, (rate, history, _)), color, marker in zip(
        results.items(), colors, "osDv^PX*", strict=True
    ):
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        if name in FULL_BATCH:
            style["linestyle"] = "--"
        label = f"{name}, rate {rate:g}" + (", full batch" if name in FULL_BATCH else "")
        left.plot(history["epoch"], history["test_loss"], label=label, **style)
        right.plot(history["epoch"], history["test_accuracy"], **style)
    left.set_yscale("log")
    plots.label_axes(left, "passes over the training images", "test loss (log scale)")
    plots.label_axes(right, "passes over the training images", "test accuracy")
    right.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(f"T2: eight solvers on {dataset}, the same network, start and budget")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
