"""fit: the loop over epochs on the host, which reports, evaluates, saves and stops."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_integer
from jaxtrain._processes import agree, check_same_epoch, lost_process_is_one_error
from jaxtrain.checkpoint import Checkpoint, CheckpointOptions, CheckpointStore
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError, NonFiniteError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import skipped_steps
from jaxtrain.training._hidden import steps_to_measure
from jaxtrain.training._identity import check_same_run, identify
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._nonfinite import check_arrays, hint_for, raise_for_steps
from jaxtrain.training._plan import Plan, learning_rate, make_plan
from jaxtrain.training._validation import (
    check_not_traced,
    check_type,
    checked_callback,
    checked_state,
)
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.epoch import compiled_evaluate
from jaxtrain.training.events import Compiled, EpochDone, OnEvent, Resumed, StepsDone
from jaxtrain.training.history import History, Records
from jaxtrain.training.state import TrainState

# Seconds between returns to the host, so that a progress bar moves and Ctrl-C is noticed.
_CHUNK_SECONDS = 1.0


def fit(
    state: TrainState,
    train_data: Dataset,
    test_data: Dataset | None = None,
    *,
    validation_data: Dataset | None = None,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    state_metrics: Mapping[str, Callable[[TrainState], float]] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    early_stopping: EarlyStopping | None = None,
    checkpoint: CheckpointOptions | None = None,
    on_event: OnEvent | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, History]:
    """Trains for some epochs and evaluates after each.

    Calling it again with the returned state and the same data continues the run: 2 epochs and then
    3 give exactly the results of 5 in one call. With `checkpoint`, the same call resumes an
    interrupted run from its newest checkpoint. On the same CPU with the same versions, the results
    are bit-identical to those of an uninterrupted run.

    A NaN or infinity in a loss, a gradient or the state ends the run before the epoch is reported
    or saved; `optimizers.skip_nonfinite` leaves out the steps of a few bad batches instead.

    Args:
      state: where to start; not modified.
      train_data: inputs and targets with leading axis [examples].
      test_data: evaluated after each epoch; None skips it.
      validation_data: evaluated after each epoch, for early stopping.
      loss_fn: per-example loss.
      metric_fns: metrics to evaluate on test and validation data, by name.
      state_metrics: further columns of the history by name, functions of the state after an epoch.
      epochs: passes over `train_data` after `state`. Epochs restored from a checkpoint count, so a
        resumed run trains only the remaining ones.
      batch_size: examples per step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle; epoch e is shuffled with `fold_in(key, e)`. None keeps the
        stored order.
      early_stopping: ends the run when a column of the history no longer improves, and returns the
        best state; None trains all epochs and returns the last state.
      checkpoint: where and how often to save the run; None saves nothing.
      on_event: called with `Compiled`, then `Resumed` if the run resumes, then `StepsDone` and
        `EpochDone` as they happen. Returning True at an `EpochDone` ends the run there.
      mesh: devices with an axis "data", over which each batch is divided. State and data are
        copied to every device, unless `jt.parallel` has sharded them. None means the mesh of
        `jax.set_mesh` or of the data, if there is one.

    Returns:
      The state after the last epoch, and the history with one entry per epoch: `epoch`;
      `train_loss`, the mean over the epoch's examples of the loss before each update; `test_loss`,
      `test_NAME` for each metric, and the same for validation; the state metrics; `gradient_norm`,
      of the epoch's last step, before any clipping; `skipped_steps`, with `skip_nonfinite`;
      `learning_rate`, of the last step, if the optimizer records it; `seconds`, of training and
      evaluation without compiling. `history.step_losses` has one entry per step.

    Raises:
      InputError: an argument is out of range; the data are not finite, or do not fit the model or
        the loss; the checkpoints belong to another run, are in use, or are all damaged.
      NonFiniteError: a loss, gradient or array of the state became NaN or infinite.
      OutOfMemoryError: the device has too little memory.
      StorageError: a checkpoint could not be written; earlier ones are intact.

    After the arguments are checked, any exception, KeyboardInterrupt included, has the attributes
    `state` and `history` of the last completed epoch.

    Example:
      >>> state, history = jt.fit(
      ...     state, train, test, loss_fn=jt.losses.cross_entropy, key=jax.random.key(0)
      ... )
      >>> history["test_loss"][-1]
    """
    check_integer(epochs, "epochs", minimum=0)
    check_type(early_stopping, "early_stopping", EarlyStopping)
    check_type(checkpoint, "checkpoint", CheckpointOptions)
    check_not_traced(state, train_data, key)
    on_event = checked_callback(on_event)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.mesh_of(state, train_data, mesh=mesh))
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
            measure=steps_to_measure(state),
        )
        records = Records(plan.columns(state), state)
        if early_stopping is not None:
            early_stopping.check_columns(records.columns)
        first, last = int(state.epoch), int(state.epoch) + epochs
        stack.enter_context(_progress_attached(records))
        stack.enter_context(lost_process_is_one_error())
        started = time.perf_counter()
        programs = plan.compile(state)
        store, resumed, every = None, None, 1
        if checkpoint is not None:
            run = identify(plan, state, early_stopping, programs, checkpoint.configuration)
            store, every = stack.enter_context(CheckpointStore(checkpoint, run)), checkpoint.every
            resumed = store.restore(state, records.columns, functools.partial(check_same_run, run))
            store.metadata = run  # `check_same_run` may have replaced its "start"
        best_state: TrainState | None = None
        if resumed is not None:
            if resumed.epoch > last:
                raise InputError(
                    f"epochs is {epochs}, but the checkpoint directory holds epoch "
                    f"{resumed.epoch}; expected at least {resumed.epoch - first}, or another "
                    "directory",
                    argument="epochs",
                )
            state, best_state = resumed.state, resumed.best_state
            records.restore(state, resumed.history, resumed.step_losses)
        check_same_epoch(int(state.epoch))
        if early_stopping is not None and early_stopping.is_over(records.rows):
            last = int(state.epoch)  # early stopping ended it in an earlier call
        seconds = time.perf_counter() - started
        on_event(Compiled(seconds, last - int(state.epoch), plan.steps, len(plan.train_data)))
        if resumed is not None:
            on_event(Resumed(resumed.epoch, records.history(), state))

        for epoch in range(int(state.epoch) + 1, last + 1):
            state, row, losses = _run_epoch(plan, state, epoch, on_event)
            records.append(state, row, losses)
            stop = _is_true(on_event(EpochDone(epoch, dict(records.rows[-1]), state)))
            if early_stopping is not None:
                if early_stopping.best_row(records.rows) == len(records.rows) - 1:
                    best_state = state
                stop = stop or early_stopping.is_over(records.rows)
            if store is not None and (stop or epoch == last or epoch % every == 0):
                history = records.history()
                store.save(Checkpoint(epoch, state, history, history.step_losses, best_state))
            if stop:
                break
    return (state if best_state is None else best_state), records.history()


@contextlib.contextmanager
def _progress_attached(records: Records) -> Iterator[None]:
    """Attaches the last completed epoch's state and history to an error that ends the run."""
    try:
        yield
    except BaseException as error:
        error.state, error.history = records.state, records.history()  # type: ignore[attr-defined]
        raise


def _is_true(result: Any) -> bool:
    """Returns whether a callback returned True, as a bool of Python, NumPy or JAX."""
    return np.ndim(result) == 0 and np.asarray(result).dtype == bool and bool(result)


def _run_epoch(
    plan: Plan, state: TrainState, epoch: int, on_event: OnEvent
) -> tuple[TrainState, dict[str, float], np.ndarray]:
    """Trains one epoch and evaluates; returns the state, the history's row, and the step losses."""
    started = time.perf_counter()
    before = state
    order = plan.order(epoch)
    state, losses, norms = _train_epoch(plan, state, order, epoch, on_event)
    check_arrays(before, state, epoch)
    skipped = _skipped_since(before, state)
    if skipped == plan.steps:  # further epochs would change nothing
        quantity, value = "training loss or gradient of every step", float(losses[0])
        hint = "check the data, or try a smaller learning rate"
        raise NonFiniteError(epoch, None, quantity, value, learning_rate(state), hint)
    skip_nonfinite = skipped_steps(state.opt_state) is not None
    rate = learning_rate(state)
    row: dict[str, float] = {
        "epoch": epoch,
        "train_loss": plan.mean_step_loss(losses, order, skip_nonfinite=skip_nonfinite),
        **_evaluate(plan, state, epoch),
        **{name: float(metric(state)) for name, metric in plan.state_metrics.items()},
        "gradient_norm": float(norms[-1]),
        "skipped_steps": skipped,
        **({} if rate is None else {"learning_rate": rate}),
    }
    state = state.replace(epoch=before.epoch + 1)
    return state, row | {"seconds": time.perf_counter() - started}, losses


def _train_epoch(
    plan: Plan, state: TrainState, order: Array, epoch: int, on_event: OnEvent
) -> tuple[TrainState, np.ndarray, np.ndarray]:
    """Trains one epoch in chunks, after each of which the host checks and reports the losses."""
    losses, norms = np.empty(0, np.float32), np.empty(0, np.float32)
    interval = getattr(on_event, "steps_between_events", 0)
    seconds_per_step: float | None = None
    while len(losses) < plan.steps:
        start = len(losses)
        stop = _next_stop(start, plan.steps, interval, seconds_per_step)
        stop = int(agree(stop))  # all processes take the same steps at once
        chunk_started = time.perf_counter()
        before = state
        state, chunk, chunk_norms = plan.run_steps(before, order, start, stop)
        seconds_per_step = (time.perf_counter() - chunk_started) / (stop - start)
        finite = np.isfinite(chunk) & np.isfinite(chunk_norms)
        if not finite.all() and skipped_steps(state.opt_state) is None:
            raise_for_steps(plan, before, order, epoch, start, finite)
        losses, norms = np.append(losses, chunk), np.append(norms, chunk_norms)
        seen = min(stop * plan.batch_size, len(plan.train_data))
        on_event(StepsDone(epoch, stop, seen, chunk, state))
    return state, losses, norms


def _evaluate(plan: Plan, state: TrainState, epoch: int) -> dict[str, float]:
    """Evaluates the test and validation data; a loss that is not finite ends the run."""
    row: dict[str, float] = {}
    for part, data in plan.held_out.items():
        lower = functools.partial(plan.lower_evaluation, state, part)
        with memory_advice(plan.test_batch_size, lower, "test_batch_size"):
            values = compiled_evaluate(state, data, plan.metrics, batch_size=plan.test_batch_size)
            row |= {f"{part}_{name}": float(value) for name, value in values.items()}
        if not np.isfinite(row[f"{part}_loss"]):
            raise NonFiniteError(
                epoch,
                None,
                f"{part} loss",
                row[f"{part}_loss"],
                learning_rate(state),
                hint_for(state),
            )
    return row


def _skipped_since(before: TrainState, after: TrainState) -> int:
    then, now = skipped_steps(before.opt_state), skipped_steps(after.opt_state)
    return 0 if then is None or now is None else int(now) - int(then)


def _next_stop(start: int, steps: int, interval: int, seconds_per_step: float | None) -> int:
    """Returns where a chunk ends: at the next multiple of `interval`, or after about a second."""
    length = 1 if seconds_per_step is None else max(1, int(_CHUNK_SECONDS / seconds_per_step))
    stop = min(steps, start + length)
    return min(stop, (start // interval + 1) * interval) if interval else stop
