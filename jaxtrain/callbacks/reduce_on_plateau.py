"""reduce_on_plateau: lowers the learning rate when a column of the history no longer improves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from jaxtrain import _arguments
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain.callbacks._callback import Callback, check_column, check_number
from jaxtrain.callbacks.early_stopping import infer_mode
from jaxtrain.errors import InputError
from jaxtrain.optimizers._inspect import has_settable_rate, map_rates
from jaxtrain.optimizers._numbers import check_not_negative

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


def reduce_on_plateau(
    monitor: str = "validation_loss",
    *,
    mode: Literal["min", "max"] | None = None,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> ReduceOnPlateau:
    """Lowers the learning rate after more than `patience` epochs without an improvement.

    Same as `torch.optim.lr_scheduler.ReduceLROnPlateau`, with `scheduler.step(value)` after each
    epoch. The rate is part of the state, so a resumed run continues with it, and the column
    `learning_rate` of the history has the rate that each epoch used. A new call of `fit` keeps the
    rate, and waits for improvements anew.

    The optimizer has a number as its learning rate: those of `jt.optimizers`, except Rprop and
    L-BFGS, or `optax.inject_hyperparams(optax.lion)(learning_rate=1e-3)`, also in groups with
    several rates.

    Args:
      monitor: the column to watch.
      mode: "min" if smaller is better, "max" if larger is better. None infers it from the column's
        name: "min" if it ends in loss, error, distance, divergence, entropy, perplexity, residual,
        mae, mse (as rmse does), mape, nll, bce or huber, otherwise "max".
      factor: factor of each reduction, in (0, 1).
      patience: epochs without improvement that are tolerated.
      threshold: an improvement must be larger than this.
      threshold_mode: whether `threshold` is a fraction of the best value, or a difference.
      cooldown: epochs after a reduction that are not counted.
      min_lr: the smallest rate.
      eps: a reduction by less than this is not made.

    Raises:
      InputError: an argument is out of range; `fit` raises it if the history has no such column, or
        the state has no rate to change.

    Example:
      >>> rest, validation = train.split(0.25, jax.random.key(0))
      >>> state, history = jt.fit(
      ...     state, rest, validation=validation, loss_fn=loss_fn, epochs=20,
      ...     callbacks=[jt.callbacks.reduce_on_plateau(factor=0.5, patience=2)],
      ... )
      >>> history["learning_rate"].shape
      (20,)
    """
    check_arguments(reduce_on_plateau, locals())
    _arguments.check_number("factor", factor, lambda x: 0 < x < 1, "a number above 0 and below 1")
    check_integer(patience, "patience", minimum=0)
    check_integer(cooldown, "cooldown", minimum=0)
    check_not_negative(threshold=threshold, min_lr=min_lr, eps=eps)
    mode = mode or infer_mode(monitor)
    return ReduceOnPlateau(
        monitor, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps
    )


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau(Callback):
    """What `reduce_on_plateau` returns; the attributes are its arguments, `column` is `monitor`.

    `Callback.monitor` is not set, since `fit` takes the best epoch by that column. The callback has
    no state: it reads the history of the run, which a checkpoint restores.
    """

    column: str
    mode: Literal["min", "max"]
    factor: float
    patience: int
    threshold: float
    threshold_mode: Literal["rel", "abs"]
    cooldown: int
    min_lr: float
    eps: float

    def on_start(self, run: Run) -> None:
        """Checks the column and the optimizer."""
        check_column(self.column, run.columns, "reduce_on_plateau monitors")
        if not has_settable_rate(getattr(run.state, "opt_state", ())):
            raise InputError(
                "reduce_on_plateau finds no learning rate to change in the state of the optimizer, "
                "such as with a schedule or with optax.adam(1e-3); expected an optimizer of "
                "jaxtrain.optimizers with a number as its rate, such as "
                "jaxtrain.optimizers.adam(1e-3), or one of optax.inject_hyperparams",
                argument="callbacks",
            )

    def on_epoch(self, run: Run) -> Run | None:
        """Lowers the rate in the state, if `patience` is exceeded."""
        check_number(self.column, run.rows[-1], "reduce_on_plateau monitors")
        values = [row[self.column] for row in run.rows]
        if not self._is_reduced_after(values):
            return None
        opt_state = map_rates(self._reduced, run.state.opt_state)
        return run.replace(state=run.state.replace(opt_state=opt_state))

    def _is_reduced_after(self, values: Iterable[float]) -> bool:
        """Returns whether the last of the values so far causes a reduction."""
        best = math.inf if self.mode == "min" else -math.inf
        bad = cooldown = 0
        reduced = False
        for value in values:
            bad += 1
            if self._is_better(value, best):
                best, bad = value, 0
            if cooldown:
                cooldown, bad = cooldown - 1, 0
            reduced = bad > self.patience
            if reduced:
                bad, cooldown = 0, self.cooldown
        return reduced

    def _is_better(self, value: float, best: float) -> bool:
        if self.threshold_mode == "rel":
            if self.mode == "min":
                return value < best * (1 - self.threshold)
            return value > best * (1 + self.threshold)
        if self.mode == "min":
            return value < best - self.threshold
        return value > best + self.threshold

    def _reduced(self, rate: jax.Array) -> jax.Array:
        lower = jnp.maximum(rate * self.factor, self.min_lr)
        return jnp.where(rate - lower > self.eps, lower, rate)
