"""early_stopping: ends a run that no longer improves, and keeps its best state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxtrain import _arguments
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain.callbacks._callback import Callback, check_column, check_number

if TYPE_CHECKING:
    from jaxtrain.training.history import Run

Mode = Literal["min", "max"]

# Endings of the names of columns whose smaller values are better.
_SMALLER_IS_BETTER = (
    *("loss", "error", "distance", "divergence", "entropy", "perplexity", "residual"),
    *("mae", "mse", "mape", "nll", "bce", "huber"),
)


def early_stopping(
    patience: int,
    monitor: str = "validation_loss",
    mode: Mode | None = None,
    *,
    min_delta: float = 0.0,
    min_epochs: int = 0,
) -> EarlyStopping:
    """Ends a run after `patience` epochs without an improvement of one column of the history.

    `fit` and `train` then return the state of the best epoch, the first of equally good ones. The
    rules are those of `keras.callbacks.EarlyStopping(restore_best_weights=True)`.

    Args:
      patience: epochs without improvement after which to stop, at least 1.
      monitor: the column to watch.
      mode: "min" if smaller is better, "max" if larger is better. None infers it from the column's
        name: "min" if it ends in loss, error, distance, divergence, entropy, perplexity, residual,
        mae, mse (as rmse does), mape, nll, bce or huber, otherwise "max".
      min_delta: an epoch is an improvement if it is better than the best one by more than this.
      min_epochs: epochs at the start of the run that are not judged: the run does not stop in them,
        and none of them is the best (`start_from_epoch` of Keras).

    Raises:
      InputError: an argument is out of range; `fit` and `train` raise it if the history has no such
        column.

    Example:
      >>> rest, validation = train.split(0.25, jax.random.key(0))
      >>> state, history = jt.fit(
      ...     state, rest, validation=validation, loss_fn=loss_fn, metric_fns=metric_fns, epochs=20,
      ...     callbacks=[jt.callbacks.early_stopping(3, monitor="validation_accuracy")],
      ... )
    """
    check_arguments(early_stopping, locals())
    check_integer(patience, "patience", minimum=1)
    _arguments.check_number(
        "min_delta", min_delta, lambda x: 0 <= x < math.inf, "a finite number of at least 0"
    )
    check_integer(min_epochs, "min_epochs", minimum=0)
    return EarlyStopping(patience, monitor, mode or infer_mode(monitor), min_delta, min_epochs)


@dataclasses.dataclass(frozen=True)
class EarlyStopping(Callback):
    """What `early_stopping` returns; hashable, since it is static in the compiled `train`.

    Attributes:
      patience: epochs without improvement after which to stop.
      monitor: the column to watch.
      mode: "min" if smaller is better, "max" if larger is better.
      min_delta: by how much an epoch must be better to be an improvement.
      min_epochs: epochs at the start that are not judged.
    """

    patience: int
    monitor: str = "validation_loss"
    mode: Mode = "min"
    min_delta: float = 0.0
    min_epochs: int = 0

    def is_better(self, new: Any, best: Any) -> Any:
        """Returns whether a value, a number or a traced array, improves on the best so far."""
        return is_better(new, best, _sign(self.mode), self.min_delta)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises InputError if the watched column is missing from the history."""
        check_column(self.monitor, columns, "early_stopping monitors")

    def on_start(self, run: Run) -> Run | None:
        """Checks the column, and ends a restored run that is over already."""
        self.check_columns(run.columns)
        return run.replace(is_over=True) if self._waited(run.rows) >= self.patience else None

    def on_epoch(self, run: Run) -> Run:
        """Keeps the state of the best epoch, and ends the run."""
        check_number(self.monitor, run.rows[-1], "early_stopping monitors")
        waited = self._waited(run.rows)
        if waited == 0:
            return run.replace(best=run.state)
        return run.replace(is_over=run.is_over or waited >= self.patience)

    def _waited(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Returns the number of epochs since the best one; -1 before any is judged."""
        judged = rows[self.min_epochs :]
        return len(judged) - 1 - best_row(judged, self.monitor, self.mode, self.min_delta)


def infer_mode(column: str) -> Mode:
    """Returns "min" if smaller values of a column are better, going by its name, else "max"."""
    return "min" if column.endswith(_SMALLER_IS_BETTER) else "max"


def best_row(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    mode: Mode | None = None,
    min_delta: float = 0.0,
) -> int:
    """Returns the index of the best row, the first of equally good ones; 0 if there is none."""
    sign, best = _sign(mode or infer_mode(column)), 0
    # In the precision of the compiled `train`, so that both stop after the same epoch.
    values = np.asarray([row[column] for row in rows], jnp.result_type(float))
    for index in range(1, len(rows)):
        if is_better(values[index], values[best], sign, min_delta):
            best = index
    return best


def is_improvement(
    rows: Sequence[Mapping[str, Any]], column: str, mode: Mode | None = None
) -> bool:
    """Returns whether the last row is better than all before it."""
    return best_row(rows, column, mode) == len(rows) - 1


def is_better(new: Any, best: Any, sign: int, min_delta: float = 0.0) -> Any:
    """Returns whether a value is better than the best so far; NaN is the worst.

    Args:
      new: the value, a number or a traced array.
      best: the best value so far.
      sign: 1 if smaller is better, -1 if larger is better.
      min_delta: the difference that it must exceed.
    """
    return (sign * new < sign * best - min_delta) | ((best != best) & (new == new))


def _sign(mode: Mode) -> int:
    return 1 if mode == "min" else -1
