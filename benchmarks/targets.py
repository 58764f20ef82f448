"""Defines the aims for speed and memory, and compares readings with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.readings import (
    EAGER,
    EPOCH_CASE,
    JAXTRAIN,
    WARM_CACHE,
    Results,
    lower_bound,
    readings,
    relative_flop_times,
    rows_of,
    steps_per_epoch,
)
from benchmarks.timing import Spread, speedup, spread

PROCESS_CASE = "whole process, T2, 5 epochs"
MEMORY_CASE = "whole process, T2, 2 epochs"


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
    measure: str, bound: float, suite: str, case: str, peer: str, row: str = JAXTRAIN
) -> Target:
    """Returns the aim that the peer needs at least `bound` times as much as jaxtrain's `row`."""

    def value(results: Results) -> Spread | None:
        ours = readings(results, suite, case, row)
        theirs = readings(results, suite, case, peer)
        return None if ours is None or theirs is None else speedup(ours, theirs)

    return Target(measure, bound, at_least=True, value=value)


def _epoch_over_lower_bound(results: Results) -> Spread | None:
    ours = readings(results, "epoch", EPOCH_CASE, JAXTRAIN)
    bound = lower_bound(results, "epoch", EPOCH_CASE)
    return None if ours is None or bound is None else speedup(bound, ours)


def _largest_deviation(results: Results) -> Spread | None:
    times = relative_flop_times(results).values()
    largest = max((abs(time - 1) for time in times), default=None)
    return None if largest is None else Spread(*[100 * largest] * 3)


def _step_microseconds(results: Results) -> Spread | None:
    for row in rows_of(results, "epoch", EPOCH_CASE):
        if row["peer"] == JAXTRAIN:
            scale = 1e6 / steps_per_epoch(row)
            return Spread(*(scale * seconds for seconds in spread(row["readings"])))
    return None


def _percent_of_product_rate(results: Results) -> Spread | None:
    ours = readings(results, "step", "wide, batch 4096", JAXTRAIN)
    bound = lower_bound(results, "step", "wide, batch 4096")
    if ours is None or bound is None:
        return None
    return Spread(*(100 * ratio for ratio in speedup(ours, bound)))


CPU_TARGETS = (
    _speedup_target(
        "one `train_step` vs one eager PyTorch step, T2, batch 64", 1.7, "step", EPOCH_CASE, EAGER
    ),
    _speedup_target("epoch vs eager PyTorch, slicing", 2.3, "epoch", EPOCH_CASE, EAGER),
    _speedup_target(
        "epoch vs eager PyTorch, DataLoader", 3.5, "epoch", EPOCH_CASE, "pytorch-dataloader"
    ),
    _speedup_target("epoch vs Keras 3 on JAX", 1.4, "epoch", EPOCH_CASE, "keras"),
    _speedup_target("epoch vs Flax NNX", 1.7, "epoch", EPOCH_CASE, "nnx"),
    _speedup_target("epoch vs Equinox", 2.0, "epoch", EPOCH_CASE, "equinox"),
    Target(
        "epoch, in multiples of its lower bound",
        1.45,
        at_least=False,
        value=_epoch_over_lower_bound,
    ),
    _speedup_target("T1, 200 epochs vs eager PyTorch", 200, "run", "1 × T1, 200 epochs", EAGER),
    _speedup_target(
        "1000 runs of T1 in one call vs 1000 runs in eager PyTorch",
        1500,
        "sweep",
        "1000 × T1, 200 epochs",
        EAGER,
    ),
    _speedup_target(
        "whole process, 5 epochs, warm cache vs eager PyTorch, slicing",
        2,
        "run",
        PROCESS_CASE,
        EAGER,
        WARM_CACHE,
    ),
    _speedup_target(
        "whole process, 5 epochs, warm cache vs eager PyTorch, DataLoader",
        2,
        "run",
        PROCESS_CASE,
        "pytorch-dataloader",
        WARM_CACHE,
    ),
    _speedup_target(
        "peak memory, 2 epochs, cold cache vs eager PyTorch", 1, "memory", MEMORY_CASE, EAGER
    ),
    _speedup_target(
        "peak memory, 2 epochs, cold cache vs eager PyTorch with uint8 pixels",
        1,
        "memory",
        MEMORY_CASE,
        "pytorch-pixels",
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
    _speedup_target("epoch vs eager PyTorch, slicing", 15, "epoch", EPOCH_CASE, EAGER),
    _speedup_target("epoch vs PyTorch CUDA graphs", 3, "epoch", EPOCH_CASE, "pytorch-cuda-graphs"),
    _speedup_target(
        "64 MNIST networks in one call vs one after another in eager PyTorch",
        40,
        "sweep",
        "64 × T2 network, 100 steps",
        EAGER,
    ),
    Target(
        "wide network, batch 4096: percentage of the FLOP/s of its matrix products alone",
        60,
        at_least=True,
        value=_percent_of_product_rate,
        unit="%",
    ),
)
