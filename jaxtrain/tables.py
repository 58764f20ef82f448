"""The closing tables of an experiment: its figures, beside the original's where there are some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Comparison(NamedTuple):
    """A figure of a tutorial beside ours.

    Attributes:
      figure: what it is.
      original: the tutorial's, or PyTorch's where the tutorial runs it.
      ours: the same from jaxtrain.
      tolerance: how far apart they may be.
    """

    figure: str
    original: float
    ours: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether ours is within the tolerance."""
        return abs(self.ours - self.original) <= self.tolerance


def comparison_rows(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, str, str]]:
    """Figure, original, ours and difference as text, with a mark where they disagree."""
    for row in comparisons:
        mark = "" if row.agrees else f"  ✗ more than {row.tolerance:g}"
        difference = f"{row.ours - row.original:+.1e}{mark}"
        yield row.figure, f"{row.original:.10g}", f"{row.ours:.10g}", difference


def print_comparisons(title: str, comparisons: Iterable[Comparison], output_dir: Path) -> None:
    """Print the table of figures, if any, on stdout, and as the last line where the results are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for heading in ("original", "ours", "difference"):
        table.add_column(heading, justify="right")
    for row in comparison_rows(comparisons):
        table.add_row(*row)
    if table.row_count:
        Console(highlight=False).print(table)
    print(f"results: {output_dir}")


def print_summary(title: str, rows: Mapping[str, str], output_dir: Path) -> None:
    """Print the closing table on stdout, and as the last line where the results are."""
    print_table(title, rows)
    print(f"results: {output_dir}")


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print names and values on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
