"""Times actions in interleaved rounds, and estimates ratios with their intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain._extras import needs_extra

with needs_extra("bench"):
    import scipy.stats

# Least duration of a reading, so that threads to wake and caches to refill after another action
# matter little.
READING_SECONDS = 0.1
# Fewer readings give no interval.
MIN_ROUNDS = 5


class Repeated(NamedTuple):
    """An action that one call `run(count)` repeats `count` times."""

    run: Callable[[int], object]


Action = Callable[[], object] | Repeated


def time_interleaved(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each action in each round, in the order A B C A B C.

    Each action is called at least once before the first round. A `Repeated` action runs as often
    as `READING_SECONDS` requires, and its reading is divided by that count.
    """
    counts = {name: _repetitions(action) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(_reading(action, counts[name]) / counts[name])
    return seconds


def _repetitions(action: Action) -> int:
    """Warms an action up, and returns how often each reading repeats it."""
    count, elapsed = 1, _reading(action, 1)
    if isinstance(action, Repeated):  # the first call may include compilation
        elapsed = _reading(action, 1)
    while isinstance(action, Repeated) and elapsed < READING_SECONDS:
        count = max(count + 1, int(count * min(10.0, 1.2 * READING_SECONDS / elapsed)))
        elapsed = _reading(action, count)
    return count


def _reading(action: Action, count: int) -> float:
    started = time.perf_counter()
    if isinstance(action, Repeated):
        action.run(count)
    else:
        action()
    return time.perf_counter() - started


class Spread(NamedTuple):
    """A median with an interval: the quartiles, or a confidence interval."""

    low: float
    median: float
    high: float


def spread(seconds: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of the readings."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return Spread(float(low), statistics.median(seconds), float(high))


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Returns the ratio of medians, theirs over ours, with its 95 % bootstrap interval.

    The readings of a round are resampled as a pair (percentile bootstrap, Efron & Tibshirani,
    1993). Fewer than five rounds have no interval: its ends are the ratio.
    """
    ratio = statistics.median(theirs) / statistics.median(ours)
    if min(len(ours), len(theirs)) < MIN_ROUNDS or len(theirs) != len(ours):
        return Spread(ratio, ratio, ratio)
    interval = scipy.stats.bootstrap(
        (theirs, ours),
        lambda theirs, ours, axis: np.median(theirs, axis) / np.median(ours, axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Spread(float(interval.low), ratio, float(interval.high))
