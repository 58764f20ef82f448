"""matplotlib's figures, imported without a display, and the style of all pictures.

The colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which color-blind
readers can tell apart; line styles and markers also differ, for printing in grey.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain._extras import needs_extra

with needs_extra("experiments"):
    from matplotlib import figure as _figure
    from matplotlib.axes import Axes as Axes
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import PercentFormatter as PercentFormatter

_DPI = 120


class Figure(_figure.Figure):
    """A figure that a notebook shows, also before pyplot has drawn one."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
ORANGE, SKY, PURPLE, YELLOW = "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"

# An axis whose positive values span more than this factor has a logarithmic scale.
LOG_SPAN = 20
STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": BLUE, "linestyle": "-"},
    "test": {"color": VERMILION, "linestyle": "--"},
    "validation": {"color": GREEN, "linestyle": "-."},
}
_PANELS_PER_ROW = 3
# Columns that are not drawn.
_AXES = ("epoch", "step", "seconds")


def learning_curves(
    history: Mapping[str, np.ndarray], step_losses: np.ndarray, title: str = ""
) -> Figure:
    """Draws each quantity of a history, that of all data sets in one panel.

    The horizontal axis is the epoch, or the step in a run by steps.

    Args:
      history: the columns, [epochs, ...]. Those of arrays, and what an optimizer records and does
        not change, are left out.
      step_losses: the loss of each step, [steps].
      title: title of the figure.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, values in history.items():
        data, _, quantity = name.partition("_")
        if np.ndim(values) == 1 and data in STYLES:
            panels.setdefault(quantity, {})[data] = values
        elif np.ndim(values) == 1 and name not in _AXES and np.ptp(values) > 0:
            panels[name] = {"": values}
    columns = min(len(panels), _PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(6 if columns == 1 else 4.5 * columns, 3.8 * rows), layout="constrained"
    )
    figure.suptitle(title)
    for number, (quantity, curves) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(rows, columns, number)
        steps = step_losses if quantity == "loss" else step_losses[:0]
        axis = "step" if "step" in history else "epoch"
        _draw_curves(ax, quantity, curves, axis, history[axis], steps, len(step_losses))
    return figure


def _draw_curves(
    ax: Axes,
    quantity: str,
    curves: dict[str, np.ndarray],
    axis: str,
    ends: np.ndarray,
    step_losses: np.ndarray,
    steps: int,
) -> None:
    """Draws one quantity: a mean over an epoch at its middle, and what follows it at its end.

    `ends` are the ends of the epochs, counted in `axis`.
    """
    steps_per_epoch = steps // len(ends)
    length = steps_per_epoch if axis == "step" else 1
    middle = (0.5 if steps_per_epoch > 1 else 1.0) * length
    if len(step_losses) and steps_per_epoch > 1:
        progress = ends[0] + (np.arange(1, len(step_losses) + 1) / steps_per_epoch - 1) * length
        ax.plot(progress, step_losses, color=GREY, linewidth=0.5, alpha=0.6, label="training step")
    labels = {"train": "training, in epoch" if steps_per_epoch > 1 else "training, before the step"}
    for data, values in curves.items():
        x = ends - middle if data == "train" else ends
        label = labels.get(data, f"{data}, after epoch" if data else None)
        marker = "o" if len(ends) <= 30 else None
        ax.plot(x, values, **STYLES.get(data, {"color": BLUE}), marker=marker, label=label)
    values = np.concatenate([*curves.values(), step_losses])
    values = values[np.isfinite(values)]
    is_log = len(values) > 0 and values.min() > 0
    is_log = is_log and (quantity == "loss" or values.max() > LOG_SPAN * values.min())
    if is_fraction(quantity):
        ax.margins(y=0.12)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        data, last = list(curves.items())[-1]
        ax.set_title(f"{data}: {last[-1]:.2%} after the last epoch", fontsize=10)
    elif is_log:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    scale = " (log scale)" if is_log and not is_fraction(quantity) else ""
    label_axes(ax, axis, quantity.replace("_", " ") + scale)
    if "" not in curves:
        ax.legend()


def is_fraction(column: str) -> bool:
    """Returns whether a column is shown in percent."""
    return column.endswith("accuracy")


def label_axes(ax: Axes, x: str, y: str, grid: bool = True) -> None:
    """Names the axes, in one style for all pictures."""
    ax.set(xlabel=x, ylabel=y)
    if grid:
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)


def to_png(figure: Any) -> bytes:
    """Returns a figure as the content of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI)
    return image.getvalue()
