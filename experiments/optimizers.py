"""Tutorial T2: eight solvers on the same network and budget, each with a tuned learning rate."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables

LOSS = jt.losses.cross_entropy
# Learning rates to choose from, around each solver's usual one. L-BFGS has a line search instead.
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
ROW = "rate {learning_rate:<7g} loss {test_loss:.4f}  accuracy {test_accuracy:.2%}  {seconds:.1f} s"


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
    for name, minimum in {"epochs": 1, "sweep_epochs": 1, "examples": 20}.items():
        flags.check(config, name, minimum=minimum)
    with command.run_folder(config) as folder:
        data, key = command.load_images(config), flags.seed_key(config.seed)
        train, validation = data.train[: config.examples].split(0.1, key)
        data = data._replace(train=train)
        known = {"dataset": data.name, "epochs": config.epochs}  # which decide the rates
        histories, solvers, rows = {}, {}, {}
        for name in CANDIDATES:
            size = len(train) if name in FULL_BATCH else config.batch_size
            options: dict[str, Any] = {"loss_fn": LOSS, "batch_size": size, "key": key}
            rate = choose_rate(name, config, data, validation, **options)
            start = make_start(name, rate, config, data)
            command.verify_step(config, start, train[:size], LOSS)
            _, history = jt.fit(
                start,
                train,
                data.test,
                metric_fns={"accuracy": jt.metrics.accuracy},
                epochs=config.epochs,
                callbacks=folder.callbacks(name, known=known, solver=name),
                **options,
            )
            histories[name] = history
            last = {column: history[column][-1].item() for column in ("test_loss", "test_accuracy")}
            seconds = float(history["seconds"].sum())
            solvers[name] = {"learning_rate": rate, **last, "seconds": seconds}
            rows[name] = ROW.format(**solvers[name])
            if config.log_interval:
                print(f"{name}: {rows[name]}", file=sys.stderr)
        folder.write_picture("optimizers.png", draw(solvers, histories, data.name))
        best = max(solvers, key=lambda name: solvers[name]["test_accuracy"])
        summary = folder.write_summary(
            "optimizers",
            dataset=data.name,
            notice=data.notice,
            epochs=config.epochs,
            seed=config.seed,
            train_loss=histories[best]["train_loss"][-1],
            test_loss=solvers[best]["test_loss"],
            test_accuracy=solvers[best]["test_accuracy"],
            best=best,
            solvers=solvers,
        )
        tables.print_table(f"T2: solvers on {data.name}, {config.epochs} passes", rows)
    return summary


def make_start(name: str, rate: Any, config: Config, data: jt.data.Resolved) -> jt.TrainState:
    """Returns the start, the same for every solver; no dropout, for the line search of L-BFGS."""
    if name == "lbfgs":  # clipping would break its line search
        config = replace(config, max_gradient_norm=None)
    optimizer = flags.with_safeguards(jt.optimizers.make(name, rate), config)
    mean, std = jt.data.STATISTICS[data.name]
    model = jt.models.FeedForward(dropout_rate=0.0, mean=mean, std=std)
    key = flags.seed_key(config.seed)
    return jt.init_state(model, optimizer, data.train.inputs[:1], key=key)


def choose_rate(
    name: str, config: Config, data: jt.data.Resolved, validation: jt.Dataset, **options: Any
) -> float:
    """Returns the candidate with the smallest validation loss after a short run."""
    rates = CANDIDATES[name]
    if len(rates) == 1:
        return rates[0]
    config = replace(config, on_nonfinite="stop")  # excludes rates that diverge
    epochs = config.epochs if name in FULL_BATCH else config.sweep_epochs

    def short_run(learning_rate: jax.Array) -> tuple[jt.TrainState, dict[str, jax.Array]]:
        start = make_start(name, learning_rate, config, data)
        return jt.train(start, data.train, validation=validation, epochs=epochs, **options)

    result = jt.sweep(short_run, {"learning_rate": rates}, at_once=len(rates), callbacks=[])
    return result.best("validation_loss").configuration["learning_rate"]


def draw(solvers: dict[str, Any], histories: dict[str, jt.History], dataset: str) -> plots.Figure:
    """Draws test loss and accuracy of every solver against the passes over the data."""
    title = f"T2: eight solvers on {dataset}, the same network, start and budget"
    figure, (left, right) = plots.subplots(title, 1, 2, size=(10.5, 4.4))
    colors = [plots.BLUE, plots.VERMILION, plots.GREEN, plots.ORANGE, plots.PURPLE, plots.SKY]
    styles = zip(histories.items(), [*colors, "black", plots.GREY], "osDv^PX*", strict=True)
    for (name, history), color, marker in styles:
        style = {"color": color, "marker": marker, "markersize": 5}
        label = f"{name}, rate {solvers[name]['learning_rate']:g}"
        if name in FULL_BATCH:
            style, label = style | {"linestyle": "--"}, f"{label}, full batch"
        left.plot(history["epoch"], history["test_loss"], label=label, **style)
        right.plot(history["epoch"], history["test_accuracy"], **style)
    left.set_yscale("log")
    plots.label_axes(left, "passes over the training images", "test loss (log scale)")
    plots.label_axes(right, "passes over the training images", "test accuracy")
    right.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    command.main(Config, run)
