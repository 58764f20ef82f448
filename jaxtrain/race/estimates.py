"""Medians, ratios and their intervals, from readings that were taken in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Fewer readings give no interval.
_MIN_ROUNDS = 5


class Estimate(NamedTuple):
    """A median, or a ratio of medians, with an interval of about 95 %."""

    low: float
    median: float
    high: float


def median_of(readings: Sequence[float]) -> Estimate:
    """Returns the median with a bootstrap interval of about 95 %."""
    return _estimate(np.asarray([readings]))


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Returns the ratio of medians, theirs over ours, with an interval of about 95 %.

    The readings of a round are resampled as a pair (percentile bootstrap, Efron & Tibshirani,
    1993). Fewer than five rounds have no interval: its ends are the ratio.
    """
    if len(ours) != len(theirs):
        ratio = statistics.median(theirs) / statistics.median(ours)
        return Estimate(ratio, ratio, ratio)
    return _estimate(np.asarray([theirs, ours]))


def _estimate(readings: np.ndarray) -> Estimate:
    """Returns the median of the first row, divided by that of the second if there is one."""

    def value(medians: np.ndarray) -> Any:
        return medians[0] / medians[1] if len(medians) > 1 else medians[0]

    median, count = float(value(np.median(readings, axis=1))), readings.shape[1]
    if count < _MIN_ROUNDS:
        return Estimate(median, median, median)
    rounds = np.random.default_rng(0).integers(0, count, (2000, count))
    resampled = value(np.median(readings[:, rounds], axis=2))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(low), median, float(high))


def break_even_steps(ours: tuple[float, float], theirs: tuple[float, float]) -> float:
    """Returns from which number of steps on we are ahead, compilation included.

    Args:
      ours: our seconds of compiling and per step.
      theirs: those that we are compared with.

    Returns:
      The smallest n ≥ 0 with c + n t ≤ c' + n t', for all greater n as well; infinite if there is
      none.
    """
    late, gain = ours[0] - theirs[0], theirs[1] - ours[1]
    if gain <= 0:
        return 0.0 if late <= 0 and gain == 0 else math.inf
    return float(max(0, math.ceil(late / gain)))
