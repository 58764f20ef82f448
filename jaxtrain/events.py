"""What `fit` reports while it runs, for progress bars, run folders and callers of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtrain.history import History
from jaxtrain.state import TrainState


class Compiled(NamedTuple):
    """Reported once, before the first step.

    Attributes:
      seconds: tracing and compiling, training and evaluation together.
      epochs: the epochs to come.
      steps: steps in each.
      examples: training examples in each.
    """

    seconds: float
    epochs: int
    steps: int
    examples: int


class StepsDone(NamedTuple):
    """Reported several times an epoch.

    Attributes:
      epoch: the running epoch, counted from 1.
      step: steps finished in this epoch.
      examples_seen: examples used in this epoch.
      loss: training loss of the latest step.
      state: the state after it.
    """

    epoch: int
    step: int
    examples_seen: int
    loss: float
    state: TrainState


class EpochDone(NamedTuple):
    """Reported after each epoch.

    Attributes:
      epoch: the epoch, counted from 1.
      metrics: this epoch's entry of each column of the history.
      state: the state after it.
    """

    epoch: int
    metrics: dict[str, float]
    state: TrainState


class Resumed(NamedTuple):
    """Reported after `Compiled` where the run goes on from a checkpoint.

    Attributes:
      epoch: the epochs behind it.
      history: their history.
      state: the state after them.
    """

    epoch: int
    history: History
    state: TrainState


Event = Compiled | StepsDone | EpochDone | Resumed
Report = Callable[[Event], None]
