"""Draws the figures of the results: time and throughput of a step, and ratios of an epoch."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cases import MODELS
from benchmarks.peers import PEERS, label
from benchmarks.problem import FEATURES
from benchmarks.readings import Results, Row, readings, rows_of
from benchmarks.suites import EAGER, OURS
from benchmarks.timing import speedup, spread
from jaxtrain._files import write_atomically
from jaxtrain.cli import plots
from jaxtrain.cli.plots import Axes, Figure

COLORS = {
    OURS: plots.BLUE,
    EAGER: plots.VERMILION,
    "pytorch-compile": plots.ORANGE,
    "pytorch-cuda-graphs": plots.YELLOW,
    "nnx": plots.GREEN,
    "equinox": plots.PURPLE,
    "keras": plots.SKY,
}
MARKERS = dict(zip(COLORS, "osD^vP*", strict=True))


def draw(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Writes the figures for which there are readings, and returns their paths."""
    figures = {
        "step_time": _step_figure(results, throughput=False),
        "step_throughput": _step_figure(results, throughput=True),
        "epoch_ratios": _ratio_figure(results),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{prefix}{name}.png"
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=120)
            write_atomically(path, image.getvalue())
            written.append(path)
    return written


def _step_figure(results: Results, *, throughput: bool) -> Figure | None:
    """Draws time per step, or examples per second, against batch size, one panel per network."""
    rows = rows_of(results, "step")
    networks = [name for name in FEATURES if any(r["facts"]["network"] == name for r in rows)]
    if not networks:
        return None
    figure = Figure(figsize=(4.2 * len(networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for ax, network in zip(panels, networks, strict=True):
        of_network = [row for row in rows if row["facts"]["network"] == network]
        for name in dict.fromkeys(row["peer"] for row in of_network):
            if name in COLORS:
                _curve(ax, [row for row in of_network if row["peer"] == name], throughput)
        _curve(ax, _products(of_network), throughput, text="matrix products alone")
        ax.set_xscale("log", base=4)
        ax.set_yscale("log")
        ax.set_title("wide (4 × 1024)" if network == "wide" else network)
        unit = "examples per second" if throughput else "milliseconds per step"
        plots.label_axes(ax, "batch size", unit)
        sizes = sorted({row["facts"]["batch_size"] for row in of_network})
        ax.set_xticks(sizes, [str(size) for size in sizes])
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 4 if len(networks) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _products(rows: list[Row]) -> list[Row]:
    """Returns the row of the fastest matrix products for each batch size."""
    fastest: dict[int, Row] = {}
    for row in rows:
        if row["facts"]["products"]:
            size = row["facts"]["batch_size"]
            fastest[size] = min(fastest.get(size, row), row, key=_median)
    return list(fastest.values())


def _median(row: Row) -> float:
    return statistics.median(row["readings"])


def _curve(ax: Axes, rows: list[Row], throughput: bool, text: str | None = None) -> None:
    """Draws medians with quartiles; dotted and black if a text for the legend is given."""
    rows = sorted(rows, key=lambda row: row["facts"]["batch_size"])
    if not rows:
        return
    sizes = [row["facts"]["batch_size"] for row in rows]
    spreads = [spread(row["readings"]) for row in rows]
    low, median, high = (
        [
            size / seconds if throughput else 1e3 * seconds
            for size, seconds in zip(sizes, part, strict=True)
        ]
        for part in zip(*spreads, strict=True)
    )
    name = rows[0]["peer"]
    style: dict[str, Any] = (
        {"color": "black", "linestyle": ":", "marker": ".", "markersize": 4}
        if text
        else {"color": COLORS[name], "marker": MARKERS[name], "markersize": 4}
    )
    ax.plot(sizes, median, label=text or label(name), **style)
    ax.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _ratio_figure(results: Results) -> Figure | None:
    """Draws the time per epoch of each peer in multiples of jaxtrain's, one panel per network."""
    rows = [row for row in rows_of(results, "models") if not row["facts"].get("products")]
    names = [name for name in PEERS if any(row["peer"] == name != OURS for row in rows)]
    cases = {row["facts"]["network"]: row["case"] for row in rows if row["peer"] == OURS}
    if not names or not cases:
        return None
    networks = [network for network in MODELS if network in cases]
    size = (3 + 1.9 * len(networks), 1.3 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for ax, network in zip(panels, networks, strict=True):
        ours = readings(results, "models", cases[network], OURS)
        ax.axvline(1, color=plots.BLUE, linestyle="--", linewidth=1, zorder=0)
        for place, name in enumerate(reversed(names)):
            theirs = readings(results, "models", cases[network], name)
            if ours is None or theirs is None:
                continue
            low, median, high = speedup(ours, theirs)
            ax.plot([low, high], [place, place], color=plots.GREY, linewidth=3)
            ax.plot(median, place, "o", color=plots.GREEN if median > 1 else plots.VERMILION)
            ax.annotate(f"{median:.2f}", (median, place), (0, 6), textcoords="offset points")
        ax.set_xscale("log", base=2)
        ax.margins(x=0.25)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_title(network)
    panels[0].set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    panels[0].set_ylim(-0.6, len(names) - 0.3)
    figure.supxlabel("time per epoch in multiples of jaxtrain's (dashed), 95 % interval", size=10)
    return figure
