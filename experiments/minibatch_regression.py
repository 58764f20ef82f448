"""Tutorial T5: linear regression in mini-batches, and the path that weight and bias take."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain._arguments import check_integer
from jaxtrain.cli import command, flags, plots, resuming, runs, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.mean_squared_error
# What torch.randn gives after torch.manual_seed(0): the start of the reference runs.
START_WEIGHT, START_BIAS = 1.5409961, -0.2934289
STEPS_PER_EPOCH = 8  # 150 examples in batches of 20, the last of 10


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


def run(config: Config) -> dict[str, Any]:
    """Fits y = w x + b to 150 noisy points of y = 2 x + 6, in batches of 20."""
    check_integer(config.log_interval, "log_interval", minimum=0)
    check_integer(config.epochs, "epochs", minimum=0)
    with command.run_folder(config) as folder:
        data = jt.data.noisy_line(150, 2.0, 6.0, 0.3, seed=100, width=5.0)
        state, path = train(config, data, folder)
        mean_squared_error = jt.evaluate(state, data, LOSS)["loss"].item()
        weight, bias = map(float, path[-1])
        comparisons = compare(config, data, weight, bias, mean_squared_error)
        folder.write_model(state)
        folder.write_picture("fit.png", draw_fit(data, path))
        folder.write_picture("path.png", draw_path(data, path, config.as_published))
        summary = folder.write_summary(
            experiment="minibatch_regression",
            dataset="noisy_line",
            epochs=config.epochs,
            seed=config.seed,
            train_loss=mean_squared_error,
            test_loss=None,
            weight=weight,
            bias=bias,
            figures=comparisons,
        )
    tables.print_comparisons("T5: mini-batches", comparisons, config.output_dir)
    return summary


def train(
    config: Config, data: jt.Dataset, folder: runs.RunFolder
) -> tuple[jt.TrainState, np.ndarray]:
    """Returns the state at the end, and (w, b) before and after each step, [steps + 1, 2]."""
    state = jt.init_state(
        jt.models.LinearRegression(),
        flags.make_optimizer(config),
        data.inputs[:1],
        key=flags.seed_key(config.seed),
    ).replace(params={"weight": jnp.array([[START_WEIGHT]]), "bias": jnp.array([START_BIAS])})
    # As published, each of an epoch's eight steps is an epoch of one full batch.
    full = config.as_published

    def fit(epochs: int, callbacks: list[jt.callbacks.Callback]) -> jt.TrainState:
        return jt.fit(
            state,
            data,
            loss_fn=LOSS,
            epochs=epochs,
            batch_size=len(data) if full else config.batch_size,
            key=None if full else flags.seed_key(config.seed),
            callbacks=callbacks,
        )[0]

    def repeat(epochs: int) -> list[tuple[float, float]]:
        path = LinePath(replace(config, log_interval=0))
        fit(epochs, [path])
        return path.points

    path = LinePath(config, repeat)
    epochs = config.epochs * STEPS_PER_EPOCH if full else config.epochs
    trained = fit(epochs, [*folder.callbacks(), path, *resuming.checkpoint_callbacks(config)])
    return trained, np.array(path.points)


class LinePath(jt.callbacks.Callback):
    """Collects weight and bias at the start and after each step, and prints some steps.

    Attributes:
      points: (w, b) at the start and after each step.
    """

    def __init__(
        self, config: Config, repeat: Callable[[int], list[tuple[float, float]]] | None = None
    ) -> None:
        """Takes the flags, and the function that repeats epochs and returns their path."""
        self.points = [(START_WEIGHT, START_BIAS)]
        self._config = config
        self._repeat = repeat

    def on_start(self, run: jt.Run) -> None:
        """Repeats the epochs of a checkpoint, which gives the same bits: it has no path."""
        if run.resumed and self._repeat is not None:
            if self._config.log_interval:
                print(f"resuming after epoch {run.epoch}, from its checkpoint", file=sys.stderr)
            self.points = self._repeat(run.epoch)

    def next_pause(self, run: jt.Run) -> int:
        """Returns the next step."""
        return run.step + 1

    def on_steps(self, run: jt.Run) -> None:
        """Adds a point, and prints one step in `log_interval`."""
        params = run.state.params
        self.points.append((params["weight"].item(), params["bias"].item()))
        interval = self._config.log_interval
        if not interval or (len(self.points) - 1) % interval:
            return
        epoch, batch = run.epoch + 1, run.step
        if self._config.as_published:
            passes, index = divmod(run.epoch, STEPS_PER_EPOCH)
            epoch, batch = passes + 1, index + 1
        (old_weight, old_bias), (weight, bias) = self.points[-2:]
        print(
            f"epoch {epoch} batch {batch}  loss {run.losses[-1]:.6f}  "
            f"Δw {weight - old_weight:+.6f}  Δb {bias - old_bias:+.6f}  "
            f"w {weight:.6f}  b {bias:.6f}",
            file=sys.stderr,
        )


def compare(
    config: Config, data: jt.Dataset, weight: float, bias: float, loss: float
) -> list[Comparison]:
    """Returns the tutorial's figures beside ours."""
    x, y = np.ravel(data.inputs).astype(np.float64), np.ravel(data.targets).astype(np.float64)
    solution = np.polyfit(x, y, 1)
    rows = [
        Comparison("first x", 2.71702471, float(x[0]), 1e-6),
        Comparison("first y", 11.32441082, float(y[0]), 1e-6),
        Comparison("least squares: w", 2.02491836, float(solution[0]), 1e-6),
        Comparison("least squares: b", 5.9624574, float(solution[1]), 1e-6),
    ]
    if not flags.has_defaults(config, "epochs", "batch_size", "learning_rate", "optimizer"):
        return rows
    if config.as_published:
        return [
            *rows,
            Comparison("w as published", 2.0586, weight, 5e-5),
            Comparison("b as published", 5.8536, bias, 5e-5),
            Comparison("mean squared error as published", 0.10397, loss, 5e-6),
        ]
    # The result depends on the order of the points: over 100 seeds w, b and the error have standard
    # deviations of 0.0055, 0.0026 and 0.0004 (and means 2.0583, 5.8542, 0.1042).
    return [
        *rows,
        Comparison("mini-batches, other order: w", 2.0620, weight, 0.022),
        Comparison("mini-batches, other order: b", 5.8549, bias, 0.01),
        Comparison("mini-batches, other order: mean squared error", 0.10407, loss, 0.0024),
    ]


def draw_fit(data: jt.Dataset, path: np.ndarray) -> plots.Figure:
    """Draws the points, and the line before and after training."""
    figure = plots.Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.scatter(data.inputs, data.targets, s=14, color=plots.BLUE, label="data", alpha=0.7)
    ends = np.array([0.0, 5.0])
    for (weight, bias), color, style, name in [
        (path[0], plots.GREY, ":", "line at the start"),
        (path[-1], plots.VERMILION, "-", f"fitted: {path[-1][0]:.3f} x + {path[-1][1]:.3f}"),
    ]:
        ax.plot(ends, weight * ends + bias, color=color, linestyle=style, label=name)
    plots.label_axes(ax, "x", "y")
    ax.legend()
    figure.suptitle("T5: 150 noisy points of y = 2 x + 6")
    return figure


def draw_path(data: jt.Dataset, path: np.ndarray, as_published: bool) -> plots.Figure:
    """Draws the path of (w, b) over the contours of the loss, complete and near its end."""
    x, y = np.ravel(data.inputs), np.ravel(data.targets)
    figure = plots.Figure(figsize=(10, 4.2), layout="constrained")
    solution = np.polyfit(x, y, 1)
    windows = [(path.min(axis=0) - 0.3, path.max(axis=0) + 0.3), (solution - 0.1, solution + 0.1)]
    windows[1][0][1], windows[1][1][1] = solution[1] - 0.3, solution[1] + 0.1
    for ax, (low, high) in zip(figure.subplots(1, 2), windows, strict=True):
        weights, biases = np.meshgrid(*np.linspace(low, high, 80).T, indexing="ij")
        errors = weights[..., None] * x + biases[..., None] - y
        loss = (errors**2).mean(axis=-1)
        levels = np.geomspace(loss.min() * 1.02, loss.max(), 9)
        ax.contour(weights, biases, loss, levels=levels, cmap="viridis", alpha=0.8)
        ax.plot(*path.T, color=plots.VERMILION, linewidth=0.8, label="path, step by step")
        ax.plot(*solution, "*", color="black", markersize=13, label="least squares")
        ax.plot(*path[-1], "o", color=plots.VERMILION, label="end")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        plots.label_axes(ax, "weight w", "bias b", grid=False)
    figure.axes[0].legend(loc="upper right")
    figure.axes[0].set_title("complete path")
    figure.axes[1].set_title("near its end")
    kind = "full batches, as published" if as_published else "mini-batches"
    figure.suptitle(f"T5: gradient descent on {kind}")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
