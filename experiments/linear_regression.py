"""Tutorial T1: fit a line by gradient descent on the mean absolute error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.cli.tables import Comparison

# The line behind the data, and what torch.randn(1) gives twice after torch.manual_seed(42).
WEIGHT, BIAS = 0.7, 0.3
PUBLISHED_WEIGHT, PUBLISHED_BIAS = 0.33669036626815796, 0.12880940735340118

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


def run(config: Config) -> dict[str, Any]:
    """Fits y = weight · x + bias to 40 points of y = 0.7 x + 0.3 and tests it on the next 10."""
    flags.check(config, "epochs", minimum=1)
    with command.run_folder(config) as folder:
        train, test = jt.data.line(WEIGHT, BIAS)
        before = jt.init_state(
            jt.models.LinearRegression(),
            flags.make_line_optimizer(config),
            train.inputs[:1],
            key=flags.seed_key(config.seed),
        )
        if config.start == "published":
            start = {"weight": jnp.array([[PUBLISHED_WEIGHT]]), "bias": jnp.array([PUBLISHED_BIAS])}
            before = before.replace(params=start)
        loss_fn = getattr(jt.losses, config.loss)
        progress = jt.callbacks.progress(config.log_interval, max(1, config.log_interval))
        command.verify_step(config, before, train, loss_fn)
        after, history = jt.fit(
            before,
            train,
            test,
            loss_fn=loss_fn,
            epochs=config.epochs,
            batch_size=len(train),
            callbacks=[*folder.callbacks(), progress],
        )

        folder.write_model(after)
        inputs = jnp.concatenate([train.inputs, test.inputs])
        lines = [jt.predict(state, inputs) for state in (before, after)]
        points = {"training data": train, "test data": test}
        title = f"T1: {config.loss.replace('_', ' ')}"
        folder.write_picture("learning_curves.png", history.plot(title))
        title = f"y = {WEIGHT:g} x + {BIAS:g}, fitted"
        folder.write_picture("fit.png", plots.line_fit(points, inputs, lines, title))
        folder.write_picture("last_epochs.png", draw_last_epochs(history))
        figures = compare(config, history)
        summary = folder.write_summary(
            "linear_regression",
            dataset="line",
            epochs=len(history["epoch"]),
            seed=config.seed,
            train_loss=history["train_loss"][-1],
            test_loss=float(jt.evaluate(after, test, loss_fn)["loss"]),
            weight=after.params["weight"].item(),
            bias=after.params["bias"].item(),
            figures=figures,
        )
        rows = {
            "epochs": str(summary["epochs"]),
            "train loss": f"{summary['train_loss']:.7f}",
            "test loss": f"{summary['test_loss']:.7f}",
            "weight": f"{summary['weight']:.4f}, true {WEIGHT:g}",
            "bias": f"{summary['bias']:.4f}, true {BIAS:g}",
        }
        tables.print_table("T1: linear regression", rows | tables.times(summary))
        tables.print_comparisons("T1: the tutorial's figures, epochs counted from 0", figures)
    return summary


def compare(config: Config, history: jt.History) -> list[Comparison]:
    """Returns PyTorch's figures beside ours up to the last epoch; none with other flags."""
    if not flags.has_defaults(config, "learning_rate", "loss", "optimizer", "start"):
        return []
    names = ("train_loss", "test_loss", "weight", "bias")
    return [
        Comparison(f"epoch {epoch}: {name.replace('_', ' ')}", value, float(history[name][epoch]))
        for epoch, *reference in REFERENCE
        for name, value in zip(names, reference, strict=True)
        if epoch < config.epochs
    ]


def draw_last_epochs(history: jt.History, epochs: int = 40) -> plots.Figure:
    """Draws weight and bias over the last epochs: a constant step on |error| ends in a cycle.

    The gradient of the absolute error has the same size however small the error is, so near the
    minimum each step crosses it and the next one returns.
    """
    title = "T1: a constant step on the absolute error does not converge"
    figure, axes = plots.subplots(title, 2, 1, size=(7, 4.4), sharex=True)
    styles = [("weight", WEIGHT, plots.BLUE, "o"), ("bias", BIAS, plots.VERMILION, "^")]
    for ax, (name, true, color, marker) in zip(axes, styles, strict=True):
        ax.plot(history["epoch"][-epochs:], history[name][-epochs:], color=color, marker=marker)
        ax.axhline(true, color="black", linewidth=0.8, linestyle=":", label=f"true {name} {true:g}")
        plots.label_axes(ax, "", name)
        ax.legend(loc="lower right" if name == "weight" else "upper left")
    plots.label_axes(axes[1], "epoch", "bias")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
