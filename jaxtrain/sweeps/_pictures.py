"""Pictures of a sweep: a line with a band, and a heat map."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from jaxtrain import _figures
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid

_COLORS = (
    *(_figures.BLUE, _figures.VERMILION, _figures.GREEN),
    *(_figures.ORANGE, _figures.PURPLE, _figures.SKY),
)


def line_plot(grid: Grid, groups: Any, x: str | None, over: tuple[str, ...]) -> _figures.Figure:
    """Draws final values, grouped by the axes that are not in `over`, against one of them."""
    x = x or next((name for name in grid.axes if name not in over), None)
    if x is None:
        raise InputError(
            f"over has all axes of the sweep ({', '.join(over)}); expected one axis to remain for x"
        )
    _check_axes(grid, (x,), over)
    xs, ticks, is_log = _scale(grid, x)
    figure = _figures.Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    points = groups.agg(["mean", "std"]).fillna({"std": 0}).reset_index()
    rest = [name for name in grid.axes if name not in (x, *over)]
    lines = points.groupby(rest, sort=False) if rest else [((), points)]
    for number, (at, line) in enumerate(lines):
        label = ", ".join(f"{n} {grid.labels[n][i]}" for n, i in zip(rest, at, strict=True))
        line = line.assign(x=[xs[position] for position in line[x]]).sort_values("x")
        color = _COLORS[number % len(_COLORS)]
        marker = "osDv^P"[(number + number // len(_COLORS)) % 6]  # another one for each color
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        ax.plot(line["x"], line["mean"], label=label or None, **style)
        if over:
            band = line["mean"] - line["std"], line["mean"] + line["std"]
            ax.fill_between(line["x"], *band, color=color, alpha=0.2)
    if is_log:
        ax.set_xscale("log")
    if ticks:
        ax.set_xticks(xs, labels=ticks)
    if rest:
        ax.legend(fontsize=8)
    column = _words(groups.obj.name)
    band_title = f", mean ± standard deviation over {', '.join(over)}" if over else ""
    _figures.label_axes(ax, _words(x), column)
    _show_percent(ax.yaxis, column)
    figure.suptitle(column + band_title, fontsize=11)
    return figure


def heat_map_axes(
    grid: Grid, x: str | None, y: str | None, over: tuple[str, ...]
) -> tuple[str, str, tuple[str, ...]]:
    """Returns x, y and the axes to average over, where they are not given."""
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
    return x, y, over or tuple(free)


def heat_map(grid: Grid, groups: Any, x: str, y: str, over: tuple[str, ...]) -> _figures.Figure:
    """Draws final values, grouped by x and y, in a field of colors and numbers."""
    column = _words(groups.obj.name)
    means = groups.agg(["mean"])["mean"].unstack(x).sort_index()
    image = means.to_numpy()
    size = (2.6 + max(3.0, 0.75 * image.shape[1]), 1.8 + max(1.6, 0.42 * image.shape[0]))
    figure = _figures.Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    drawn = ax.imshow(image, cmap="viridis", aspect="auto")
    ax.set_xticks(range(image.shape[1]), labels=[grid.labels[x][at] for at in means.columns])
    ax.set_yticks(range(image.shape[0]), labels=[grid.labels[y][at] for at in means.index])
    low, high = (0.0, 1.0) if np.isnan(image).all() else (np.nanmin(image), np.nanmax(image))
    digits = ".2%" if _figures.is_fraction(column) else ".3g"
    for (row, at), value in np.ndenumerate(image):
        text = "diverged" if np.isnan(value) else f"{value:{digits}}"
        color = "white" if value < (low + high) / 2 else "black"
        ax.text(at, row, text, ha="center", va="center", fontsize=8, color=color)
    _figures.label_axes(ax, _words(x), _words(y), grid=False)
    bar = figure.colorbar(drawn, ax=ax, label=column)
    _show_percent(bar.ax.yaxis, column)
    mean = f", mean over {', '.join(over)}" if over else ""
    figure.suptitle(column + mean, fontsize=11)
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
    is_log = min(values) > 0 and max(values) > _figures.LOG_SPAN * min(values)
    return list(map(float, values)), [], is_log


def _words(name: str) -> str:
    return name.replace("_", " ")


def _show_percent(axis: Any, column: str) -> None:
    if _figures.is_fraction(column):
        axis.set_major_formatter("{x:.1%}")
