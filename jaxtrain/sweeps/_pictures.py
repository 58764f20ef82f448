"""Pictures of a sweep: a line with a band, and a heat map."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain import _figures
from jaxtrain.errors import InputError
from jaxtrain.sweeps.result import axis_names, format_value

if TYPE_CHECKING:
    from jaxtrain.sweeps.result import SweepResult

# An axis whose positive values span more than this factor has a logarithmic scale.
_LOG_SPAN = 20
_COLORS = (
    _figures.BLUE,
    _figures.VERMILION,
    _figures.GREEN,
    _figures.ORANGE,
    _figures.PURPLE,
    _figures.SKY,
)


def line_plot(result: SweepResult, column: str, x: str | None, over: Any) -> _figures.Figure:
    """Draws the final value of a column against one axis, with a band over others."""
    over = axis_names(over)
    x = x or next((name for name in result.axes if name not in over), None)
    if x is None:
        raise InputError(
            f"over has all axes of the sweep ({', '.join(over)}); expected one axis to remain for x"
        )
    _check_axes(result, (x, *over))
    rest = [name for name in result.axes if name not in (x, *over)]
    positions, ticks, is_log = _scale(result.axes[x])
    lines: dict[tuple[Any, ...], list[list[float]]] = {}
    for each, value in zip(result.configurations, np.ravel(result.final(column)), strict=True):
        key = tuple(each[name] for name in rest)
        line = lines.setdefault(key, [[] for _ in positions])
        line[result.axes[x].index(each[x])].append(float(value))
    figure = _figures.Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for number, (key, line) in enumerate(lines.items()):
        finite = [np.array(values)[np.isfinite(values)] for values in line]
        means = np.array([values.mean() if len(values) else np.nan for values in finite])
        deviations = np.array(
            [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in finite]
        )
        label = ", ".join(f"{name} {format_value(v)}" for name, v in zip(rest, key, strict=True))
        color = _COLORS[number % len(_COLORS)]
        marker = "osDv^P"[(number + number // len(_COLORS)) % 6]  # another one for each color
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        order = np.argsort(positions)
        at, means, deviations = np.array(positions)[order], means[order], deviations[order]
        ax.plot(at, means, label=label or None, **style)
        if over:
            ax.fill_between(at, means - deviations, means + deviations, color=color, alpha=0.2)
    if is_log:
        ax.set_xscale("log")
    if ticks:
        ax.set_xticks(positions, labels=ticks)
    if rest:
        ax.legend(fontsize=8)
    band = f", mean ± standard deviation over {', '.join(over)}" if over else ""
    _figures.label_axes(ax, x.replace("_", " "), column.replace("_", " "))
    _show_percent(ax.yaxis, column)
    figure.suptitle(f"{column.replace('_', ' ')}{band}", fontsize=11)
    return figure


def heat_map(result: SweepResult, column: str, x: str | None, y: str | None) -> _figures.Figure:
    """Draws the final value of a column over two axes, averaged over the others."""
    if len(result.axes) > len(result.shape):
        raise InputError(
            f"the sweep's axes {', '.join(result.axes)} are zipped; expected a product of two axes"
        )
    if len(result.axes) < 2:
        raise InputError(
            f"the sweep has the axis {', '.join(result.axes)}; expected two axes for a heat map; "
            "line_plot draws one"
        )
    y = y or next(name for name in result.axes if name != x)
    x = x or next(name for name in result.axes if name != y)
    _check_axes(result, (x, y))
    names = list(result.axes)
    values = np.moveaxis(result.final(column), (names.index(y), names.index(x)), (0, 1))
    finite = np.isfinite(values)
    rest = tuple(range(2, values.ndim))
    count = finite.sum(axis=rest)
    total = np.where(finite, values, 0).sum(axis=rest)
    grid = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    rows, columns = grid.shape
    size = (2.6 + max(3.0, 0.75 * columns), 1.8 + max(1.6, 0.42 * rows))
    figure = _figures.Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(grid, cmap="viridis", aspect="auto")
    ax.set_xticks(range(columns), labels=list(map(format_value, result.axes[x])))
    ax.set_yticks(range(rows), labels=list(map(format_value, result.axes[y])))
    is_fraction = _is_fraction(column)
    low, high = (0.0, 1.0) if np.isnan(grid).all() else (np.nanmin(grid), np.nanmax(grid))
    for row, column_index in np.ndindex(grid.shape):
        value = grid[row, column_index]
        text = "diverged" if np.isnan(value) else f"{value:.2%}" if is_fraction else f"{value:.3g}"
        dark = not np.isnan(value) and value < (low + high) / 2
        ax.text(
            column_index,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )
    _figures.label_axes(ax, x.replace("_", " "), y.replace("_", " "), grid=False)
    bar = figure.colorbar(image, ax=ax, label=column.replace("_", " "))
    _show_percent(bar.ax.yaxis, column)
    others = [name for name in names if name not in (x, y)]
    mean = f", mean over {', '.join(others)}" if others else ""
    figure.suptitle(f"{column.replace('_', ' ')}{mean}", fontsize=11)
    return figure


def _check_axes(result: SweepResult, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in result.axes:
            raise InputError(
                f"the sweep has no axis {name!r}; expected one of {', '.join(result.axes)}"
            )


def _scale(values: tuple[Any, ...]) -> tuple[list[float], list[str], bool]:
    """Returns the positions of the values, their labels unless they are numbers, and the scale."""
    if not all(isinstance(value, numbers.Real) for value in values):
        return list(range(len(values))), list(map(format_value, values)), False
    is_log = min(values) > 0 and max(values) > _LOG_SPAN * min(values)
    return list(map(float, values)), [], is_log


def _is_fraction(column: str) -> bool:
    return column.endswith("accuracy")


def _show_percent(axis: Any, column: str) -> None:
    if _is_fraction(column):
        axis.set_major_formatter("{x:.1%}")
