"""Defines the aims for speed and memory, and compares readings with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.readings import (
    EPOCH_CASE,
    Results,
    fastest_pytorch_sweep,
    matrix_products,
    readings,
    relative_flop_times,
    rows_of,
    steps_per_epoch,
)
from benchmarks.speedrun import CASE, EXAMPLE, RECIPE
from benchmarks.suites import EAGER, OURS, WARM_CACHE
from benchmarks.timing import Spread, speedup, spread

PROCESS_CASE = "whole process, T2, 5 epochs"
LINES_CASE = "1000 × T1, 200 epochs"
NETWORKS_CASE = "64 × T2 on digits, 29 steps"


class Target(NamedTuple):
    """An aim.

    Attributes:
      measure: what is measured, and against what.
      bound: the value to reach.
      at_least: whether `bound` is a minimum; otherwise it is a maximum.
      value: returns the measured value and its interval, or None if there are no readings.
      unit: unit of `bound` and of the value.
    """

    measure: str
    bound: float
    at_least: bool
    value: Callable[[Results], Spread | None]
    unit: str = "×"

    @property
    def aim(self) -> str:
        """The aim as text, for example "≥ 2 ×"."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g} {self.unit}"

    def reached(self, value: float) -> bool:
        """Returns whether a value reaches the aim."""
        return value >= self.bound if self.at_least else value <= self.bound

    def verdict(self, value: Spread) -> str:
        """Returns "reached", "missed", or which of the two the median does within the noise."""
        verb = "reached" if self.reached(value.median) else "missed"
        if self.reached(value.low) != self.reached(value.high):
            return f"within noise, median {verb}"
        return verb if verb == "reached" else f"**{verb}**"


def measured_targets(results: Results) -> Iterator[tuple[Target, Spread]]:
    """Yields the aims for the device that have readings, each with its measured value."""
    for target in CPU_TARGETS if results["machine"]["device"] == "cpu" else GPU_TARGETS:
        value = target.value(results)
        if value is not None:
            yield target, value


def _speedup_target(
    measure: str, bound: float, suite: str, case: str, peer: str, row: str = OURS
) -> Target:
    """Returns the aim that the peer needs at least `bound` times as much as jaxtrain's `row`."""

    def value(results: Results) -> Spread | None:
        ours = readings(results, suite, case, row)
        theirs = readings(results, suite, case, peer)
        return None if ours is None or theirs is None else speedup(ours, theirs)

    return Target(measure, bound, at_least=True, value=value)


def _sweep_target(measure: str, bound: float, case: str) -> Target:
    """Returns the aim that the fastest way in PyTorch needs `bound` times as long as jaxtrain."""

    def value(results: Results) -> Spread | None:
        ours, theirs = readings(results, "sweep", case, OURS), fastest_pytorch_sweep(results, case)
        return None if ours is None or theirs is None else speedup(ours, theirs["readings"])

    return Target(measure, bound, at_least=True, value=value)


def _epoch_over_products(results: Results) -> Spread | None:
    ours = readings(results, "models", EPOCH_CASE, OURS)
    bound = matrix_products(results, "models", EPOCH_CASE)
    return None if ours is None or bound is None else speedup(bound, ours)


def _largest_deviation(results: Results) -> Spread | None:
    times = relative_flop_times(results).values()
    largest = max((abs(time - 1) for time in times), default=None)
    return None if largest is None else Spread(*[100 * largest] * 3)


def _step_microseconds(results: Results) -> Spread | None:
    for row in rows_of(results, "models", EPOCH_CASE):
        if row["peer"] == OURS:
            scale = 1e6 / steps_per_epoch(row)
            return Spread(*(scale * seconds for seconds in spread(row["readings"])))
    return None


def _percent_of_product_rate(results: Results) -> Spread | None:
    ours = readings(results, "step", "wide, batch 4096", OURS)
    bound = matrix_products(results, "step", "wide, batch 4096")
    if ours is None or bound is None:
        return None
    return Spread(*(100 * ratio for ratio in speedup(ours, bound)))


def _speedrun_seconds(results: Results) -> Spread | None:
    ours = readings(results, "speedrun", CASE, OURS)
    return None if ours is None else spread(ours)


def _speedrun_accuracy(results: Results) -> Spread | None:
    for row in rows_of(results, "speedrun", CASE):
        if row["peer"] == OURS:
            return Spread(*[100 * statistics.mean(row["facts"]["accuracies"])] * 3)
    return None


CPU_TARGETS = (
    _speedup_target("epoch of T2 vs eager PyTorch", 2.6, "models", EPOCH_CASE, EAGER),
    _speedup_target("epoch of the CNN vs eager PyTorch", 1.2, "models", "CNN, batch 64", EAGER),
    _speedup_target("epoch of the CNN vs Flax NNX", 3, "models", "CNN, batch 64", "nnx"),
    _speedup_target(
        "epoch of the ResNet vs eager PyTorch", 1.2, "models", "ResNet, batch 64", EAGER
    ),
    _speedup_target("epoch of the LSTM vs eager PyTorch", 1, "models", "LSTM, batch 64", EAGER),
    _speedup_target("epoch of the ViT vs eager PyTorch", 1.3, "models", "ViT, batch 64", EAGER),
    _sweep_target("1000 runs of T1 vs the fastest way in PyTorch", 3, LINES_CASE),
    _sweep_target("64 T2 networks on digits vs the fastest way in PyTorch", 1.5, NETWORKS_CASE),
    _speedup_target(
        "whole process of T2, warm cache vs eager PyTorch",
        2.3,
        "run",
        PROCESS_CASE,
        EAGER,
        WARM_CACHE,
    ),
    _speedup_target(
        "one `train_step` vs one eager PyTorch step, T2, batch 64", 1.7, "step", EPOCH_CASE, EAGER
    ),
    _speedup_target(
        "epoch of T2 vs eager PyTorch, DataLoader", 3.5, "models", EPOCH_CASE, "pytorch-dataloader"
    ),
    _speedup_target(
        "epoch of T2 vs Keras 3 with `steps_per_execution`",
        1.4,
        "models",
        EPOCH_CASE,
        "keras-steps-per-execution",
    ),
    _speedup_target("epoch of T2 vs Flax NNX", 1.7, "models", EPOCH_CASE, "nnx"),
    _speedup_target("epoch of T2 vs Equinox", 2.0, "models", EPOCH_CASE, "equinox"),
    Target(
        "epoch of T2, in multiples of its matrix products alone",
        1.45,
        at_least=False,
        value=_epoch_over_products,
    ),
    _speedup_target("T1, 200 epochs vs eager PyTorch", 200, "run", "1 × T1, 200 epochs", EAGER),
    _speedup_target(
        "peak memory of T2, cold cache vs eager PyTorch", 1, "memory", PROCESS_CASE, EAGER
    ),
    _speedup_target(
        "peak memory of T2, cold cache vs eager PyTorch with uint8 pixels",
        1,
        "memory",
        PROCESS_CASE,
        "pytorch-pixels",
    ),
    Target(
        "MNIST speedrun: training on 2 cores",
        5,
        at_least=False,
        value=_speedrun_seconds,
        unit="s",
    ),
    Target(
        "MNIST speedrun: mean test accuracy of 20 seeds",
        99,
        at_least=True,
        value=_speedrun_accuracy,
        unit="%",
    ),
    _speedup_target("MNIST speedrun vs its recipe in eager PyTorch", 2, "speedrun", CASE, RECIPE),
    _speedup_target(
        "MNIST speedrun vs PyTorch's MNIST example, to its first epoch above 99 %",
        4,
        "speedrun",
        CASE,
        EXAMPLE,
    ),
    Target(
        "largest deviation of the time per FLOP from that of T2 at batch 64",
        15,
        at_least=False,
        value=_largest_deviation,
        unit="%",
    ),
)

GPU_TARGETS = (
    Target(
        "one step of `train_epoch`, batch 64",
        30,
        at_least=False,
        value=_step_microseconds,
        unit="µs",
    ),
    _speedup_target("epoch vs eager PyTorch, slicing", 15, "models", EPOCH_CASE, EAGER),
    _speedup_target(
        "epoch of T2 vs PyTorch CUDA graphs", 3, "models", EPOCH_CASE, "pytorch-cuda-graphs"
    ),
    _sweep_target("64 T2 networks on digits vs the fastest way in PyTorch", 1.5, NETWORKS_CASE),
    Target(
        "wide network, batch 4096: percentage of the FLOP/s of its matrix products alone",
        60,
        at_least=True,
        value=_percent_of_product_rate,
        unit="%",
    ),
)
