"""What a process measures of one trainer: seconds, updates, losses and peak memory.

It imports no library that is measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Timed sections per process, after a pass that warms up. A reading is their median.
SECTIONS = 3
# Minimum duration of a section when `passes` is None, so that waking threads and refilling caches
# matter little.
SECTION_SECONDS = 0.1


@runtime_checkable
class Trainer(Protocol):
    """Trains one network on data that it holds; each method waits until the device has finished."""

    def train(self, passes: int) -> Any:
        """Makes passes over the data; returns the losses of the last one, or None."""

    def losses(self) -> np.ndarray:
        """Makes a pass, and returns the loss of each step."""

    def updates(self) -> int:
        """Returns how many updates have been made."""


def timed(function: Callable[..., object], *arguments: Any) -> float:
    """Returns the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def time_sections(
    train: Callable[[int], Any], passes: int | None = None
) -> tuple[dict[str, float], int, list[float]]:
    """Times sections of passes.

    Args:
      train: makes as many passes as its argument says; returns the losses of the last or None.
      passes: passes per section; None for as many as take `SECTION_SECONDS`.

    Returns:
      The seconds of a pass and of compiling, the number of passes, and the mean loss at the end of
      each section, if `train` returns losses.
    """
    first, made = timed(train, 1), 1
    if passes is None:
        passes, made = max(1, int(SECTION_SECONDS / timed(train, 1))), 2
    seconds, ends = [], []
    for _ in range(SECTIONS):
        started = time.perf_counter()
        losses = train(passes)
        seconds.append((time.perf_counter() - started) / passes)
        made += passes
        if losses is not None:
            ends.append(float(np.mean(losses)))
    median = statistics.median(seconds)
    return {"seconds": median, "compile_seconds": max(0.0, first - median)}, made, ends


def measure(make: Callable[[], Trainer], steps: int, passes: int | None = None) -> dict[str, Any]:
    """Returns what a trainer takes for a pass, and what it has computed in all of them.

    Args:
      make: makes the trainer.
      steps: updates that are expected of a pass.
      passes: passes per section, see `time_sections`.
    """
    started = time.perf_counter()
    trainer = make()
    making = time.perf_counter() - started
    found, made, ends = time_sections(trainer.train, passes)
    return {
        **found,
        "making_seconds": making,
        "updates": trainer.updates(),
        "expected_updates": made * steps,
        "loss": ends or [float(np.mean(trainer.losses()))],
        "peak_mib": peak_memory_mib(),
    }


def first_losses(trainer: Trainer, steps: int) -> np.ndarray:
    """Returns the losses of the first steps, in as many passes as they need."""
    found = np.zeros(0)
    while len(found) < steps:
        found = np.concatenate([found, np.asarray(trainer.losses(), np.float64)])
    return found[:steps]


def peak_memory_mib() -> float:
    """Returns the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
