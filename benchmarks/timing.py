"""Contenders timed in turns in one process, and how sure their ratio is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

# A single reading lasts at least this long, so that waking threads and cold caches after the turn
# of another contender weigh little.
READING_SECONDS = 0.1


class Repeated(NamedTuple):
    """Work that is done `count` times at a call: `run(count)`."""

    run: Callable[[int], object]


Action = Callable[[], object] | Repeated


def in_turns(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action, A B C A B C …, after a warm-up of each that is not counted.

    A `Repeated` is called with the count that fills `READING_SECONDS`, and its reading divided.
    """
    counts = {name: _repetitions(action) for name, action in actions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(_reading(action, counts[name]) / counts[name])
    return seconds


def _repetitions(action: Action) -> int:
    """How many times to repeat an action at each reading; warms it up, too."""
    count, elapsed = 1, _reading(action, 1)
    if isinstance(action, Repeated):  # the first call may have compiled
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
    """Median and quartiles."""

    low: float
    median: float
    high: float


def spread(seconds: Sequence[float]) -> Spread:
    """Median and interquartile range of some readings."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return Spread(float(low), statistics.median(seconds), float(high))


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as long they take: ratio of medians with its 95 % bootstrap interval.

    Readings of the same round belong together and are drawn together (percentile bootstrap,
    Efron & Tibshirani, 1993). With fewer than two rounds the interval is the ratio itself.
    """
    ratio = statistics.median(theirs) / statistics.median(ours)
    if len(ours) < 2 or len(theirs) != len(ours):
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
