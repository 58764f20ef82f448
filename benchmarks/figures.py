"""Draws the figures of the results: time and throughput of a step, and ratios of an epoch."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.problem import NETWORKS
from benchmarks.readings import EAGER, EPOCH_CASE, JAXTRAIN, Results, Row, readings, rows_of
from benchmarks.timing import speedup, spread
from jaxtrain._files import write_atomically
from jaxtrain.cli import plots
from jaxtrain.cli.plots import Axes, Figure

COLORS = {
    JAXTRAIN: plots.BLUE,
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
    networks = [name for name in NETWORKS if any(r["facts"]["network"] == name for r in rows)]
    if not networks:
        return None
    figure = Figure(figsize=(4.2 * len(networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for ax, network in zip(panels, networks, strict=True):
        of_network = [row for row in rows if row["facts"]["network"] == network]
        for name in dict.fromkeys(row["peer"] for row in of_network):
            if name in COLORS:
                _curve(ax, [row for row in of_network if row["peer"] == name], throughput)
        _curve(ax, _lower_bounds(of_network), throughput, label="matrix products (lower bound)")
        ax.set_xscale("log", base=4)
        ax.set_yscale("log")
        ax.set_title("wide (4 × 1024)" if network == "wide" else network)
        unit = "examples per second" if throughput else "milliseconds per step"
        plots.label_axes(ax, "batch size", unit)
        sizes = sorted({row["facts"]["batch_size"] for row in of_network})
        ax.set_xticks(sizes, [str(size) for size in sizes])
    # torch.compile is timed with T2 alone: its panel has every label.
    handles, labels = panels[min(1, len(networks) - 1)].get_legend_handles_labels()
    columns = 4 if len(networks) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _lower_bounds(rows: list[Row]) -> list[Row]:
    """Returns the row of the fastest matrix products for each batch size."""
    fastest: dict[int, Row] = {}
    for row in rows:
        if row["facts"]["floor"]:
            size = row["facts"]["batch_size"]
            fastest[size] = min(fastest.get(size, row), row, key=_median)
    return list(fastest.values())


def _median(row: Row) -> float:
    return statistics.median(row["readings"])


def _curve(ax: Axes, rows: list[Row], throughput: bool, label: str | None = None) -> None:
    """Draws medians with quartiles; dotted and black if a label is given (the lower bound)."""
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
        if label
        else {"color": COLORS[name], "marker": MARKERS[name], "markersize": 4}
    )
    ax.plot(sizes, median, label=label or PEERS[name].label, **style)
    ax.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _ratio_figure(results: Results) -> Figure | None:
    """Draws the time per epoch of each peer in multiples of jaxtrain's, with its interval."""
    ours = readings(results, "epoch", EPOCH_CASE, JAXTRAIN)
    rows = [row for row in rows_of(results, "epoch", EPOCH_CASE) if row["peer"] != JAXTRAIN]
    if ours is None or not rows:
        return None
    ratios = {row["peer"]: speedup(ours, row["readings"]) for row in rows}
    ratios = dict(sorted(ratios.items(), key=lambda item: item[1].median))
    bounds = {row["peer"] for row in rows if row["facts"]["floor"]}
    figure = Figure(figsize=(7, 1.1 + 0.36 * len(ratios)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(1, color=plots.BLUE, linestyle="--", linewidth=1, zorder=0)
    for place, (name, (low, median, high)) in enumerate(ratios.items()):
        ax.plot([low, high], [place, place], color=plots.GREY, linewidth=3)
        color, fill = ("black", "none") if name in bounds else (plots.VERMILION, "full")
        ax.plot(median, place, "o", color=color, fillstyle=fill)
        ax.annotate(
            f"{median:.2f} ×",
            (high, place),
            (6, -3),
            textcoords="offset points",
            bbox={"color": "white", "pad": 0.5},
        )
    ax.set_title("dashed line: jaxtrain; hollow: matrix products alone (lower bound)", fontsize=9)
    labels = [PEERS[name].label if name in PEERS else name for name in ratios]
    ax.set_yticks(range(len(ratios)), labels)
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    ax.set_xlim(0, 1.15 * max(high for _, _, high in ratios.values()))
    plots.label_axes(ax, "time per epoch in multiples of jaxtrain's (95 % interval)", "")
    return figure
