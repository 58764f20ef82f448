"""The closing tables of an experiment: its figures, beside the original's if there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from jaxtrain._terminal import make_console
from jaxtrain.callbacks.progress import accuracy_text as accuracy_text


class Comparison(NamedTuple):
    """A figure of a tutorial beside ours.

    Attributes:
      figure: name of the figure.
      original: the tutorial's value, or PyTorch's if the tutorial uses PyTorch.
      ours: jaxtrain's value.
      tolerance: largest difference allowed.
    """

    figure: str
    original: float
    ours: float
    tolerance: float = 1e-6

    @property
    def agrees(self) -> bool:
        """Whether ours is within the tolerance."""
        return bool(abs(self.ours - self.original) <= self.tolerance)


def comparison_rows(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, str, str]]:
    """Yields figure, original, ours and difference as text, with a mark if they disagree.

    Figures have two decimals more than their tolerance.
    """
    for row in comparisons:
        decimals = 2 if row.tolerance == 0 else max(0, math.ceil(-math.log10(row.tolerance))) + 2
        mark = "" if row.agrees else f"  ✗ more than {row.tolerance:g}"
        difference = f"{row.ours - row.original:+.1e}{mark}"
        yield row.figure, f"{row.original:.{decimals}f}", f"{row.ours:.{decimals}f}", difference


def print_comparisons(title: str, comparisons: Iterable[Comparison]) -> None:
    """Prints the table of figures, if there are any."""
    table = Table("figure", title=title, title_justify="left")
    for heading in ("original", "ours", "difference"):
        table.add_column(heading, justify="right")
    for row in comparison_rows(comparisons):
        table.add_row(*row)
    if table.row_count:
        make_console().print(table)


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints names and values on stdout."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    make_console().print(table)


def times(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rows of compiling and training of a table."""
    return {
        "compiling": f"{summary['compile_seconds']:.1f} s",
        "training": f"{summary['train_seconds']:.2f} s on {summary['device']}",
    }
