"""Pictures of a sweep: a line with a band, and a heat map."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from jaxtrain import _figures
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid
from jaxtrain.sweeps.result import mean_and_deviation

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


def line_plot(
    grid: Grid, column: str, values: np.ndarray, x: str | None, over: tuple[str, ...]
) -> _figures.Figure:
    """Draws the final values of a column against one axis, with a band over others."""
    x = x or next((name for name in grid.axes if name not in over), None)
    if x is None:
        raise InputError(
            f"over has all axes of the sweep ({', '.join(over)}); expected one axis to remain for x"
        )
    _check_axes(grid, (x,), over)
    xs, ticks, is_log = _scale(grid, x)
    lines: dict[tuple[tuple[str, int], ...], list[tuple[float, float, float]]] = {}
    for at, runs in grid.split(over):
        position = xs[at.pop(x)]
        mean, deviation, _ = mean_and_deviation(values.ravel()[runs])
        lines.setdefault(tuple(at.items()), []).append((position, mean, deviation))
    figure = _figures.Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for number, (rest, points) in enumerate(lines.items()):
        label = ", ".join(f"{name} {grid.labels[name][at]}" for name, at in rest)
        positions, means, deviations = np.array(sorted(points)).T
        color = _COLORS[number % len(_COLORS)]
        marker = "osDv^P"[(number + number // len(_COLORS)) % 6]  # another one for each color
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        ax.plot(positions, means, label=label or None, **style)
        if over:
            lower, upper = means - deviations, means + deviations
            ax.fill_between(positions, lower, upper, color=color, alpha=0.2)
    if is_log:
        ax.set_xscale("log")
    if ticks:
        ax.set_xticks(xs, labels=ticks)
    if any(lines):
        ax.legend(fontsize=8)
    band = f", mean ± standard deviation over {', '.join(over)}" if over else ""
    _figures.label_axes(ax, x.replace("_", " "), column.replace("_", " "))
    _show_percent(ax.yaxis, column)
    figure.suptitle(f"{column.replace('_', ' ')}{band}", fontsize=11)
    return figure


def heat_map(
    grid: Grid,
    column: str,
    values: np.ndarray,
    x: str | None,
    y: str | None,
    over: tuple[str, ...],
) -> _figures.Figure:
    """Draws the final values of a column over two axes, averaged over others."""
    names = ", ".join(grid.axes)
    if grid.zipped and len(grid.axes) > 1:
        raise InputError(f"the sweep's axes {names} are zipped; expected a product of two axes")
    if len(grid.axes) < 2:
        raise InputError(
            f"the sweep has the axis {names}; expected two axes for a heat map; line_plot draws one"
        )
    _check_axes(grid, tuple(name for name in (x, y) if name), over)
    free = [name for name in grid.axes if name not in (x, y, *over)]
    missing = [x, y].count(None)
    if len(free) < missing or (over and len(free) > missing):
        raise InputError(
            f"over has {', '.join(over) or 'no axis'} of {names}; expected all axes but two",
            argument="over",
        )
    y = y or free.pop(0)
    x = x or free.pop(0)
    over = over or tuple(free)
    cells = [(at[y], at[x], values.ravel()[runs]) for at, runs in grid.split(over)]
    rows, columns = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    image = np.empty((len(rows), len(columns)))
    for row, at, found in cells:
        image[rows.index(row), columns.index(at)] = mean_and_deviation(found)[0]
    size = (2.6 + max(3.0, 0.75 * len(columns)), 1.8 + max(1.6, 0.42 * len(rows)))
    figure = _figures.Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    drawn = ax.imshow(image, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(columns)), labels=[grid.labels[x][at] for at in columns])
    ax.set_yticks(range(len(rows)), labels=[grid.labels[y][at] for at in rows])
    low, high = (0.0, 1.0) if np.isnan(image).all() else (np.nanmin(image), np.nanmax(image))
    digits = ".2%" if _is_fraction(column) else ".3g"
    for (row, at), value in np.ndenumerate(image):
        text = "diverged" if np.isnan(value) else f"{value:{digits}}"
        color = "white" if value < (low + high) / 2 else "black"
        ax.text(at, row, text, ha="center", va="center", fontsize=8, color=color)
    _figures.label_axes(ax, x.replace("_", " "), y.replace("_", " "), grid=False)
    bar = figure.colorbar(drawn, ax=ax, label=column.replace("_", " "))
    _show_percent(bar.ax.yaxis, column)
    mean = f", mean over {', '.join(over)}" if over else ""
    figure.suptitle(f"{column.replace('_', ' ')}{mean}", fontsize=11)
    return figure


def _check_axes(grid: Grid, names: tuple[str, ...], over: tuple[str, ...]) -> None:
    for name in names:
        if name not in grid.axes or name in over:
            rest = ", ".join(each for each in grid.axes if each not in over)
            besides = f" besides {', '.join(over)}" if over else ""
            raise InputError(f"the sweep has no axis {name!r}{besides}; expected one of {rest}")


def _scale(grid: Grid, x: str) -> tuple[list[float], list[str], bool]:
    """Returns the positions of the values, their labels unless they are numbers, and the scale."""
    values = grid.axes[x]
    if not all(isinstance(value, numbers.Real) for value in values):
        return list(range(len(values))), list(grid.labels[x]), False
    is_log = min(values) > 0 and max(values) > _LOG_SPAN * min(values)
    return list(map(float, values)), [], is_log


def _is_fraction(column: str) -> bool:
    return column.endswith("accuracy")


def _show_percent(axis: Any, column: str) -> None:
    if _is_fraction(column):
        axis.set_major_formatter("{x:.1%}")
