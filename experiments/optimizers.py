"""Tutorial T2: eight solvers on the same network and budget, each with a rate found for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import jaxtrain as jt
from jaxtrain import command, devices, plots, runs, tables
from jaxtrain.checks import check_whole
from jaxtrain.events import Event
from jaxtrain.history import History

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}

# Learning rates to choose from, a factor of about 3 apart around each solver's usual one. L-BFGS
# searches along its line.
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
# These compare one step with the last, so they take all examples in each.
FULL_BATCH = ("rprop", "lbfgs")


@dataclass(frozen=True)
class Config:
    """Flags of this experiment."""

    dataset: Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"] = "auto"
    """auto: MNIST where it can be had, else scikit-learn's digits."""
    data_dir: Path | None = None
    """Folder of the IDX files; None takes $JAXTRAIN_DATA_DIR, then the cache, then downloads."""
    examples: int = 10_000
    """Training images (a tenth of them held out to choose the rates)."""
    epochs: int = 10
    """The budget: passes over the training images, for every solver alike."""
    sweep_epochs: int = 2
    """Passes of each candidate rate; a full-batch solver, one step each, gets the whole budget."""
    batch_size: int = 64
    """Examples a step; rprop and lbfgs take all."""
    seed: int = 42
    """Decides the start and the order of examples, the same for every solver."""
    device: devices.Device = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts sooner."""
    log_interval: int = 1
    """A line for each solver; 0 is quiet."""
    output_dir: Path = Path("runs/optimizers")
    """Where results go."""
    overwrite: bool = False
    """Let the results of a finished run in that folder make way."""
    safety: command.Safety = command.Safety()
    """Checkpoints and faults."""


def run(config: Config) -> dict[str, Any]:
    """Train the T2 network, without dropout, by each solver; each first chooses its rate."""
    devices.set_up_jax(config.device, config.compilation_cache)
    check_whole(config.epochs, "epochs", least=1)
    check_whole(config.sweep_epochs, "sweep_epochs", least=1)
    check_whole(config.log_interval, "log_interval", least=0)
    with command.output_folder(config) as folder:
        data = jt.data.load_resolved(config.dataset, config.data_dir)
        if data.notice is not None:
            print(f"This is not MNIST but scikit-learn's digits: {data.notice}.", file=sys.stderr)
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
    """The training images of the budget, and those held out to choose the rates."""
    check_whole(config.examples, "examples", least=20)
    few = jax.tree.map(lambda array: array[: config.examples], data.train)
    return few.split(0.1, command.seed_key(config.seed))


def batch_size_of(name: str, config: Config, train_data: jt.Dataset) -> int:
    """Examples a step."""
    return train_data.num_examples if name in FULL_BATCH else config.batch_size


def make_optimizer(name: str, rate: Any, config: Config) -> optax.GradientTransformation:
    """The solver of that name; L-BFGS is left out of clipping, which would spoil its search."""
    optimizer = jt.optimizers.make(name, rate)
    if name == "lbfgs":
        return optimizer
    return jt.optimizers.clip_gradients(optimizer, config.safety.max_gradient_norm)


def start(name: str, rate: Any, config: Config, dataset: str, data: jt.Dataset) -> jt.TrainState:
    """The same parameters for every solver. No dropout: L-BFGS compares values of one function."""
    mean, std = jt.data.STATISTICS[dataset]
    return jt.init_state(
        jt.models.FeedForward(dropout_rate=0.0, mean=mean, std=std),
        make_optimizer(name, rate, config),
        data.inputs[:1],
        key=command.seed_key(config.seed),
    )


def choose_rate(
    name: str, config: Config, dataset: str, train_data: jt.Dataset, validation_data: jt.Dataset
) -> float:
    """The candidate with the smallest validation loss after a short run, all run at once."""
    candidates = CANDIDATES[name]
    if len(candidates) == 1:
        return candidates[0]
    epochs = config.epochs if name in FULL_BATCH else config.sweep_epochs
    keys = jax.random.split(command.seed_key(config.seed), epochs)
    size = batch_size_of(name, config, train_data)

    def short_run(rate: jax.Array) -> jax.Array:
        def epoch(state: jt.TrainState, key: jax.Array) -> tuple[jt.TrainState, None]:
            return jt.train_epoch(state, train_data, LOSS, batch_size=size, key=key)[0], None

        state = start(name, rate, config, dataset, train_data)
        return jt.evaluate(jax.lax.scan(epoch, state, keys)[0], validation_data, LOSS)["loss"]

    losses = jax.jit(jax.vmap(short_run))(jnp.array(candidates))
    if not jnp.isfinite(losses).any():
        raise jt.InputError(
            f"every learning rate of {name} diverged ({candidates}); expected one that trains: "
            "check the data"
        )
    return candidates[int(jnp.nanargmin(losses))]


def train(
    name: str,
    rate: float,
    config: Config,
    data: jt.data.Resolved,
    train_data: jt.Dataset,
    folder: runs.RunFolder,
) -> tuple[History, float]:
    """The history of the budget, and its seconds without compiling."""

    def report(event: Event) -> None:
        folder.record(event, solver=name)

    _, history = jt.fit(
        start(name, rate, config, data.name, train_data),
        train_data,
        data.test,
        loss_fn=LOSS,
        metric_fns=METRICS,
        epochs=config.epochs,
        batch_size=batch_size_of(name, config, train_data),
        key=command.seed_key(config.seed),
        log_interval=0,
        report=report,
        # The budget decides the rates of some solvers, so that with another this is another run.
        **config.safety.fit_options(config, part=name, dataset=data.name, epochs=config.epochs),
    )
    return history, float(history["seconds"].sum())


def describe(rate: float, history: History, seconds: float) -> str:
    """One solver's line in the table."""
    return (
        f"rate {rate:<7g} test loss {history['test_loss'][-1]:.4f}  "
        f"accuracy {history['test_accuracy'][-1]:.2%}  {seconds:.1f} s"
    )


def draw(results: dict[str, tuple[float, History, float]], dataset: str) -> Figure:
    """Test loss and accuracy of every solver against the passes over the data."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
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
