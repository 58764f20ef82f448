"""Tutorial T1: fit a line by gradient descent on the mean absolute error."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, resuming, runs, tables
from jaxtrain.cli.tables import Comparison

LOSSES = {
    "mean_absolute_error": jt.losses.mean_absolute_error,
    "mean_squared_error": jt.losses.mean_squared_error,
    "squared_error_sum": jt.losses.squared_error_sum,
    "euclidean_distance": jt.losses.euclidean_distance,
}

# Epoch (counted from 0), train MAE before and test MAE after its update, weight and bias after:
# PyTorch 2.13 from the published start.
REFERENCE = (
    (0, 0.31288138031959534, 0.48106518387794495, 0.34059035778045654, 0.1388094127178192),
    (20, 0.08908725529909134, 0.21729660034179688, 0.4184202253818512, 0.3333094120025635),
    (100, 0.024458957836031914, 0.05646304413676262, 0.5800304412841797, 0.3503098785877228),
    (160, 0.0038517764769494534, 0.008201557211577892, 0.6825708150863647, 0.30731043219566345),
    (180, 0.008932482451200485, 0.005023092031478882, 0.6951308250427246, 0.29931047558784485),
    (199, 0.0025885067880153656, 0.008447891101241112, 0.6990308165550232, 0.3093104660511017),
    # The listing that the tutorial prints is of a second run of its cell.
    (380, 0.008932482451200485, 0.005023092031478882, 0.6951308250427246, 0.29931047558784485),
)

# The line behind the data, and what torch.randn(1) gives twice after torch.manual_seed(42).
WEIGHT, BIAS = 0.7, 0.3
PUBLISHED_WEIGHT, PUBLISHED_BIAS = 0.33669036626815796, 0.12880940735340118


@dataclass(frozen=True)
class Config(flags.LineFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/linear_regression")
    epochs: int = 200
    """Steps of gradient descent, each on all training points."""
    loss: Literal[
        "mean_absolute_error", "mean_squared_error", "squared_error_sum", "euclidean_distance"
    ] = "mean_absolute_error"
    """Loss whose mean over the points is minimized."""
    start: Literal["published", "random"] = "published"
    """published: the tutorial's weight and bias. random: drawn from a normal distribution."""
    seed: int = 42
    """Seed of a random start."""
    log_interval: int = 10
    """Epochs between two lines of progress; 0 prints nothing."""


def run(config: Config) -> dict[str, Any]:
    """Fits y = weight · x + bias to 40 points of y = 0.7 x + 0.3 and tests it on the next 10."""
    with command.run_folder(config) as folder:
        train_data, test_data = jt.data.line(WEIGHT, BIAS)
        before, after, history, path = train(config, train_data, test_data, folder)
        comparisons = compare(config, history, path)
        final = jt.evaluate(after, test_data, LOSSES[config.loss])
        folder.write_model(after)
        write_pictures(config, folder, train_data, test_data, before, after, history, path)
        summary = folder.write_summary(
            experiment="linear_regression",
            dataset="line",
            epochs=len(history["epoch"]),
            seed=config.seed,
            train_loss=history["train_loss"][-1] if len(history["epoch"]) else None,
            test_loss=float(final["loss"]),
            weight=after.params["weight"].item(),
            bias=after.params["bias"].item(),
            figures=comparisons,
        )
    print_result(summary)
    tables.print_comparisons(
        "T1: the tutorial's figures, epochs counted from 0", comparisons, config.output_dir
    )
    return summary


def compare(config: Config, history: jt.History, path: np.ndarray) -> list[Comparison]:
    """Returns PyTorch's figures beside ours up to the last epoch; none with other flags."""
    if not flags.has_defaults(config, "learning_rate", "loss", "optimizer", "start"):
        return []
    rows = []
    for epoch, *reference in REFERENCE:
        if epoch < config.epochs:
            ours = (history["train_loss"][epoch], history["test_loss"][epoch], *path[epoch + 1])
            names = ("train loss", "test loss", "weight", "bias")
            rows += [
                Comparison(f"epoch {epoch}: {name}", original, float(our), 1e-6)
                for name, original, our in zip(names, reference, ours, strict=True)
            ]
    return rows


def train(
    config: Config, train_data: jt.Dataset, test_data: jt.Dataset, folder: runs.RunFolder
) -> tuple[jt.TrainState, jt.TrainState, jt.History, np.ndarray]:
    """Fits the line.

    Returns:
      The state before and after, the history, and (weight, bias) at the start and after each
      epoch, [epochs + 1, 2].
    """
    optimizer = flags.make_optimizer(config)
    before = jt.init_state(
        jt.models.LinearRegression(),
        optimizer,
        train_data.inputs[:1],
        key=flags.seed_key(config.seed),
    )
    if config.start == "published":
        start = {"weight": jnp.array([[PUBLISHED_WEIGHT]]), "bias": jnp.array([PUBLISHED_BIAS])}
        before = before.replace(params=start)

    after, history = jt.fit(
        before,
        train_data,
        test_data,
        loss_fn=LOSSES[config.loss],
        epochs=config.epochs,
        batch_size=len(train_data),
        callbacks=[
            *command.reporting(folder, config.log_interval, epoch_interval=config.log_interval),
            *resuming.checkpoint_callbacks(config),
        ],
    )
    names = ("weight", "bias")
    first = [[before.params[name].item() for name in names]]
    path = np.concatenate([first, np.stack([history[name] for name in names], axis=1)])
    return before, after, history, path


def write_pictures(
    config: Config,
    folder: runs.RunFolder,
    train_data: jt.Dataset,
    test_data: jt.Dataset,
    before: jt.TrainState,
    after: jt.TrainState,
    history: jt.History,
    path: np.ndarray,
) -> None:
    """Draws the loss curves, the line before and after, and weight and bias at the end."""
    inputs = jnp.concatenate([train_data.inputs, test_data.inputs])
    if len(history["epoch"]):
        curves = plots.learning_curves(history, f"T1: {config.loss.replace('_', ' ')}")
        folder.write_picture("learning_curves.png", curves)
        folder.write_picture("last_epochs.png", draw_last_epochs(path))
    folder.write_picture(
        "fit.png",
        plots.line_fit(
            train_data,
            test_data,
            before=jt.predict(before, inputs),
            after=jt.predict(after, inputs),
            title=f"y = {WEIGHT:g} x + {BIAS:g}, fitted",
        ),
    )


def draw_last_epochs(path: np.ndarray, epochs: int = 40) -> plots.Figure:
    """Draws weight and bias over the last epochs: a constant step on |error| ends in a cycle.

    The gradient of the absolute error has the same size however small the error is, so near the
    minimum each step crosses it and the next one returns.
    """
    figure = plots.Figure(figsize=(7, 4.4), layout="constrained")
    first = max(0, len(path) - epochs)
    styles = (("weight", WEIGHT, plots.BLUE, "o"), ("bias", BIAS, plots.VERMILION, "^"))
    for column, (ax, (name, true, color, marker)) in enumerate(
        zip(figure.subplots(2, 1, sharex=True), styles, strict=True)
    ):
        ax.plot(np.arange(first, len(path)), path[first:, column], color=color, marker=marker)
        ax.axhline(true, color="black", linewidth=0.8, linestyle=":", label=f"true {name} {true:g}")
        plots.label_axes(ax, "epoch" if column else "", name)
        ax.legend(loc="upper left" if column else "lower right")
    figure.suptitle("T1: a constant step on the absolute error does not converge")
    return figure


def print_result(summary: dict[str, Any]) -> None:
    """Prints the result."""
    train_loss = summary["train_loss"]
    tables.print_table(
        "T1: linear regression",
        {
            "epochs": str(summary["epochs"]),
            "train loss": "none" if train_loss is None else f"{train_loss:.7f}",
            "test loss": f"{summary['test_loss']:.7f}",
            "weight": f"{summary['weight']:.4f}, true {WEIGHT:g}",
            "bias": f"{summary['bias']:.4f}, true {BIAS:g}",
            "compiling": f"{summary['compile_seconds']:.1f} s",
            "training": f"{summary['train_seconds']:.2f} s on {summary['device']}",
        },
    )


if __name__ == "__main__":
    command.main(Config, run)
