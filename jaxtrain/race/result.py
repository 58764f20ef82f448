"""The result of a race: a row per contender, as data and as a table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain._files import output_path, write_atomically
from jaxtrain._json import to_json
from jaxtrain.race.estimates import Estimate, break_even_steps, median_of, speedup
from jaxtrain.race.machine import machine_line

EAGER = "eager PyTorch"
# Rounds that differ by more than this fraction of their median, and this many cores that others
# have kept busy, are reported.
_SPREAD, _OTHERS = 0.25, 0.1


@dataclasses.dataclass(frozen=True)
class Row:
    """What one contender takes.

    Attributes:
      contender: its name.
      milliseconds: milliseconds per step, the median over the rounds.
      speedup: speedup over eager PyTorch.
      compile_seconds: extra time of the first pass, plus model construction, in the first round.
      peak_mib: peak memory of the process in MiB, the median over the rounds.
      break_even_steps: the number of steps from which it is ahead of eager PyTorch, compilation
        included; infinite if it never is.
      readings: milliseconds per step of each round.
      missing: the reason why there are no numbers, else None.
    """

    contender: str
    milliseconds: Estimate | None = None
    speedup: Estimate | None = None
    compile_seconds: float | None = None
    peak_mib: float | None = None
    break_even_steps: float | None = None
    readings: tuple[float, ...] = ()
    missing: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Race:
    """Which side trains a module faster; prints as a table.

    Attributes:
      rows: one per contender, with its `contender` name; `milliseconds` per step, and `speedup`
        over eager PyTorch, each with the fields `low`, `median` and `high`, an interval of about
        95 % (of five rounds or more; otherwise all are the median); `compile_seconds`, the extra
        time of the first pass, plus model construction; `peak_mib`, the peak memory of the process;
        `break_even_steps`, from which it is ahead of eager PyTorch with compilation included, or
        infinite; `readings`, the milliseconds per step of each round; and `missing`, the reason
        why there are no numbers, else None.
      title: what was trained.
      notes: how PyTorch was set up, how far the losses agree, and what disturbed the race.
      machine: processor, versions and flags.
      complete: whether all rounds were made; False after Ctrl-C.
    """

    rows: tuple[Row, ...]
    title: str
    notes: tuple[str, ...]
    machine: Mapping[str, Any]
    complete: bool = True

    @property
    def speedups(self) -> dict[str, float]:
        """The speedup of each contender over eager PyTorch."""
        return {row.contender: row.speedup.median for row in self.rows if row.speedup is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON; an infinite number becomes null."""
        found = dataclasses.asdict(self)
        for row in found["rows"]:
            for name, value in row.items():
                row[name] = value._asdict() if isinstance(value, Estimate) else value
        text = json.dumps(to_json(found), indent=1) + "\n"
        write_atomically(output_path(path), text.encode())

    def __str__(self) -> str:
        headings = (
            "",
            "ms per step (95 %)",
            "compile s",
            "peak MiB",
            "speedup (95 %)",
            "break-even",
        )
        table = [headings, *(_cells(row) for row in self.rows if row.missing is None)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        missing = [
            f"{row.contender}: no numbers: {row.missing}" for row in self.rows if row.missing
        ]
        notes = [*self.notes, machine_line(dict(self.machine))]
        wrapped = [textwrap.fill(note, 96, subsequent_indent="  ") for note in (*missing, *notes)]
        return "\n".join([self.title, "", *lines, "", *wrapped])

    __repr__ = __str__


def make_rows(
    names: Sequence[str],
    readings: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Mapping[str, str],
    steps: int,
) -> tuple[Row, ...]:
    """Returns the rows of contenders.

    Args:
      names: the contenders, in the order of the rows.
      readings: what `measure` returned in each round.
      failed: the reasons of those that are left out.
      steps: steps per pass.
    """
    seconds = {name: [x["seconds"] / steps for x in each] for name, each in readings.items()}

    def costs(name: str) -> tuple[float, float]:
        """Returns the seconds of compiling and per step."""
        first = readings[name][0]
        return first["compile_seconds"] + first["making_seconds"], median_of(seconds[name]).median

    def make(name: str) -> Row:
        if name not in readings:
            return Row(name, missing=failed.get(name, "not measured yet"))
        compiling, _ = costs(name)
        is_measured = EAGER in readings
        return Row(
            name,
            median_of([1000 * x for x in seconds[name]]),
            speedup(seconds[name], seconds[EAGER]) if is_measured else None,
            compiling,
            median_of([x["peak_mib"] for x in readings[name]]).median,
            break_even_steps(costs(name), costs(EAGER)) if is_measured else None,
            tuple(1000 * x for x in seconds[name]),
        )

    return tuple(map(make, names))


def disturbances(rows: Sequence[Row], others: float | None) -> str:
    """Returns a sentence about what disturbed a race.

    Args:
      rows: the rows.
      others: how many cores other processes kept busy on average; None if it was not measured.
    """
    found = []
    if others is not None and others > _OTHERS:
        found.append(f"other processes kept {others:.1f} cores busy on average")
    for row in rows:
        if row.milliseconds is not None:
            spread = (max(row.readings) - min(row.readings)) / row.milliseconds.median
            if spread > _SPREAD:
                found.append(f"rounds of {row.contender} differ by {spread:.0%}")
    unknown = ["the load of other processes"] * (others is None)
    unknown += ["how much rounds differ"] * all(len(row.readings) < 2 for row in rows)
    sentences = [f"The machine was disturbed: {', '.join(found)}."] if found else []
    if unknown:
        sentences.append(f"Not measured: {', '.join(unknown)}.")
    return " ".join(sentences) or "Nothing disturbed the machine noticeably."


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contender,
        _with_interval(row.milliseconds),
        f"{row.compile_seconds:.1f}",
        f"{row.peak_mib:.0f}",
        "" if row.contender == EAGER else _with_interval(row.speedup),
        "" if row.contender == EAGER else _after(row.break_even_steps),
    )


def number(value: float) -> str:
    """Returns a number with three digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _after(steps: float | None) -> str:
    if steps is None:
        return ""
    return "never" if math.isinf(steps) else f"after {steps:,.0f} steps"


def _with_interval(value: Estimate | None) -> str:
    if value is None:
        return ""
    low, median, high = map(number, value)
    return median if value.low == value.high else f"{median} ({low}–{high})"
