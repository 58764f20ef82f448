"""fit: the loop over epochs on the host, which reports, evaluates, saves and stops."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_integer
from jaxtrain._processes import agree, check_same_start, process_lost_errors
from jaxtrain.checkpoint import Checkpoint, CheckpointOptions, CheckpointStore, PartOfEpoch
from jaxtrain.data.stream import Source
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.training._fit_epoch import run_epoch, steps_between_saves
from jaxtrain.training._hidden import steps_to_measure
from jaxtrain.training._identity import check_same_run, identify
from jaxtrain.training._plan import make_plan
from jaxtrain.training._profile import make_profile
from jaxtrain.training._validation import (
    check_not_traced,
    check_type,
    checked_callback,
    checked_state,
)
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.events import Compiled, EpochDone, OnEvent, Resumed, returned_true
from jaxtrain.training.history import History, Records
from jaxtrain.training.state import TrainState

_NO_LOSSES = np.empty(0, np.float32)


def fit(
    state: TrainState,
    train_data: Dataset | Iterable[Any] | Source,
    test_data: Dataset | Iterable[Any] | Source | None = None,
    *,
    validation_data: Dataset | Iterable[Any] | Source | None = None,
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
    profile: str | os.PathLike[str] | None = None,
    profile_steps: tuple[int, int] = (10, 20),
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
      train_data: inputs and targets with leading axis [examples]; or a stream, such as
        `jt.data.stream`, a Grain or PyTorch loader, any iterable of batches, or an object with
        `len(train_data)` and `train_data[index]`. A `Dataset` with `np.memmap` arrays is read as a
        stream.
      test_data: evaluated after each epoch; may be a stream; None skips it.
      validation_data: evaluated after each epoch, for early stopping.
      loss_fn: per-example loss.
      metric_fns: metrics to evaluate on test and validation data, by name.
      state_metrics: further columns of the history by name, functions of the state after an epoch.
      epochs: passes over `train_data` after `state`. Epochs restored from a checkpoint count, so a
        resumed run trains only the remaining ones.
      batch_size: examples per step, of all devices together; a stream of batches has its own.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle; epoch e is shuffled with `fold_in(key, e)`. None keeps the
        stored order.
      early_stopping: ends the run when a column of the history no longer improves, and returns the
        best state; None trains all epochs and returns the last state.
      checkpoint: where and how often to save the run; None saves nothing.
      on_event: called with `Compiled`, then `Resumed` if the run resumes, then `StepsDone` and
        `EpochDone` as they happen. Returning True at an `EpochDone` ends the run there; with
        several processes, that of process 0 decides.
      profile: folder of a trace that Perfetto and TensorBoard open; None records none. Each process
        of several writes the trace of its own devices, to a subfolder.
      profile_steps: first step of the trace, and the step after its last one, counted from 0 over
        the steps that this call takes. A range that includes the end of an epoch also traces the
        evaluation.
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
        the loss; the checkpoints belong to another run, are in use, or are all damaged; another
        trace is running.
      NonFiniteError: a loss, gradient or array of the state became NaN or infinite.
      OutOfMemoryError: the device has too little memory.
      StorageError: a checkpoint could not be written, and earlier ones are intact; or a trace.
      StreamError: a stream raised an error.
      MissingExtraError: data are on disk, and `jaxtrain[stream]` is not installed.
      ProcessLostError: another process of the cluster ended.

    After the arguments are checked, any exception, KeyboardInterrupt included, has the attributes
    `state` and `history` of the last completed epoch. In an epoch that was resumed within, `state`
    is the one that was restored.

    Example:
      >>> state, history = jt.fit(
      ...     state, train, test, loss_fn=loss_fn, metric_fns={"accuracy": jt.metrics.accuracy},
      ...     epochs=10, batch_size=16, key=jax.random.key(0),
      ... )
      >>> history["test_accuracy"].shape
      (10,)
    """
    check_integer(epochs, "epochs", minimum=0)
    check_type(early_stopping, "early_stopping", EarlyStopping)
    check_type(checkpoint, "checkpoint", CheckpointOptions)
    resident = train_data if isinstance(train_data, Dataset) else None
    check_not_traced(state, resident, key)
    on_event = checked_callback(on_event)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.mesh_of(state, resident, mesh=mesh))
        tracing = make_profile(profile, profile_steps)
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
            streams=True,
        )
        stack.callback(plan.close)
        records = Records(plan.columns(state), state)
        if early_stopping is not None:
            early_stopping.check_columns(records.columns)
        first, last = int(state.epoch), int(state.epoch) + epochs
        stack.enter_context(_progress_attached(records))
        if tracing is not None:
            stack.enter_context(tracing.attached())
        stack.enter_context(process_lost_errors())
        started = time.perf_counter()
        programs = plan.compile(state)
        store, resumed, every, every_steps = None, None, 1, None
        if checkpoint is not None:
            run = identify(plan, state, early_stopping, programs, checkpoint.configuration)
            store = stack.enter_context(CheckpointStore(checkpoint, run))
            every = checkpoint.every
            every_steps = steps_between_saves(plan, checkpoint.every_steps)
            resumed = store.restore(state, records.columns, functools.partial(check_same_run, run))
            store.metadata = run  # `check_same_run` may have replaced its "start"
        best_state: TrainState | None = None
        part: PartOfEpoch | None = None
        taken = _NO_LOSSES  # the losses of a part of an epoch
        if resumed is not None:
            begun = resumed.epoch + (resumed.part is not None)
            if begun > last:
                raise InputError(
                    f"epochs is {epochs}, but the checkpoint directory holds epoch {begun}; "
                    f"expected at least {begun - first}, or another directory",
                    argument="epochs",
                )
            state, best_state, part = resumed.state, resumed.best_state, resumed.part
            records.restore(resumed)
            if part is not None:
                taken = resumed.step_losses[len(resumed.step_losses) - part.step :]
        check_same_start(int(state.epoch), 0 if part is None else part.step)
        if early_stopping is not None and early_stopping.is_over(records.rows):
            last = int(state.epoch)  # early stopping ended it in an earlier call
        seconds = time.perf_counter() - started
        on_event(Compiled(seconds, last - int(state.epoch), plan.train.steps, plan.train.examples))
        if resumed is not None:
            step = 0 if part is None else part.step
            on_event(Resumed(resumed.epoch, records.history(), state, step))

        def save_part(state: TrainState, losses: np.ndarray, part: PartOfEpoch) -> None:
            assert store is not None  # since `every_steps` is not None
            history, epoch = records.history(), int(records.state.epoch)
            step_losses = np.append(history.step_losses, losses)
            store.save(Checkpoint(epoch, state, history, step_losses, best_state, part))

        for epoch in range(int(state.epoch) + 1, last + 1):
            state, row, losses = run_epoch(
                plan,
                state,
                epoch,
                on_event,
                part=part,
                losses=taken,
                every_steps=every_steps,
                save=save_part,
                profile=tracing,
            )
            part, taken = None, _NO_LOSSES
            records.append(state, row, losses)
            stop = returned_true(on_event(EpochDone(epoch, dict(records.rows[-1]), state)))
            if early_stopping is not None:
                if early_stopping.best_row(records.rows) == len(records.rows) - 1:
                    best_state = state
                stop = stop or early_stopping.is_over(records.rows)
            stop = agree(stop)  # callbacks and times differ between processes
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
