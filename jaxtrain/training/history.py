"""History and Run: what a run of `fit` has done so far, as its callbacks see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxtrain._placement import read_only
from jaxtrain.errors import InputError
from jaxtrain.training.loop import StepLog
from jaxtrain.training.sources import Segment
from jaxtrain.training.state import counters

if TYPE_CHECKING:
    from jaxtrain._figures import Figure

NO_LOSSES = read_only(np.empty(0, np.float32))


class History(dict[str, np.ndarray]):
    """Arrays by column name with one entry per epoch, [epochs, ...].

    `pandas.DataFrame(history)` works if each column has one number per epoch.

    Attributes:
      step_losses: the loss of every step before its update, [steps].

    Example:
      >>> state, history = jt.fit(state, train, test, loss_fn=loss_fn, epochs=3, batch_size=16)
      >>> history["epoch"]
      array([1, 2, 3])
      >>> history["test_loss"].shape, history.step_losses.shape
      ((3,), (12,))
    """

    def __init__(self, columns: dict[str, np.ndarray], step_losses: np.ndarray) -> None:
        super().__init__(columns)
        self.step_losses = step_losses

    def plot(self, title: str = "") -> Figure:
        """Draws the loss of each step, and each quantity of the training and held-out data.

        A loss above 0 has a logarithmic scale. Columns of arrays, and what an optimizer records
        and does not change, are left out.

        Args:
          title: title of the figure.

        Returns:
          A matplotlib figure, with one panel per quantity: `figure.savefig("curves.png")`.

        Raises:
          InputError: the history has no epochs.
          MissingExtraError: matplotlib is not installed.

        Example:
          >>> state, history = jt.fit(state, train, test, loss_fn=loss_fn, epochs=3)
          >>> history.plot("digits").savefig("curves.png")
        """
        if not len(self.get("epoch", ())):
            raise InputError("the history has no epochs; expected one that `fit` returned")
        from jaxtrain._figures import learning_curves

        return learning_curves(self, self.step_losses, title)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The progress of one call of `fit`, passed to callbacks; `replace` returns a changed copy.

    Attributes:
      state: the current state. Within an epoch its arrays are valid during the callback only.
      epoch: epochs completed.
      last_epoch: the epoch after which the run ends.
      columns: names of the history's columns, in order.
      rows: the history of the completed epochs, one dict per epoch by column name.
      step_losses: the losses of the steps of the completed epochs, arrays to concatenate.
      step: steps taken in the epoch in progress; 0 between epochs.
      examples: examples used in the epoch in progress.
      losses: the losses of the steps since the previous `on_steps`.
      log: the epoch in progress: the loss and the weight of each step, the totals of the metrics.
      counts: the counters of the optimizer at the start of the epoch in progress.
      position: where the training stream resumes; None for data in memory.
      seconds: time spent in the epoch in progress, without compiling.
      compile_seconds: time of tracing and compiling so far.
      steps_per_epoch: 0 if unknown.
      examples_per_epoch: 0 if unknown.
      test_examples: examples of the test data; 0 if unknown.
      monitor: the column of the history by which a callback judges an epoch, or None.
      best: the best state so far, if a callback keeps it; `fit` returns it.
      is_over: whether the run ends after this epoch.
      resumed: whether the run was restored from a checkpoint.
      describe: in `on_start`, returns the metadata that a checkpoint compares before a run resumes.
    """

    state: Any
    epoch: int
    last_epoch: int
    columns: tuple[str, ...]
    log: StepLog
    rows: tuple[dict[str, Any], ...] = ()
    step_losses: tuple[np.ndarray, ...] = ()
    step: int = 0
    examples: int = 0
    losses: np.ndarray = dataclasses.field(default_factory=lambda: NO_LOSSES)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    position: Any = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    steps_per_epoch: int = 0
    examples_per_epoch: int = 0
    test_examples: int = 0
    monitor: str | None = None
    best: Any = None
    is_over: bool = False
    resumed: bool = False
    describe: Callable[[], dict[str, Any]] = dict

    def replace(self, **changes: Any) -> Run:
        """Returns a copy with some fields replaced."""
        return Run(**(vars(self) | changes))  # faster than `dataclasses.replace`

    @property
    def history(self) -> History:
        """The history of the completed epochs."""
        columns = {name: np.asarray([row[name] for row in self.rows]) for name in self.columns}
        return History(columns, np.concatenate([NO_LOSSES, *self.step_losses]))

    def after_steps(self, state: Any, segment: Segment, stop: int, log: StepLog) -> Run:
        """Returns the run after the steps of a segment up to `stop`."""
        first = self.step - segment.start
        losses, weights = (np.asarray(x)[first:stop] for x in (log.loss, log.weight))
        return self.replace(
            state=state,
            step=segment.start + stop,
            examples=self.examples + (stop - first) * segment.batch_size,
            losses=read_only(np.append(self.losses, losses)),
            position=segment.position,
            log=read_only(
                StepLog(
                    np.append(self.log.loss, losses),
                    np.append(self.log.weight, weights),
                    log.totals,
                )
            ),
        )

    def after_epoch(self, state: Any, row: dict[str, Any], compile_seconds: float) -> Run:
        """Returns the run after an epoch and its evaluation."""
        return self.replace(
            state=state,
            epoch=self.epoch + 1,
            compile_seconds=compile_seconds,
            counts={name: int(value) for name, value in counters(state).items()},
            rows=(*self.rows, {name: row[name] for name in self.columns}),
            step_losses=(*self.step_losses, self.log.loss),
            step=0,
            examples=0,
            losses=NO_LOSSES,
            position=None,
            seconds=0.0,
            log=read_only(
                self.log._replace(
                    loss=self.log.loss[:0],
                    weight=self.log.weight[:0],
                    totals=jax.tree.map(np.zeros_like, self.log.totals),
                )
            ),
        )
