"""Reads the JSON results of the suites, and compares the readings of two peers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.race.estimates import Estimate, speedup

OURS = "jaxtrain"
EAGER = "pytorch"
WARM_CACHE = "jaxtrain, warm cache"
RECIPE = "pytorch, the same recipe"
EXAMPLE = "pytorch, its MNIST example"
# Ways to train with jaxtrain other than its main one, and loops by hand.
NO_LIBRARIES = ("jaxtrain-steps", "jaxtrain-numba", "jaxtrain-numba-steps", "jax-scan")

Results = dict[str, Any]
Row = dict[str, Any]


def load_all(folder: Path) -> dict[str, Results]:
    """Returns the results of each JSON file of the folder, by the file's stem in sorted order."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: json.loads(file.read_text()) for file in files}


def medians(results: Results, suite: str) -> dict[str, dict[str, float]]:
    """Returns the median of each peer that has readings, by case and peer."""
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        if row["suite"] == suite and row["readings"]:
            found.setdefault(row["case"], {})[row["peer"]] = statistics.median(row["readings"])
    return found


def find(results: Results, suite: str, case: str, peer: str) -> Row:
    """Returns the row of a peer that has readings."""
    return next(
        row
        for row in results["rows"]
        if (row["suite"], row["case"], row["peer"]) == (suite, case, peer) and row["readings"]
    )


def ratio_to_ours(results: Results, suite: str, case: str, peer: str, row: str = OURS) -> Estimate:
    """Returns the ratio of a peer's median to that of `row`, by default jaxtrain's."""
    ours, theirs = (find(results, suite, case, name)["readings"] for name in (row, peer))
    return speedup(ours, theirs)


def fastest(peers: dict[str, float], *, without: Sequence[str] = NO_LIBRARIES) -> str:
    """Returns the peer with the smallest median."""
    return min((name for name in peers if name not in without), key=peers.__getitem__)
