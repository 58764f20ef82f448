"""EarlyStopping: the criterion by which `fit` ends a run that no longer improves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from jaxtrain._arguments import check_integer
from jaxtrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Ends a run after `patience` epochs without an improvement of one column of the history.

    Attributes:
      patience: epochs without improvement after which to stop, at least 1.
      monitor: the column to watch.
      mode: "min" if smaller is better, "max" if larger is better.

    Example:
      >>> early_stopping = jt.EarlyStopping(3, monitor="validation_accuracy", mode="max")
      >>> rest, validation = train.split(0.25, jax.random.key(0))
      >>> state, history = jt.fit(
      ...     state, rest, validation_data=validation, loss_fn=loss_fn, metric_fns=metric_fns,
      ...     epochs=20, early_stopping=early_stopping,
      ... )
    """

    patience: int
    monitor: str = "validation_loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_integer(self.patience, "patience", minimum=1)
        if self.mode not in ("min", "max"):
            raise InputError(f"mode is {self.mode!r}; expected 'min' or 'max'")

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises InputError if the watched column is missing from the history."""
        if self.monitor not in columns:
            hint, argument = "", "early_stopping"
            if self.monitor.startswith("validation_"):
                hint = ", or validation_data, for example from train_data.split(0.1, key)"
                argument = "validation_data"
            raise InputError(
                f"early_stopping monitors {self.monitor!r}, but the history has the columns "
                f"{', '.join(columns)}; expected one of these{hint}",
                argument=argument,
            )

    def best_row(self, rows: Sequence[dict[str, float]]) -> int:
        """Returns the index of the best row, the first of equally good ones."""
        sign = 1 if self.mode == "min" else -1
        values = [sign * row[self.monitor] for row in rows]
        return min(range(len(rows)), key=lambda i: (math.isnan(values[i]), values[i]))

    def is_over(self, rows: Sequence[dict[str, float]]) -> bool:
        """Returns whether the run ends after these rows."""
        return bool(rows) and len(rows) - 1 - self.best_row(rows) >= self.patience
