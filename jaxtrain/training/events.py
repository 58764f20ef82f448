"""Events: what `fit` and `sweep` report, for progress bars, run folders and your own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxtrain._arguments import check_integer
from jaxtrain.training.history import History
from jaxtrain.training.state import TrainState


class Compiled(NamedTuple):
    """Reported once, before the first step.

    Attributes:
      seconds: time of tracing and compiling, training and evaluation together.
      epochs: epochs that remain.
      steps: steps per epoch; 0 if unknown.
      examples: training examples per epoch; 0 if unknown.
    """

    seconds: float
    epochs: int
    steps: int
    examples: int


class Resumed(NamedTuple):
    """Reported after `Compiled` if the run resumes from a checkpoint.

    Attributes:
      epoch: the last completed epoch.
      history: the history up to it.
      state: the state after it, or after the step.
      step: steps of the next epoch that are done; 0 if the checkpoint is of a complete epoch.
    """

    epoch: int
    history: History
    state: TrainState
    step: int = 0


class StepsDone(NamedTuple):
    """Reported about once per second, at the end of an epoch, and at the steps of `every_steps`.

    It is also reported before a checkpoint within an epoch, so that a run that resumes continues
    where its last report ended.

    Attributes:
      epoch: the current epoch, counted from 1.
      step: steps taken in this epoch.
      examples_seen: examples used in this epoch.
      losses: the losses of the steps since the previous `StepsDone`.
      state: the state after them.
    """

    epoch: int
    step: int
    examples_seen: int
    losses: np.ndarray
    state: TrainState

    @property
    def loss(self) -> float:
        """The loss of the latest step."""
        return float(self.losses[-1])


class EpochDone(NamedTuple):
    """Reported after each epoch.

    Attributes:
      epoch: the epoch, counted from 1.
      metrics: this epoch's value in each column of the history.
      state: the state after it.
    """

    epoch: int
    metrics: dict[str, float]
    state: TrainState


class RunsDone(NamedTuple):
    """Reported by `sweep` after each batch of runs.

    Attributes:
      done: runs that have finished.
      total: runs of the sweep.
      parallel: runs that were trained at once.
      compile_seconds: time of compiling their program; 0 if it was compiled before.
      seconds: time of training them.
    """

    done: int
    total: int
    parallel: int
    compile_seconds: float
    seconds: float


class RunsRestored(NamedTuple):
    """Reported by `sweep` before it trains, if its checkpoint folder has finished runs.

    Attributes:
      done: runs in the folder.
      total: runs of the sweep.
    """

    done: int
    total: int


class RunsHalved(NamedTuple):
    """Reported by `sweep` when a batch of runs does not fit in memory and is tried again.

    Attributes:
      parallel: half as many runs, which are trained at once from now on.
    """

    parallel: int


Event = Compiled | Resumed | StepsDone | EpochDone | RunsDone | RunsRestored | RunsHalved
"""What a callback receives; `isinstance` tells which event it is."""

OnEvent = Callable[[Event], bool | None]
"""A callback for `fit` or `sweep`; returning True at an `EpochDone` ends a call of `fit`.

Example:
  >>> def on_event(event):
  ...     if isinstance(event, jt.events.EpochDone):
  ...         return event.metrics["train_loss"] < 1e-3
  >>> state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=on_event)
"""


@dataclasses.dataclass(frozen=True)
class EverySteps:
    """A callback with the steps between two `StepsDone`, as `every_steps` returns it."""

    steps_between_events: int
    on_event: OnEvent

    def __call__(self, event: Event) -> bool | None:
        return self.on_event(event)


def every_steps(steps: int, on_event: OnEvent) -> OnEvent:
    """Returns a callback for which `fit` reports `StepsDone` at every multiple of `steps`.

    Other callbacks receive it about once per second, at no measurable cost.

    Args:
      steps: steps between two events; 0 returns the callback unchanged.
      on_event: the callback.

    Example:
      >>> steps = []
      >>> def on_event(event):
      ...     if isinstance(event, jt.events.StepsDone) and event.step % 2 == 0:
      ...         steps.append(event.step)
      >>> on_event = jt.events.every_steps(2, on_event)
      >>> state, history = jt.fit(
      ...     state, train, loss_fn=loss_fn, epochs=1, batch_size=16, on_event=on_event
      ... )
      >>> steps
      [2, 4]
    """
    check_integer(steps, "steps", minimum=0)
    return EverySteps(steps, on_event) if steps else on_event


def returned_true(result: Any) -> bool:
    """Returns whether a callback returned True, as a bool of Python, NumPy or JAX."""
    return np.ndim(result) == 0 and np.asarray(result).dtype == bool and bool(result)
