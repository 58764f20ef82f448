"""Chunk: consecutive steps of an epoch, which run on the device without the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.dataset import Dataset
from jaxtrain.training.state import TrainState

# Seconds that a chunk should take, so that a progress bar moves and Ctrl-C is noticed.
CHUNK_SECONDS = 1.0


class Chunk(NamedTuple):
    """Some steps of an epoch.

    Attributes:
      start: the first step, counted from 0 in the epoch.
      stop: the step after the last one.
      examples: examples of the epoch that are used after the last step.
      run: `run(state, stop=..., measure=...)` takes the steps, or those before another `stop`, and
        returns the next state, the losses and gradient norms of the steps, and the total weight of
        the examples of each (empty for data in memory, from which they are computed).
      batch: `batch(step)` returns the batch of a step and a function that names its examples.
      position: of a stream after the last step, JSON-serializable; None if it has none.
      ends_epoch: whether the last step ends the epoch.
    """

    start: int
    stop: int
    examples: int
    run: Callable[..., tuple[TrainState, np.ndarray, np.ndarray, np.ndarray]]
    batch: Callable[[int], tuple[Dataset, Callable[[int], str]]]
    position: Any
    ends_epoch: bool


def next_end(start: int, intervals: Iterable[int | None], steps: Iterable[int]) -> int | None:
    """Returns where the chunk from `start` must end at the latest, or None if anywhere.

    Args:
      start: the first step of the chunk.
      intervals: a chunk ends at their multiples; 0 and None are ignored.
      steps: further steps at which a chunk ends; those before are ignored.
    """
    ends = [(start // interval + 1) * interval for interval in intervals if interval]
    return min([*ends, *(step for step in steps if step > start)], default=None)
