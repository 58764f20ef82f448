"""Tutorial T2: the losses as functions of the error, the angle and the logit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.cli.tables import Comparison

GRID = np.linspace(-1.0, 1.0, 201, dtype=np.float32)[:, None]  # scaled to each figure's range

Curves = tuple[str, np.ndarray, dict[str, np.ndarray]]  # axis, x, and each loss over it


@dataclass(frozen=True)
class Config(flags.ExperimentFlags):
    """Flags of this experiment."""

    output_dir: Path = Path("runs/losses")
    weight: float = 0.5
    """λ of the weighted sum |error| + λ error²."""


def run(config: Config) -> dict[str, Any]:
    """Draws every loss, and checks cases whose value is known."""
    with command.run_folder(config) as folder:
        curves = [by_error(config.weight), by_angle(), by_logit()]
        folder.start()
        columns = {name: values for _, _, lines in curves for name, values in lines.items()}
        folder.write_table("history.csv", {"index": range(len(GRID)), **columns})
        folder.write_picture("losses.png", draw(curves))
        figures = compare()
        summary = folder.write_summary("losses", figures=figures)
        tables.print_comparisons("T2: losses by hand", figures)
    return summary


def by_error(weight: float) -> Curves:
    """Returns the losses of a prediction that is off by −3 … 3."""
    errors, zeros = 3 * GRID, jnp.zeros_like(GRID)
    absolute, squared = jt.losses.mean_absolute_error, jt.losses.mean_squared_error
    losses = {
        "mean absolute error": absolute,
        "mean squared error": squared,
        f"|error| + {weight:g} error²": jt.losses.weighted_sum((1.0, absolute), (weight, squared)),
        "Euclidean distance": jt.losses.euclidean_distance,
    }
    values = {name: np.asarray(loss(errors, zeros)) for name, loss in losses.items()}
    return "error (prediction − target)", np.ravel(errors), values


def by_angle() -> Curves:
    """Returns the distances of two unit vectors at −180° … 180°."""
    angles = math.pi * GRID[:, 0]
    vectors = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    right = jnp.tile(jnp.array([1.0, 0.0]), (len(vectors), 1))
    losses = {
        "cosine distance": jt.losses.cosine_distance,
        "Euclidean distance, unit vectors": jt.losses.euclidean_distance,
    }
    values = {name: np.asarray(loss(vectors, right)) for name, loss in losses.items()}
    return "angle between the vectors (degrees)", np.degrees(angles), values


def by_logit() -> Curves:
    """Returns the losses of a logit −6 … 6 whose true class is 1 (or 1 with probability 0.8)."""
    logits = 6 * GRID
    ones = jnp.ones_like(logits)
    pairs = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)  # of two classes
    targets = jnp.tile(jnp.array([0.2, 0.8]), (len(pairs), 1))
    values = {
        "binary cross entropy of a logit": jt.losses.sigmoid_binary_cross_entropy(logits, ones),
        "the same of its probability": jt.losses.binary_cross_entropy(jax.nn.sigmoid(logits), ones),
        "cross entropy, two classes": jt.losses.cross_entropy(pairs, jnp.ones(len(pairs), int)),
        "cross entropy of q with p = (0.2, 0.8)": jt.losses.soft_cross_entropy(pairs, targets),
    }
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return "logit of the true class", np.ravel(logits), arrays


def compare() -> list[Comparison]:
    """Returns values known from their formulas beside ours."""
    losses, p, q = jt.losses, np.array([0.5, 0.25, 0.25]), np.array([0.7, 0.2, 0.1])
    squared, distance = losses.mean_squared_error, losses.euclidean_distance
    at_60_degrees = [0.5, math.sqrt(0.75)]
    entropy, log_q = -float(np.sum(p * np.log(q))), np.log(q)
    binary = "binary cross entropy at probability 1/2: log 2"
    cases: list[tuple[str, float, jt.losses.Loss, Any, Any]] = [
        ("mean squared error of (1, 2), (3, 5)", 6.5, squared, [1.0, 2.0], [3.0, 5.0]),
        ("Euclidean distance of (0, 0), (3, 4)", 5.0, distance, [0.0, 0.0], [3.0, 4.0]),
        ("cosine distance at 60°", 0.5, losses.cosine_distance, [1.0, 0.0], at_60_degrees),
        ("cross entropy of p, q: −Σ p log q", entropy, losses.soft_cross_entropy, log_q, p),
        (
            "cross entropy of 10 equal logits: log 10",
            math.log(10),
            losses.cross_entropy,
            [0.0] * 10,
            3,
        ),
        (binary, math.log(2), losses.binary_cross_entropy, [0.5], [1.0]),
    ]
    return [
        Comparison(name, value, loss(jnp.array([prediction]), jnp.array([target])).item())
        for name, value, loss, prediction, target in cases
    ]


def draw(curves: list[Curves]) -> plots.Figure:
    """Draws the three figures side by side."""
    figure, axes = plots.subplots("T2: losses", 1, 3, size=(13, 4.2))
    styles = [(plots.BLUE, "-"), (plots.VERMILION, "--"), (plots.GREEN, "-."), ("black", ":")]
    for ax, (axis, x, lines) in zip(axes, curves, strict=True):
        for (color, style), (name, values) in zip(styles, lines.items(), strict=False):
            ax.plot(x, values, label=name, linewidth=2, color=color, linestyle=style)
        plots.label_axes(ax, axis, "loss")
        ax.set_ylim(top=1.35 * max(values.max() for values in lines.values()))
        ax.legend(fontsize=8, loc="upper center")
    axes[1].set_xticks([-180, -90, 0, 90, 180])
    return figure


if __name__ == "__main__":
    command.main(Config, run)
