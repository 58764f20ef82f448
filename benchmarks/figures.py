"""Draws the ratios of an epoch, and has the colors of pictures."""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.peers import PEERS, label
from benchmarks.results import OURS, Results, medians, ratio_to_ours

# Those of Okabe and Ito, which color-blind readers can tell apart.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def epoch_ratios(results: Results) -> Figure | None:
    """Draws the time per epoch of each peer in multiples of jaxtrain's, one panel per network."""
    found = {case: each for case, each in medians(results, "models").items() if OURS in each}
    names = [name for name in PEERS if any(name in each for each in found.values())]
    names = [name for name in names if name != OURS]
    if not names:
        return None
    size = (3 + 1.9 * len(found), 1.3 + 0.32 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (case, each) in zip(panels, found.items(), strict=True):
        ax.axvline(1, color=BLUE, linestyle="--", linewidth=1, zorder=0)
        for place, name in enumerate(reversed(names)):
            if name in each:
                low, median, high = ratio_to_ours(results, "models", case, name)
                ax.plot([low, high], [place, place], color=GREY, linewidth=3)
                ax.plot(median, place, "o", color=GREEN if median > 1 else VERMILION)
                ax.annotate(f"{median:.2f}", (median, place), (0, 6), textcoords="offset points")
        ax.set_xscale("log", base=2)
        ax.margins(x=0.25)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_title(case.partition(",")[0])
    panels[0].set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    panels[0].set_ylim(-0.6, len(names) - 0.3)
    figure.supxlabel("time per epoch in multiples of jaxtrain's (dashed), 95 % interval", size=10)
    return figure
