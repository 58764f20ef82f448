"""matplotlib's figures, imported without a display, and the style of all pictures.

The colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which color-blind
readers can tell apart; line styles and markers also differ, for printing in grey.
"""

from __future__ import annotations

import io
from typing import Any

from jaxtrain._extras import needs_extra

with needs_extra("experiments"):
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import PercentFormatter as PercentFormatter

_DPI = 120
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
ORANGE, SKY, PURPLE, YELLOW = "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"


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
