"""Tutorial T3: batch and stochastic gradient descent on three points, drawn on the loss."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, resuming, runs, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.mean_squared_error
# The tutorial's loop over examples overwrites the gradient, so that only the last example counts,
# divided by the number of all three.
PUBLISHED_LOSS = jt.losses.weighted_sum((1 / 3, LOSS))
START, X_TO_PREDICT = 1.0, 4.0  # w at the start; the x to predict, whose true y is 8


@dataclass(frozen=True)
class Config(flags.LineFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/gradient_descent")
    epochs: int = 100
    """Passes over the three points."""
    optimizer: flags.OptimizerName = "sgd"
    """The optimizer, as in torch.optim; lbfgs uses all points at once in both runs."""
    as_published: bool = False
    """Batch descent as in the tutorial's listing: only the last example's gradient counts."""
    log_interval: int = 10
    """Epochs between two lines of progress; 0 prints nothing."""


def run(config: Config) -> dict[str, Any]:
    """Fits y = w x to (1, 2), (2, 4), (3, 6) from w = 1, in float64 as the tutorial does."""
    # The tutorial computes in Python's float64.
    with jax.enable_x64(True), command.run_folder(config) as folder:
        data = jt.data.points_on_line(2.0)
        batch = descend(
            config,
            data.take(jnp.array([2])) if config.as_published else data,
            data,
            folder,
            name="batch",
            loss_fn=PUBLISHED_LOSS if config.as_published else LOSS,
            batch_size=3,
        )
        stochastic = descend(
            config,
            data,
            data,
            folder,
            name="stochastic",
            loss_fn=LOSS,
            batch_size=3 if config.optimizer == "lbfgs" else 1,
        )
        comparisons = []
        if flags.has_defaults(config, "epochs", "learning_rate", "optimizer"):
            comparisons = compare(batch, stochastic, config.as_published)
        folder.write_picture("descent.png", draw(data, batch, stochastic))
        surface = descend_surface(config)
        folder.write_picture("descent_on_surface.png", draw_on_surface(surface))
        summary = folder.write_summary(
            experiment="gradient_descent",
            dataset="points_on_line",
            epochs=config.epochs,
            seed=None,
            train_loss=mean_loss(data, batch[-1]),
            test_loss=None,
            weight=batch[-1],
            bias=0.0,
            stochastic_weight=stochastic[-1],
            figures=comparisons,
        )
    tables.print_comparisons("T3: gradient descent", comparisons, config.output_dir)
    return summary


def descend(
    config: Config,
    data: jt.Dataset,
    all_data: jt.Dataset,
    folder: runs.RunFolder,
    *,
    name: str,
    loss_fn: jt.losses.Loss,
    batch_size: int,
) -> np.ndarray:
    """Returns the weight at the start and after each epoch, [epochs + 1]."""
    state = jt.init_state(
        jt.models.LinearRegression(use_bias=False),
        flags.make_optimizer(config),
        data.inputs[:1],
        key=jax.random.key(0),  # the start is set below: nothing is random
    ).replace(params={"weight": jnp.array([[START]])})
    reporting = command.reporting(
        folder,
        config.log_interval,
        epoch_interval=config.log_interval,
        part=name,
        batch_size=batch_size,
    )
    _, history = jt.fit(
        state,
        data,
        all_data,
        loss_fn=loss_fn,
        epochs=config.epochs,
        batch_size=batch_size,
        callbacks=[*reporting, *resuming.checkpoint_callbacks(config, part=name)],
    )
    return np.array([START, *history["weight"]])


def mean_loss(data: jt.Dataset, weight: float | np.ndarray) -> Any:
    """Returns the mean squared error of y = w x, for one weight or many."""
    errors = np.multiply.outer(np.asarray(weight), np.ravel(data.inputs)) - np.ravel(data.targets)
    return (errors**2).mean(axis=-1)


def compare(batch: np.ndarray, stochastic: np.ndarray, as_published: bool) -> list[Comparison]:
    """Returns the tutorial's figures beside ours."""
    if as_published:
        rows = [
            ("batch as published: w after 1 epoch", 1.06, batch[1]),
            ("batch as published: w after 100 epochs", 1.9979451252294764, batch[100]),
        ]
        prediction = Comparison(
            "batch as published: prediction for x = 4", 7.9918, batch[100] * X_TO_PREDICT, 5e-5
        )
    else:
        rows = [
            ("batch: w after 1 epoch", 1.0933333333333333, batch[1]),
            ("batch: w after 100 epochs", 1.9999444396553017, batch[100]),
        ]
        prediction = Comparison(
            "batch: prediction for x = 4", 7.9997778, batch[100] * X_TO_PREDICT, 1e-6
        )
    rows += [
        ("stochastic: w after 1 epoch", 1.260688, stochastic[1]),
        ("stochastic: w after 100 epochs", 1.9999999999999236, stochastic[100]),
        ("stochastic: prediction for x = 4", 8.0, stochastic[100] * X_TO_PREDICT),
    ]
    return [
        Comparison("prediction for x = 4 before", 4.0, batch[0] * X_TO_PREDICT, 1e-6),
        prediction,
        *(Comparison(name, original, float(ours), 1e-6) for name, original, ours in rows),
    ]


def draw(data: jt.Dataset, batch: np.ndarray, stochastic: np.ndarray) -> plots.Figure:
    """Draws both descents on the loss curve, and the loss against the epoch."""
    figure = plots.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(0.8, 2.4, 200)
    left.plot(grid, mean_loss(data, grid), color=plots.GREY, label="mean squared error")
    paths = [
        (batch, "batch", {"color": plots.BLUE, "marker": "o", "linestyle": "-"}),
        (stochastic, "stochastic", {"color": plots.VERMILION, "marker": "^", "linestyle": "--"}),
    ]
    for weights, name, style in paths:
        losses = mean_loss(data, weights)
        shown = losses < 1e100  # matplotlib's ticks overflow beyond
        weights, losses = weights[shown], losses[shown]
        left.plot(weights, losses, markersize=5, label=f"{name}, one mark per epoch", **style)
        right.plot(losses, label=name, **{**style, "marker": None})
    plots.label_axes(left, "weight w", "mean squared error")
    left.legend()
    right.set_yscale("log")
    plots.label_axes(right, "epoch", "mean squared error (log scale)")
    right.legend()
    figure.suptitle("T3: gradient descent from w = 1")
    return figure


def descend_surface(config: Config) -> np.ndarray:
    """Returns (w, b) at each of 400 steps of batch descent on y = 2 x + 2 from (0, 0)."""
    data = jt.data.points_on_line(2.0, 2.0)
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.make(config.optimizer, config.learning_rate),
        data.inputs[:1],
        key=jax.random.key(0),  # the start is set below: nothing is random
    )
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))

    def step(state: jt.TrainState, _: None) -> tuple[jt.TrainState, jax.Array]:
        point = jnp.concatenate([jnp.ravel(state.params[name]) for name in ("weight", "bias")])
        return jt.train_step(state, data, LOSS)[0], point

    return np.asarray(jax.lax.scan(step, state, length=400)[1])


def draw_on_surface(path: np.ndarray) -> plots.Figure:
    """Draws the path of (w, b) over the contours of the loss."""
    figure = plots.Figure(figsize=(6, 4.6), layout="constrained")
    ax = figure.subplots()
    grid = np.linspace(-0.3, 4, 120)
    weights, biases = np.meshgrid(grid, grid, indexing="ij")
    x = np.arange(1.0, 4.0)
    errors = weights[..., None] * x + biases[..., None] - (2 * x + 2)
    levels = [0.02, 0.1, 0.5, 1, 2, 4, 8, 16, 32]
    lines = ax.contour(weights, biases, (errors**2).mean(axis=-1), levels=levels, cmap="viridis")
    ax.clabel(lines, fmt="%g", fontsize=8)
    ax.plot(*path.T, color=plots.VERMILION, marker=".", markersize=4, label="400 steps")
    ax.plot(*path[0], "o", color=plots.VERMILION, label="start (0, 0)")
    ax.plot(2, 2, "*", color="black", markersize=13, label="minimum (2, 2)")
    plots.label_axes(ax, "weight w", "bias b", grid=False)
    ax.legend(loc="upper right")
    figure.suptitle("T3: down the slope, then along the valley of y = w x + b")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
