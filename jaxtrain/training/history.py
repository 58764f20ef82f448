"""History: the metrics of a run, one entry per epoch."""

from __future__ import annotations

import numpy as np

from jaxtrain.checkpoint import Checkpoint
from jaxtrain.training.state import TrainState


class History(dict[str, np.ndarray]):
    """Arrays by column name with one entry per epoch; `pandas.DataFrame(history)` works.

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


class Records:
    """The history of a run in progress, and the state that it has reached.

    Attributes:
      columns: names of the history's columns, in order.
      state: the state after the last completed epoch.
      rows: one dict per epoch, by column name.
    """

    def __init__(self, columns: list[str], state: TrainState) -> None:
        self.columns = columns
        self.state = state
        self.rows: list[dict[str, float]] = []
        self._step_losses = [np.empty(0, np.float32)]

    def append(self, state: TrainState, row: dict[str, float], step_losses: np.ndarray) -> None:
        """Adds an epoch."""
        self.state = state
        self.rows.append({name: row[name] for name in self.columns})
        self._step_losses.append(step_losses)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Replaces everything with the completed epochs of a checkpoint."""
        history, losses, part = checkpoint.history, checkpoint.step_losses, checkpoint.part
        self.state = checkpoint.state
        values = zip(*(history[name].tolist() for name in self.columns), strict=True)
        self.rows = [dict(zip(self.columns, row, strict=True)) for row in values]
        self._step_losses = [losses if part is None else losses[: len(losses) - part.step]]

    def history(self) -> History:
        """Returns the history so far."""
        columns = {name: np.asarray([row[name] for row in self.rows]) for name in self.columns}
        return History(columns, np.concatenate(self._step_losses))
