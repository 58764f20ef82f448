"""Tutorial T5: linear regression in mini-batches, and the path that weight and bias take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.mean_squared_error
# What torch.randn gives after torch.manual_seed(0): the start of the reference runs.
START_WEIGHT, START_BIAS = 1.5409961, -0.2934289
STEPS_PER_EPOCH = 8  # 150 examples in batches of 20, the last of 10
# PyTorch's w, b and mean squared error, and tolerances, by whether as published. In mini-batches
# they depend on the order of the points: over 100 seeds the standard deviations are 0.0055, 0.0026
# and 0.0004, and the means 2.0583, 5.8542 and 0.1042.
REFERENCE = {
    True: ((2.0586, 5.8536, 0.10397), (5e-5, 5e-5, 5e-6)),
    False: ((2.0620, 5.8549, 0.10407), (0.022, 0.01, 0.0024)),
}


@dataclass(frozen=True)
class Config(flags.LineFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/minibatch_regression")
    epochs: int = 99
    """Passes over the 150 points."""
    batch_size: int = 20
    """Points per step."""
    as_published: bool = False
    """Take every step on the whole data set, as the tutorial's loop does."""
    seed: int = 0
    """Seed of the order of the points."""
    log_interval: int = 40
    """Steps between two lines of progress; 0 prints nothing."""


def run(config: Config) -> dict[str, Any]:
    """Fits y = w x + b to 150 noisy points of y = 2 x + 6, in batches of 20."""
    flags.check(config, "epochs", minimum=1)
    with command.run_folder(config) as folder:
        data = jt.data.noisy_line(150, 2.0, 6.0, 0.3, seed=100, width=5.0)
        state, path, resumed = train(config, data, folder.callbacks(), config.log_interval)
        if resumed:  # a checkpoint has no path: take all steps again, which gives the same bits
            _, path, _ = train(config, data, [], log_interval=0)
        folder.write_model(state)
        x, title = np.array([0.0, 5.0]), "T5: 150 noisy points of y = 2 x + 6"
        lines = [weight * x + bias for weight, bias in path[[0, -1]]]
        folder.write_picture("fit.png", plots.line_fit({"data": data}, x, lines, title))
        folder.write_picture("path.png", draw_path(data, path, config.as_published))
        weight, bias = map(float, path[-1])
        loss = jt.evaluate(state, data, LOSS)["loss"].item()
        figures = compare(config, data, weight, bias, loss)
        summary = folder.write_summary(
            "minibatch_regression",
            dataset="noisy_line",
            epochs=config.epochs,
            seed=config.seed,
            train_loss=loss,
            weight=weight,
            bias=bias,
            figures=figures,
        )
        tables.print_comparisons("T5: mini-batches", figures)
    return summary


def train(
    config: Config, data: jt.Dataset, callbacks: list[jt.callbacks.Callback], log_interval: int
) -> tuple[jt.TrainState, np.ndarray, bool]:
    """Returns the state, (w, b) before and after each step, and whether some are missing."""
    key, optimizer = flags.seed_key(config.seed), flags.make_line_optimizer(config)
    state = jt.init_state(jt.models.LinearRegression(), optimizer, data.inputs[:1], key=key)
    start = {"weight": jnp.array([[START_WEIGHT]]), "bias": jnp.array([START_BIAS])}
    path = [(START_WEIGHT, START_BIAS)]
    full = config.as_published  # each of an epoch's eight steps is an epoch of one full batch

    def add_point(run: jt.Run) -> None:
        path.append((run.state.params["weight"].item(), run.state.params["bias"].item()))
        step = run.epoch * run.steps_per_epoch + run.step
        # The first step after a resume follows a point that is missing.
        if log_interval and step % log_interval == 0 and not (run.resumed and len(path) == 2):
            epoch, batch = divmod(step - 1, STEPS_PER_EPOCH if full else run.steps_per_epoch)
            (w, b), (dw, db) = path[-1], np.subtract(path[-1], path[-2])
            line = f"epoch {epoch + 1} batch {batch + 1}  loss {run.losses[-1]:.6f}  "
            print(f"{line}Δw {dw:+.6f}  Δb {db:+.6f}  w {w:.6f}  b {b:.6f}", file=sys.stderr)

    command.verify_step(config, state, data[: config.batch_size], LOSS)
    state, history = jt.fit(
        state.replace(params=start),
        data,
        loss_fn=LOSS,
        epochs=config.epochs * STEPS_PER_EPOCH if full else config.epochs,
        batch_size=len(data) if full else config.batch_size,
        key=None if full else key,
        callbacks=[*callbacks, jt.callbacks.every_steps(1, add_point)],
    )
    is_incomplete = len(path) <= len(history.step_losses)  # the run has resumed
    return state, np.array(path), is_incomplete


def compare(
    config: Config, data: jt.Dataset, weight: float, bias: float, loss: float
) -> list[Comparison]:
    """Returns the tutorial's figures beside ours."""
    x, y = np.ravel(data.inputs).astype(np.float64), np.ravel(data.targets).astype(np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    rows = [
        ("first x", 2.71702471, x[0], 1e-6),
        ("first y", 11.32441082, y[0], 1e-6),
        ("least squares: w", 2.02491836, slope, 1e-6),
        ("least squares: b", 5.9624574, intercept, 1e-6),
    ]
    if flags.has_defaults(config, "epochs", "batch_size", "learning_rate", "optimizer"):
        name = "{} as published" if config.as_published else "mini-batches, other order: {}"
        originals, tolerances = REFERENCE[config.as_published]
        names = [name.format(each) for each in ("w", "b", "mean squared error")]
        rows += zip(names, originals, (weight, bias, loss), tolerances, strict=True)
    return [Comparison(name, value, float(ours), limit) for name, value, ours, limit in rows]


def draw_path(data: jt.Dataset, path: np.ndarray, as_published: bool) -> plots.Figure:
    """Draws the path of (w, b) over the contours of the loss, complete and near its end."""
    kind = "full batches, as published" if as_published else "mini-batches"
    figure, axes = plots.subplots(f"T5: gradient descent on {kind}", 1, 2, size=(10, 4.2))
    solution = np.polyfit(np.ravel(data.inputs), np.ravel(data.targets), 1)
    windows = [
        ("complete path", path.min(axis=0) - 0.3, path.max(axis=0) + 0.3),
        ("near its end", solution - (0.1, 0.3), solution + 0.1),
    ]
    for ax, (heading, low, high) in zip(axes, windows, strict=True):
        weights, biases = np.meshgrid(*np.linspace(low, high, 80).T, indexing="ij")
        loss = plots.line_loss(data, weights, biases)
        plots.contours(ax, weights, biases, loss, np.geomspace(loss.min() * 1.02, loss.max(), 9))
        ax.plot(*path.T, color=plots.VERMILION, linewidth=0.8, label="path, step by step")
        ax.plot(*solution, "*", color="black", markersize=13, label="least squares")
        ax.plot(*path[-1], "o", color=plots.VERMILION, label="end")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=heading)
    axes[0].legend(loc="upper right")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
