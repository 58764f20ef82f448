"""The history of a run: a row an epoch, a loss a step, and what early stopping reads from them."""

from __future__ import annotations

import numpy as np

History = dict[str, np.ndarray]


class Records:
    """The history as it grows: a row an epoch, a loss a step."""

    def __init__(self, columns: list[str]) -> None:
        self.rows: list[dict[str, float]] = []
        self._columns = columns
        self._step_losses = [np.empty(0, np.float32)]

    def append(self, row: dict[str, float], step_losses: np.ndarray) -> None:
        self.rows.append(row)
        self._step_losses.append(step_losses)

    def restore(self, history: History) -> None:
        columns = [history[name].tolist() for name in self._columns]
        rows = zip(*columns, strict=True)
        self.rows = [dict(zip(self._columns, row, strict=True)) for row in rows]
        self._step_losses = [history["step_losses"]]

    def history(self) -> History:
        columns = {name: np.asarray([row[name] for row in self.rows]) for name in self._columns}
        return columns | {"step_losses": np.concatenate(self._step_losses)}

    def best_epoch(self) -> float:
        """The first epoch with the smallest validation loss."""
        return min(self.rows, key=lambda row: row["validation_loss"])["epoch"]

    def is_over(self, patience: int | None) -> bool:
        """Whether early stopping ends the run after the epochs recorded."""
        if patience is None or not self.rows:
            return False
        return self.rows[-1]["epoch"] - self.best_epoch() >= patience
