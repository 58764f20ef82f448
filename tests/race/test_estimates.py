"""Ratios with intervals, and the number of steps after which one side is ahead."""

from __future__ import annotations

import math
import statistics

import pytest

from jaxtrain.race.estimates import break_even_steps, median_of, speedup


def test_speedup_is_the_ratio_of_medians_with_a_paired_interval() -> None:
    ours, noisy = [1.0, 1.1, 0.9, 1.05, 0.95], [2.0, 2.5, 1.5, 2.2, 1.8]
    low, ratio, high = speedup(ours, noisy)
    assert ratio == statistics.median(noisy) / statistics.median(ours)
    assert low < ratio < high
    # Noise that both share in a round cancels.
    drift = [1.0, 3.0, 1.0, 3.0, 1.0]
    assert speedup(drift, [2 * each for each in drift]) == (2, 2, 2)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0] * 4, [2.0, 3.0] * 2), ([1.0], [2.5] * 5)])
def test_few_or_unpaired_rounds_have_no_interval(ours: list[float], theirs: list[float]) -> None:
    assert speedup(ours, theirs) == (2.5, 2.5, 2.5)


def test_the_interval_of_a_median_lies_among_the_readings() -> None:
    readings = [5.0, 1.0, 3.0, 2.0, 4.0]
    low, median, high = median_of(readings)
    assert (low, median, high) == (1, 3, 5)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        ((10.0, 1.0), (0.0, 2.0), 10),  # 10 + n = 2 n
        ((10.0, 1.0), (1.0, 3.0), 5),  # 10 + n ≤ 1 + 3 n from n = 4.5 on
        ((1.0, 1.0), (4.0, 2.0), 0),  # ahead from the start
        ((1.0, 2.0), (4.0, 1.0), math.inf),  # ahead at first alone
        ((1.0, 1.0), (0.0, 1.0), math.inf),
        ((0.0, 1.0), (1.0, 1.0), 0),
    ],
)
def test_break_even_steps_count_compilation(
    ours: tuple[float, float], theirs: tuple[float, float], steps: float
) -> None:
    assert break_even_steps(ours, theirs) == steps
