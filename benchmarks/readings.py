"""Reads the JSON results of the suites and finds the readings of a row."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.suites import EAGER, OURS

EPOCH_CASE = "T2, batch 64"
PYTORCH_SWEEPS = (EAGER, "pytorch-batched", "pytorch-vmap")

Results = dict[str, Any]
Row = dict[str, Any]


def load_all(folder: Path) -> dict[str, Results]:
    """Returns the results of each JSON file of the folder, by the file's stem in sorted order."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: json.loads(file.read_text()) for file in files}


def rows_of(results: Results, suite: str, case: str | None = None) -> list[Row]:
    """Returns the rows of a suite, or of one of its cases, that have readings."""
    return [
        row
        for row in results["rows"]
        if row["suite"] == suite and row["readings"] and case in (None, row["case"])
    ]


def readings(results: Results, suite: str, case: str, peer: str) -> list[float] | None:
    """Returns the readings of one row, or None if there are none."""
    found = [row for row in rows_of(results, suite, case) if row["peer"] == peer]
    return found[0]["readings"] if found else None


def fastest_pytorch_sweep(results: Results, case: str) -> Row | None:
    """Returns the row of the fastest way to train many runs in PyTorch, or None."""
    rows = [row for row in rows_of(results, "sweep", case) if row["peer"] in PYTORCH_SWEEPS]
    return min(rows, key=lambda row: statistics.median(row["readings"]), default=None)


def matrix_products(results: Results, suite: str, case: str) -> list[float] | None:
    """Returns the readings of the fastest library that computes the matrix products alone."""
    rows = rows_of(results, suite, case)
    found = [row["readings"] for row in rows if row["facts"].get("products")]
    return min(found, key=statistics.median, default=None)


def steps_per_epoch(row: Row) -> int:
    """Returns the number of steps that one reading of a row covers; 1 in the suite `step`."""
    return -(-row["facts"]["examples"] // row["facts"]["batch_size"])


def relative_flop_times(results: Results) -> dict[str, float]:
    """Returns the seconds per FLOP of each case of `growth`, divided by those at batch 64."""
    times = {
        row["case"]: statistics.median(row["readings"]) / row["facts"]["flops"]
        for row in rows_of(results, "growth")
    }
    base = times.get("batch 64")
    return {} if base is None else {case: time / base for case, time in times.items()}


def slowdowns(results: Results) -> dict[str, tuple[float, str]]:
    """Returns jaxtrain's time over the fastest library's, and that library, by case.

    The cases are those of the suites `step` and `models`; ways to train with jaxtrain other than
    its main one, loops by hand and matrix products alone are no libraries.
    """
    found = {}
    for suite in ("step", "models"):
        medians: dict[str, dict[str, float]] = {}
        for row in rows_of(results, suite):
            if not row["facts"].get("products") and row["peer"] not in (
                "jaxtrain-steps",
                "jax-scan",
            ):
                name = f"{suite}: {row['case']}"
                medians.setdefault(name, {})[row["peer"]] = statistics.median(row["readings"])
        for name, seconds in medians.items():
            if OURS in seconds:
                fastest = min(seconds, key=seconds.__getitem__)
                found[name] = seconds[OURS] / seconds[fastest], fastest
    return found
