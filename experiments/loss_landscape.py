"""Tutorial T3: the loss of a line as a curve over its weight and a surface over weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.mean_squared_error
PARAMETERS = np.linspace(0, 4, 41, dtype=np.float32)  # 0.0, 0.1, … 4.0 of weight and bias


@dataclass(frozen=True)
class Config(flags.ExperimentFlags):
    """Flags of this experiment."""

    output_dir: Path = Path("runs/loss_landscape")
    as_published: bool = False
    """Draw the surface that the tutorial drew: the last example's loss over 3, not the mean."""


def run(config: Config) -> dict[str, Any]:
    """Evaluates the mean squared error at 41 weights, and 41 x 41 weights and biases, by vmap."""
    with command.run_folder(config) as folder:
        folder.start()
        loss = loss_of(jt.data.points_on_line(2.0))
        curve = jax.jit(jax.vmap(loss, in_axes=(0, None)))(PARAMETERS, 0.0)
        loss = loss_of(jt.data.points_on_line(2.0, 2.0), last_over_count=config.as_published)
        over_biases = jax.vmap(loss, in_axes=(None, 0))
        surface = jax.jit(jax.vmap(over_biases, in_axes=(0, None)))(PARAMETERS, PARAMETERS)
        folder.write_table("history.csv", {"weight": PARAMETERS, "loss": np.asarray(curve)})
        folder.write_picture("loss_curve.png", draw_curve(curve))
        folder.write_picture("loss_surface.png", draw_surface(surface, config.as_published))
        figures = compare(curve, surface) if not config.as_published else []
        summary = folder.write_summary(
            "loss_landscape",
            dataset="points_on_line",
            train_loss=float(curve.min()),
            figures=figures,
        )
        tables.print_comparisons("T3: the loss landscape", figures)
    return summary


def loss_of(
    data: jt.Dataset, last_over_count: bool = False
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (weight, bias) -> mean loss over the data, or the last loss over their count."""
    model = jt.models.LinearRegression()

    def loss(weight: jax.Array, bias: jax.Array) -> jax.Array:
        params = {"weight": jnp.reshape(weight, (1, 1)), "bias": jnp.reshape(bias, (1,))}
        predictions: Any = model.apply({"params": params}, data.inputs)
        losses = LOSS(predictions, data.targets)
        return losses[-1] / len(data) if last_over_count else losses.mean()

    return loss


def compare(curve: jax.Array, surface: jax.Array) -> list[Comparison]:
    """Returns the tutorial's figures beside ours."""
    weight, bias = np.unravel_index(int(surface.argmin()), surface.shape)
    rounded = 5e-5  # the tutorial prints four decimals
    return [
        Comparison("loss at w = 0", 18.6667, float(curve[0]), rounded),
        Comparison("loss at w = 4", 18.6667, float(curve[-1]), rounded),
        Comparison("smallest loss over w", 0.0, float(curve.min())),
        Comparison("w at the minimum of the curve", 2.0, float(PARAMETERS[curve.argmin()])),
        Comparison("loss at (w, b) = (0, 0)", 38.6667, float(surface[0, 0]), rounded),
        Comparison("loss at (4, 0)", 6.6667, float(surface[-1, 0]), rounded),
        Comparison("loss at (0, 4)", 6.6667, float(surface[0, -1]), rounded),
        Comparison("loss at (4, 4)", 38.6667, float(surface[-1, -1]), rounded),
        Comparison("smallest loss over (w, b)", 0.0, float(surface.min())),
        Comparison("w at the minimum of the surface", 2.0, float(PARAMETERS[weight])),
        Comparison("b at the minimum of the surface", 2.0, float(PARAMETERS[bias])),
    ]


def draw_curve(curve: jax.Array) -> plots.Figure:
    """Draws the loss over the weight."""
    title = "T3: the loss of y = w x on (1, 2), (2, 4), (3, 6)"
    figure, ax = plots.subplots(title, size=(6, 4))
    ax.plot(PARAMETERS, curve, color=plots.BLUE, marker=".", label="mean squared error")
    ax.plot(PARAMETERS[curve.argmin()], curve.min(), "*", color=plots.VERMILION, markersize=14)
    ax.annotate("minimum at w = 2", (2, 0), xytext=(2, 3), ha="center")
    plots.label_axes(ax, "weight w", "mean squared error")
    return figure


def draw_surface(surface: jax.Array, as_published: bool) -> plots.Figure:
    """Draws the loss over weight and bias, as a surface and as contours."""
    which = "last example's loss / 3, as published" if as_published else "mean squared error"
    figure = plots.Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(f"T3: {which} of y = w x + b on (1, 4), (2, 6), (3, 8)")
    weights, biases = np.meshgrid(PARAMETERS, PARAMETERS, indexing="ij")
    space: Any = figure.add_subplot(1, 2, 1, projection="3d")
    space.plot_surface(weights, biases, np.asarray(surface), cmap="viridis", rcount=41, ccount=41)
    space.set(xlabel="weight w", ylabel="bias b", zlabel="loss")
    space.view_init(elev=32, azim=-120)
    space.set_box_aspect(None, zoom=0.88)
    flat = figure.add_subplot(1, 2, 2)
    levels = [0.05, 0.2, 0.5, 1, 2, 4, 8, 16, 32]
    plots.contours(flat, weights, biases, np.asarray(surface), levels)
    if not as_published:
        flat.plot(2, 2, "*", color=plots.VERMILION, markersize=14, label="minimum (2, 2)")
        flat.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
