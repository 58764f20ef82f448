"""train: a whole run as one compiled program, which may be vmapped and differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_integer
from jaxtrain.dataset import Dataset, epoch_order
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import current_learning_rate, skipped_steps
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._plan import make_plan
from jaxtrain.training._programs import (
    compiled_evaluate,
    mean_step_loss,
    num_steps,
    step_weights,
    train_steps,
)
from jaxtrain.training._resident import Resident
from jaxtrain.training._validation import check_type, checked_state
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import MetricItems

StateMetrics = tuple[tuple[str, Callable[[TrainState], Any]], ...]


def train(
    state: TrainState,
    train_data: Dataset,
    test_data: Dataset | None = None,
    *,
    validation_data: Dataset | None = None,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    state_metrics: Mapping[str, Callable[[TrainState], Any]] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    early_stopping: EarlyStopping | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Trains for some epochs and evaluates after each, in one compiled program.

    The function computes what `fit` computes from the same arguments. It does not return to the
    host between epochs, so it may be called under `jit`, vmapped over states, keys or numbers such
    as learning rates, and differentiated with respect to these numbers. In return it saves nothing,
    reports nothing, and does not stop at a NaN: the run continues, and its later rows are NaN.

    Args:
      state: where to start; not modified.
      train_data: inputs and targets with leading axis [examples].
      test_data: evaluated after each epoch; None skips it.
      validation_data: evaluated after each epoch, for early stopping.
      loss_fn: per-example loss.
      metric_fns: metrics to evaluate on test and validation data, by name.
      state_metrics: further columns of the history by name, functions of the state after an epoch,
        written in JAX.
      epochs: passes over `train_data`.
      batch_size: examples per step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle; epoch e is shuffled with `fold_in(key, e)`. None keeps the
        stored order.
      early_stopping: stops training when a column of the history no longer improves, and returns
        the best state. The rows of the remaining epochs are NaN, with 0 in the column `epoch`.
        Under `vmap`, a run that has stopped takes as long as the longest one.

    Returns:
      The state after the last epoch, and the history: the columns of `fit` except `seconds`, each
      with one entry per epoch, [epochs], and `step_losses`, [epochs, steps].

    Raises:
      InputError: an argument is out of range; the data are not finite, or do not fit the model or
        the loss. Values that are traced are not checked.
      OutOfMemoryError: the run does not fit on the device.

    Example:
      >>> def run(seed):
      ...     key = jax.random.key(seed)
      ...     state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      ...     return jt.train(state, train, test, loss_fn=loss_fn, epochs=5, key=key)
      >>> states, history = jax.jit(jax.vmap(run))(jnp.arange(3))
      >>> history["test_loss"].shape
      (3, 5)
    """
    check_integer(epochs, "epochs", minimum=0)
    check_type(early_stopping, "early_stopping", EarlyStopping)
    with parallel.mesh_of(state, train_data):
        state = checked_state(state)
        plan = make_plan(
            state,
            {"train": train_data, "test": test_data, "validation": validation_data},
            loss_fn=loss_fn,
            metric_fns=metric_fns,
            state_metrics=state_metrics,
            batch_size=batch_size,
            test_batch_size=test_batch_size,
            key=key,
            measure="last",
        )
        assert isinstance(plan.train, Resident)
        columns = [name for name in plan.columns(state) if name != "seconds"]
        if early_stopping is not None:
            early_stopping.check_columns(columns)
        with memory_advice(plan.train.batch_size):
            final, history = _train(
                state,
                plan.train.data,
                plan.held_out,
                plan.train.key,
                loss_fn=loss_fn,
                metrics=plan.metrics,
                state_metrics=tuple(plan.state_metrics.items()),
                epochs=epochs,
                batch_size=plan.train.batch_size,
                test_batch_size=test_batch_size,
                early_stopping=early_stopping,
            )
    # A dict that leaves a compiled program is sorted by name.
    return final, {name: history[name] for name in (*columns, "step_losses")}


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_fn",
        "metrics",
        "state_metrics",
        "epochs",
        "batch_size",
        "test_batch_size",
        "early_stopping",
    ),
)
def _train(
    state: TrainState,
    train_data: Dataset,
    held_out: dict[str, Dataset],
    key: Key[Array, ""] | None,
    *,
    loss_fn: Loss,
    metrics: MetricItems,
    state_metrics: StateMetrics,
    epochs: int,
    batch_size: int,
    test_batch_size: int,
    early_stopping: EarlyStopping | None,
) -> tuple[TrainState, dict[str, Array]]:
    run = functools.partial(
        _run,
        loss_fn=loss_fn,
        metrics=metrics,
        state_metrics=state_metrics,
        epochs=epochs,
        batch_size=batch_size,
        test_batch_size=test_batch_size,
        early_stopping=early_stopping,
    )
    return parallel.on_auto_axes(run, state, train_data, held_out, key, like=(state, None))


def _run(
    state: TrainState,
    train_data: Dataset,
    held_out: dict[str, Dataset],
    key: Key[Array, ""] | None,
    *,
    loss_fn: Loss,
    metrics: MetricItems,
    state_metrics: StateMetrics,
    epochs: int,
    batch_size: int,
    test_batch_size: int,
    early_stopping: EarlyStopping | None,
) -> tuple[TrainState, dict[str, Array]]:
    examples = len(train_data)
    steps = num_steps(examples, batch_size)

    def run_epoch(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        epoch = state.epoch + 1
        order = epoch_order(examples, None if key is None else jax.random.fold_in(key, epoch))
        new, losses, norms = train_steps(
            state, train_data, order, loss_fn, 0, steps, batch_size=batch_size, measure="last"
        )
        skipped, rate = _skipped_since(state, new), current_learning_rate(new.opt_state)
        row = {
            "epoch": epoch,
            "train_loss": mean_step_loss(
                losses,
                step_weights(train_data.weights, order, batch_size=batch_size),
                skip_nonfinite=skipped is not None,
            ),
        }
        for part, data in held_out.items():
            values = compiled_evaluate(new, data, metrics, batch_size=test_batch_size)
            row |= {f"{part}_{name}": value for name, value in values.items()}
        row |= {name: jnp.asarray(metric(new)) for name, metric in state_metrics}
        row["gradient_norm"] = norms[-1]
        if skipped is not None:
            row["skipped_steps"] = skipped
        if rate is not None:
            row["learning_rate"] = rate
        row["step_losses"] = losses
        return new.replace(epoch=epoch), row

    if early_stopping is None:
        return lax.scan(lambda state, _: run_epoch(state), state, length=epochs)

    sign = 1 if early_stopping.mode == "min" else -1
    no_row = jax.tree.map(_missing, jax.eval_shape(run_epoch, state)[1])

    def run_unless_stopped(carry: Any, first: Array) -> tuple[Any, dict[str, Array]]:
        state, best_state, best, waited = carry
        stopped = waited >= early_stopping.patience
        state, row = lax.cond(stopped, lambda state: (state, no_row), run_epoch, state)
        value = jnp.asarray(sign * row[early_stopping.monitor], best.dtype)
        better = (value < best) | (jnp.isnan(best) & ~jnp.isnan(value))  # NaN is the worst
        better = first | (better & ~stopped)
        best_state = jax.tree.map(lambda new, old: jnp.where(better, new, old), state, best_state)
        best, waited = jnp.where(better, value, best), jnp.where(better, 0, waited + 1)
        return (state, best_state, best, waited), row

    nothing = jnp.array(jnp.nan, jnp.result_type(float))
    carry = (state, state, nothing, jnp.array(0))
    carry, history = lax.scan(run_unless_stopped, carry, jnp.arange(epochs) == 0)
    return carry[1], history


def _skipped_since(before: TrainState, after: TrainState) -> Array | None:
    then, now = skipped_steps(before.opt_state), skipped_steps(after.opt_state)
    return None if then is None or now is None else jnp.asarray(now - then)


def _missing(leaf: jax.ShapeDtypeStruct) -> Array:
    """Returns the value of a column for an epoch that is not trained."""
    missing = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    return jnp.full(leaf.shape, missing, leaf.dtype)
