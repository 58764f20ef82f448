"""Tutorial T3: batch and stochastic gradient descent on three points, drawn on the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, runs, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.mean_squared_error
START, X_TO_PREDICT = 1.0, 4.0  # w at the start; the x to predict, whose true y is 8


@dataclass(frozen=True)
class Config(flags.LineFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/gradient_descent")
    epochs: int = 100
    """Passes over the three points."""
    as_published: bool = False
    """Batch descent as in the tutorial's listing: only the last example's gradient counts."""


def run(config: Config) -> dict[str, Any]:
    """Fits y = w x to (1, 2), (2, 4), (3, 6) from w = 1, in float64 as the tutorial does."""
    with jax.enable_x64(True), command.run_folder(config) as folder:
        data = jt.data.points_on_line(2.0)
        batch = data
        loss_fn: jt.losses.Loss = LOSS
        if config.as_published:
            # The loop over examples overwrites the gradient, so that only the last example counts,
            # divided by the number of all three.
            batch, loss_fn = data[2:], jt.losses.weighted_sum((1 / 3, LOSS))
        batch_path = descend(config, folder, "batch", batch, loss_fn=loss_fn, batch_size=3)
        size = 3 if config.optimizer == "lbfgs" else 1
        path = descend(config, folder, "stochastic", data, loss_fn=LOSS, batch_size=size)
        folder.write_picture("descent.png", draw(data, batch_path, path))
        folder.write_picture("descent_on_surface.png", descend_surface(config))
        figures = compare(config, batch_path, path)
        summary = folder.write_summary(
            "gradient_descent",
            dataset="points_on_line",
            epochs=config.epochs,
            train_loss=plots.line_loss(data, batch_path[-1]),
            weight=batch_path[-1],
            bias=0.0,
            stochastic_weight=path[-1],
            figures=figures,
        )
        tables.print_comparisons("T3: gradient descent", figures)
    return summary


def descend(
    config: Config, folder: runs.RunFolder, name: str, data: jt.Dataset, **options: Any
) -> np.ndarray:
    """Returns the weight at the start and after each epoch, [epochs + 1]."""
    model, optimizer = jt.models.LinearRegression(use_bias=False), flags.make_line_optimizer(config)
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    progress = jt.callbacks.progress(config.log_interval, max(1, config.log_interval))
    command.verify_step(config, state, data[: options["batch_size"]], options["loss_fn"])
    _, history = jt.fit(
        state.replace(params={"weight": jnp.array([[START]])}),
        data,
        jt.data.points_on_line(2.0),
        epochs=config.epochs,
        callbacks=[*folder.callbacks(name, batch_size=options["batch_size"]), progress],
        **options,
    )
    return np.array([START, *history["weight"]])


def compare(config: Config, batch: np.ndarray, stochastic: np.ndarray) -> list[Comparison]:
    """Returns the tutorial's figures beside ours; none with other flags."""
    if not flags.has_defaults(config, "epochs", "learning_rate", "optimizer"):
        return []
    name, reference = "batch", (1.0933333333333333, 1.9999444396553017, 7.9997778, 1e-6)
    if config.as_published:
        name, reference = "batch as published", (1.06, 1.9979451252294764, 7.9918, 5e-5)
    first, last, prediction, tolerance = reference
    rows = [
        ("prediction for x = 4 before", 4.0, batch[0] * X_TO_PREDICT, 1e-6),
        (f"{name}: prediction for x = 4", prediction, batch[100] * X_TO_PREDICT, tolerance),
        (f"{name}: w after 1 epoch", first, batch[1], 1e-6),
        (f"{name}: w after 100 epochs", last, batch[100], 1e-6),
        ("stochastic: w after 1 epoch", 1.260688, stochastic[1], 1e-6),
        ("stochastic: w after 100 epochs", 1.9999999999999236, stochastic[100], 1e-6),
        ("stochastic: prediction for x = 4", 8.0, stochastic[100] * X_TO_PREDICT, 1e-6),
    ]
    return [Comparison(name, value, float(ours), limit) for name, value, ours, limit in rows]


def draw(data: jt.Dataset, batch: np.ndarray, stochastic: np.ndarray) -> plots.Figure:
    """Draws both descents on the loss curve, and the loss against the epoch."""
    title = "T3: gradient descent from w = 1"
    figure, (left, right) = plots.subplots(title, 1, 2, size=(10, 4))
    grid = np.linspace(0.8, 2.4, 200)
    left.plot(grid, plots.line_loss(data, grid), color=plots.GREY, label="mean squared error")
    styles = [
        (batch, "batch", plots.BLUE, "o-"),
        (stochastic, "stochastic", plots.VERMILION, "^--"),
    ]
    for weights, name, color, style in styles:
        losses = plots.line_loss(data, weights)
        label = f"{name}, one mark per epoch"
        left.plot(weights, losses, style, color=color, markersize=5, label=label)
        right.plot(losses, style[1:], color=color, label=name)
    plots.label_axes(left, "weight w", "mean squared error")
    right.set_yscale("log")
    plots.label_axes(right, "epoch", "mean squared error (log scale)")
    left.legend()
    right.legend()
    return figure


def descend_surface(config: Config) -> plots.Figure:
    """Draws 400 steps of batch descent on y = 2 x + 2 from (0, 0) over the contours of the loss."""
    data, model = jt.data.points_on_line(2.0, 2.0), jt.models.LinearRegression()
    optimizer = jt.optimizers.make(config.optimizer, config.learning_rate)
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))

    def step(state: jt.TrainState, _: None) -> tuple[jt.TrainState, tuple[jax.Array, jax.Array]]:
        point = jnp.ravel(state.params["weight"]), state.params["bias"]
        return jt.train_step(state, data, LOSS)[0], point

    path = jax.lax.scan(step, state, length=400)[1]
    title = "T3: down the slope, then along the valley of y = w x + b"
    figure, ax = plots.subplots(title, size=(6, 4.6))
    weights, biases = np.meshgrid(*[np.linspace(-0.3, 4, 120)] * 2, indexing="ij")
    loss = plots.line_loss(data, weights, biases)
    plots.contours(ax, weights, biases, loss, [0.02, 0.1, 0.5, 1, 2, 4, 8, 16, 32])
    ax.plot(*path, color=plots.VERMILION, marker=".", markersize=4, label="400 steps")
    ax.plot(0, 0, "o", color=plots.VERMILION, label="start (0, 0)")
    ax.plot(2, 2, "*", color="black", markersize=13, label="minimum (2, 2)")
    ax.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
