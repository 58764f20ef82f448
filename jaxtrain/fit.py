"""fit: the loop over epochs, the only one on the host."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxtrain.checkpoint_files import Checkpoint, digest
from jaxtrain.checkpoints import COMPILED_EVALUATION, COMPILED_STEP, START, Checkpoints, Resume
from jaxtrain.checks import (
    check_key,
    check_line_search,
    check_state,
    check_targets,
    check_values,
    check_whole,
)
from jaxtrain.data.dataset import Dataset, check_dataset
from jaxtrain.epochs import Norms, epoch_order, evaluation, num_steps, train_steps
from jaxtrain.errors import InputError, NonFiniteLossError
from jaxtrain.events import Compiled, EpochDone, Report, Resumed, StepsDone
from jaxtrain.health import first_spoiled, hides_nonfinite, is_spoiled
from jaxtrain.history import History, Records
from jaxtrain.losses import Loss, name_of
from jaxtrain.memory import out_of_memory_explained
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import current_learning_rate
from jaxtrain.state import TrainState
from jaxtrain.steps import metric_items
from jaxtrain.versions import device_name, versions

OnNonfinite = Literal["stop", "skip"]

# The host looks in this often: a progress bar moves, and Ctrl-C is heard.
_CHUNK_SECONDS = 1.0

_train_steps = jax.jit(
    train_steps, static_argnames=("loss_fn", "batch_size", "norms", "skip_nonfinite")
)


def fit(
    state: TrainState,
    train_data: Dataset,
    test_data: Dataset | None = None,
    *,
    validation_data: Dataset | None = None,
    patience: int | None = None,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    state_metrics: Mapping[str, Callable[[TrainState], float]] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    on_nonfinite: OnNonfinite = "stop",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    keep: int = 3,
    resume: Resume = "auto",
    configuration: Mapping[str, Any] | None = None,
    log_interval: int = 100,
    report: Report | None = None,
) -> tuple[TrainState, History]:
    """Train for some epochs, evaluating after each.

    Calling it again with the state it returned, the same data and batch size continues the run (the
    epoch is counted by the state's steps): 2 and 3 epochs give exactly what 5 in one call give.

    With `checkpoint_dir` the run survives its process: the same call goes on from the newest
    checkpoint there and ends, on the same CPU with the same versions, in the same bits. (On a GPU
    XLA itself may round otherwise from process to process. A program of several calls gives each a
    folder of its own.)

    Args:
      state: where to start; left untouched.
      train_data: inputs [examples, ...] and targets [examples, ...].
      test_data: likewise; None skips evaluation.
      validation_data: likewise, evaluated after each epoch, too: what decides early stopping.
      patience: stop after so many epochs without a smaller validation loss, and return the state
        of the epoch with the smallest; None trains all epochs and returns the last state.
      loss_fn: per-example loss.
      metric_fns: further per-example functions to evaluate on test and validation data, by name.
      state_metrics: further columns of the history by name, functions of the state after an epoch.
      epochs: passes over `train_data`, at least 0; counted from `state`, also where the run goes
        on from a checkpoint.
      batch_size: examples a step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffling (epoch e is ordered by `fold_in(key, e)`); None takes the
        examples in stored order.
      on_nonfinite: what a NaN or infinity in a step's loss or gradient does: "stop" ends the run
        before the epoch is reported or kept (it looks at the losses, the last step's gradient and
        the parameters, and at every step's gradient where the optimizer could hide it); "skip"
        leaves out that step's update, its optimizer's count and so its schedule's included, and
        counts it in the history (and measures every step's gradient, which
        takes an eighth of a small network's step on a CPU).
      checkpoint_dir: folder of this run's checkpoints; None writes none.
      checkpoint_every: epochs from one checkpoint to the next; the last epoch always has one.
      keep: how many checkpoints to keep, the newest.
      resume: "auto" goes on from a checkpoint if there is one, "must" insists, "never" insists on
        an empty folder.
      configuration: what else makes this run what it is, by name (a learning rate, say), to be
        named in the error when a run with another goes on from its checkpoints. Model, start,
        data, batch size and the compiled step are compared in any case.
      log_interval: a `StepsDone` is reported at least every so many steps; 0 sets no such bound.
      report: called with `Compiled`, then `Resumed` where that is so, then `StepsDone` and
        `EpochDone` as they happen; `jaxtrain.progress.console` makes one that prints them.

    Returns:
      The state after the last epoch, and the history: arrays with one entry an epoch, `epoch`,
      `train_loss` (mean over the epoch's examples, each loss taken before its update),
      `gradient_norm` (of the epoch's last step: Euclidean, over all parameters, before any
      clipping), `skipped_steps` (with "skip"), `test_loss` and `test_NAME` for each metric,
      `validation_loss` and so on, the state's metrics, `learning_rate` (of the epoch's last step,
      for optimizers that record it) and `seconds` (training and evaluation, without compiling);
      and `step_losses`, one entry a step. Epochs behind a checkpoint are in it, too.

    Raises:
      InputError: an argument is out of range; targets are no labels or probabilities where the loss
        takes such; values are not finite; the checkpoints are of another run, in use, or none is
        whole.
      NonFiniteLossError: a loss or gradient became NaN or infinite; carries the finished epochs'
        history.
      OutOfMemoryError: the device has not the memory.
      StorageError: a checkpoint could not be written; those before it are whole.
    """
    check_whole(epochs, "epochs", least=0)
    check_whole(batch_size, "batch_size", least=1)
    check_whole(test_batch_size, "test_batch_size", least=1)
    check_whole(log_interval, "log_interval", least=0)
    check_whole(checkpoint_every, "checkpoint_every", least=1)
    check_whole(keep, "keep", least=1)
    if checkpoint_dir is None and resume == "must":
        raise InputError("resume is 'must' without checkpoint_dir; expected the run's folder of it")
    if key is not None:
        check_key(key, "key")
    if on_nonfinite not in ("stop", "skip"):
        raise InputError(f"on_nonfinite is {on_nonfinite!r}; expected 'stop' or 'skip'")
    if hasattr(report, "__enter__"):
        raise InputError(
            "report is a context manager; expected what it yields: "
            "with progress.console() as report: fit(..., report=report)"
        )
    if patience is not None:
        check_whole(patience, "patience", least=1)
        if validation_data is None:
            raise InputError(
                f"patience is {patience} without validation_data; expected some to watch, "
                "train_data.split(0.1, key) makes it"
            )
    report = report or (lambda event: None)
    state = jax.tree.map(_strongly_typed, state)
    check_state(state)
    with out_of_memory_explained(batch_size):  # data go to the device here
        train_data = _checked(train_data, "train_data", state, loss_fn)
        held_out = {
            name: _checked(data, f"{name}_data", state, loss_fn)
            for name, data in (("test", test_data), ("validation", validation_data))
            if data is not None
        }
    check_line_search(state, train_data.num_examples, batch_size)
    plan = _Plan(
        train_data=train_data,
        held_out=held_out,
        loss_fn=loss_fn,
        metrics=metric_items(loss_fn, metric_fns),
        state_metrics=dict(state_metrics or {}),
        batch_size=min(batch_size, train_data.num_examples),
        test_batch_size=test_batch_size,
        key=key,
        norms="every" if on_nonfinite == "skip" or hides_nonfinite(state) else "last",
        skip_nonfinite=on_nonfinite == "skip",
        log_interval=log_interval,
        report=report,
    )
    first_epoch = int(state.step) // plan.steps
    last_epoch = first_epoch + epochs
    records = Records(_columns(plan, state))
    best_state: TrainState | None = None

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            out_of_memory_explained(
                plan.batch_size, lambda size: _lower(plan._replace(batch_size=size), state)
            )
        )
        started = time.perf_counter()
        lowered = _lower(plan, state)
        store, resumed = None, None
        if checkpoint_dir is not None:
            store = stack.enter_context(
                Checkpoints(
                    checkpoint_dir,
                    keep=keep,
                    configuration=configuration or {},
                    identity=_identity(plan, state, patience, lowered),
                    versions={**versions(), "device": device_name()},
                )
            )
            resumed = store.load(state, resume)
        if resumed is not None:
            if resumed.epoch > last_epoch:
                raise InputError(
                    f"epochs is {epochs}, but {checkpoint_dir} holds a checkpoint of epoch "
                    f"{resumed.epoch}; expected at least {resumed.epoch - first_epoch}, or another "
                    "checkpoint_dir"
                )
            state, best_state = resumed.state, resumed.best_state
            records.restore(resumed.history)
        lowered.compile()
        for data in held_out.values():
            _lower_evaluation(plan, state, data).compile()
        epochs_done = first_epoch if resumed is None else resumed.epoch
        if records.is_over(patience):  # as it is where a finished run goes on
            last_epoch = epochs_done
        report(
            Compiled(
                time.perf_counter() - started,
                last_epoch - epochs_done,
                plan.steps,
                train_data.num_examples,
            )
        )
        if resumed is not None:
            report(Resumed(resumed.epoch, resumed.history, resumed.state))

        for epoch in range(epochs_done + 1, last_epoch + 1):
            state, row, losses = _train_epoch(plan, state, epoch, records)
            records.append(row, losses)
            report(EpochDone(epoch, row, state))
            if patience is not None and records.best_epoch() == epoch:
                best_state = state
            over = records.is_over(patience)
            last = over or epoch == last_epoch
            if store is not None and (last or epoch % checkpoint_every == 0):
                store.save(Checkpoint(epoch, state, records.history(), best_state))
            if over:
                break
    return (state if best_state is None else best_state), records.history()


class _Plan(NamedTuple):
    """What stays the same from epoch to epoch."""

    train_data: Dataset
    held_out: dict[str, Dataset]
    loss_fn: Loss
    metrics: tuple[tuple[str, Metric], ...]
    state_metrics: dict[str, Callable[[TrainState], float]]
    batch_size: int
    test_batch_size: int
    key: Key[Array, ""] | None
    norms: Norms
    skip_nonfinite: bool
    log_interval: int
    report: Report

    @property
    def steps(self) -> int:
        return num_steps(self.train_data.num_examples, self.batch_size)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiled steps are told beside their arguments."""
        return {
            "batch_size": self.batch_size,
            "norms": self.norms,
            "skip_nonfinite": self.skip_nonfinite,
        }

    @property
    def batch_sizes(self) -> np.ndarray:
        """Examples of each step of an epoch."""
        sizes = np.full(self.steps, self.batch_size)
        sizes[-1] = self.train_data.num_examples - (self.steps - 1) * self.batch_size
        return sizes


def _checked(data: Dataset, name: str, state: TrainState, loss_fn: Loss) -> Dataset:
    """The data set, fit for training, on the device once and not at every call."""
    check_dataset(data, name)
    check_values(data, name)
    data = Dataset(*map(jnp.asarray, data))
    check_targets(state, data, loss_fn, name)
    return data


def _lower(plan: _Plan, state: TrainState) -> jax.stages.Lowered:
    any_order = jax.eval_shape(
        functools.partial(epoch_order, plan.train_data.num_examples), plan.key
    )
    return _train_steps.lower(
        state,
        plan.train_data,
        any_order,
        plan.loss_fn,
        0,
        plan.steps,
        **plan.options,
    )


def _columns(plan: _Plan, state: TrainState) -> list[str]:
    columns = [
        *("epoch", "train_loss"),
        *(f"{part}_{name}" for part in plan.held_out for name, _ in plan.metrics),
        *plan.state_metrics,
        "gradient_norm",
        *(["skipped_steps"] if plan.skip_nonfinite else []),
        *([] if _learning_rate(state) is None else ["learning_rate"]),
        "seconds",
    ]
    for name in plan.state_metrics:
        if [*columns, "step_losses"].count(name) > 1:
            raise InputError(
                f"state_metrics has a column named {name!r}; that name is taken in the history, "
                "rename it"
            )
    return columns


def _train_epoch(
    plan: _Plan, state: TrainState, epoch: int, records: Records
) -> tuple[TrainState, dict[str, float], np.ndarray]:
    """The state after an epoch, its row of the history, and the loss of each step."""
    started = time.perf_counter()
    at_start = state
    epoch_key = None if plan.key is None else jax.random.fold_in(plan.key, epoch)
    order = epoch_order(plan.train_data.num_examples, epoch_key)
    sizes = plan.batch_sizes
    losses = np.empty(0, np.float32)
    norms = np.empty(0, np.float32)
    seconds_per_step: float | None = None
    while len(losses) < plan.steps:
        start = len(losses)
        stop = _next_stop(start, plan.steps, plan.log_interval, seconds_per_step)
        chunk_started = time.perf_counter()
        before = state
        state, *found = _train_steps(
            before, plan.train_data, order, plan.loss_fn, start, stop, **plan.options
        )
        chunk, chunk_norms = (np.asarray(values)[start:stop] for values in found)
        seconds_per_step = (time.perf_counter() - chunk_started) / (stop - start)
        finite = np.isfinite(chunk) & np.isfinite(chunk_norms)
        if not plan.skip_nonfinite and not finite.all():
            _stop_at_nonfinite(plan, before, order, epoch, start, finite, records)
        losses, norms = np.append(losses, chunk), np.append(norms, chunk_norms)
        plan.report(StepsDone(epoch, stop, int(sizes[:stop].sum()), float(chunk[-1]), state))

    variables = [{"params": each.params, **each.model_state} for each in (at_start, state)]
    if is_spoiled(*variables):  # which no later loss of the epoch depends on
        name, value = first_spoiled(*variables)
        rate, history = _learning_rate(state), records.history()
        raise NonFiniteLossError(
            epoch, None, f"variable {name}", value, rate, history, plan.skip_nonfinite
        )
    finite = np.isfinite(losses) & np.isfinite(norms)
    if not finite.any():  # skipped, all of them: going on would change nothing any more
        value = float(norms[0] if np.isfinite(losses[0]) else losses[0])
        quantity = "training loss or gradient norm of every step"
        rate, history = _learning_rate(state), records.history()
        raise NonFiniteLossError(epoch, None, quantity, value, rate, history, skipping=True)
    row: dict[str, float] = {
        "epoch": epoch,
        "train_loss": float(np.average(losses[finite], weights=sizes[finite])),
    }
    for name, data in plan.held_out.items():
        means = _evaluate(plan, state, data)
        row |= {f"{name}_{metric}": means[metric] for metric, _ in plan.metrics}
        value = row[f"{name}_loss"]
        if not np.isfinite(value):
            rate, history = _learning_rate(state), records.history()
            raise NonFiniteLossError(
                epoch, None, f"{name} loss", value, rate, history, plan.skip_nonfinite
            )
    row |= {name: float(measure(state)) for name, measure in plan.state_metrics.items()}
    row["gradient_norm"] = float(norms[-1])
    if plan.skip_nonfinite:
        row["skipped_steps"] = int((~finite).sum())
    last_rate = _learning_rate(state)
    if last_rate is not None:
        row["learning_rate"] = last_rate
    row["seconds"] = time.perf_counter() - started
    return state, row, losses


def _lower_evaluation(plan: _Plan, state: TrainState, data: Dataset) -> jax.stages.Lowered:
    return evaluation.lower(state, data, plan.metrics, batch_size=plan.test_batch_size)


def _evaluate(plan: _Plan, state: TrainState, data: Dataset) -> dict[str, float]:
    def lower(size: int) -> jax.stages.Lowered:
        return _lower_evaluation(plan._replace(test_batch_size=size), state, data)

    with out_of_memory_explained(plan.test_batch_size, lower, "test_batch_size"):
        means = evaluation(state, data, plan.metrics, batch_size=plan.test_batch_size)
        return {name: float(mean) for name, mean in means.items()}


def _stop_at_nonfinite(
    plan: _Plan,
    state: TrainState,
    order: Array,
    epoch: int,
    start: int,
    finite: np.ndarray,
    records: Records,
) -> NoReturn:
    """Raise, with the first step of a chunk that is not finite and what of it is not."""
    # Once more with every gradient measured: a loss can be finite whose gradient is not, and the
    # next step's loss is then the first to show it.
    options = {**plan.options, "norms": "every"}
    stop = start + len(finite)
    _, *found = _train_steps(state, plan.train_data, order, plan.loss_fn, start, stop, **options)
    losses, norms = (np.asarray(values)[start:stop] for values in found)
    bad = int(np.argmin(finite & np.isfinite(losses) & np.isfinite(norms)))
    # And up to that step, for the learning rate that it used.
    end = start + bad + 1
    state, *_ = _train_steps(state, plan.train_data, order, plan.loss_fn, start, end, **options)
    finite_loss = np.isfinite(losses[bad])
    quantity = "gradient norm" if finite_loss else "training loss"
    value = float(norms[bad] if finite_loss else losses[bad])
    raise NonFiniteLossError(epoch, end, quantity, value, _learning_rate(state), records.history())


def _identity(
    plan: _Plan, state: TrainState, patience: int | None, lowered: jax.stages.Lowered
) -> dict[str, Any]:
    """What makes a run this run and no other."""
    model = getattr(state.apply_fn, "__self__", state.apply_fn)
    data = {"training data": plan.train_data} | {
        f"{name} data": data for name, data in plan.held_out.items()
    }
    return {
        "model": re.sub(r" at 0x[0-9a-f]+|# attributes ", "", " ".join(repr(model).split())),
        "loss": name_of(plan.loss_fn),
        **{
            name: f"{part.num_examples} examples with the sum {digest(part)}"
            for name, part in data.items()
        },
        "batch_size": plan.batch_size,
        "order of the examples": "as stored" if plan.key is None else f"by key {digest(plan.key)}",
        "metrics": ", ".join(name_of(metric) for _, metric in plan.metrics),
        "columns": ", ".join(_columns(plan, state)),
        "patience": patience,
        START: digest(state),
        # All constants of model, loss and optimizer are in it.
        COMPILED_STEP: _digest_text(lowered.as_text()),
        COMPILED_EVALUATION: _digest_text(
            *(_lower_evaluation(plan, state, part).as_text() for part in plan.held_out.values())
        ),
    }


def _strongly_typed(leaf: Any) -> Any:
    """Without the mark of a Python number, which the first step would take off.

    Then every state of a run has the same types, and one compiled step fits all.
    """
    array = jnp.asarray(leaf)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return (
        array if is_key or not array.weak_type else jax.lax.convert_element_type(array, array.dtype)
    )


def _digest_text(*programs: str) -> str:
    return hashlib.sha256("".join(programs).encode()).hexdigest()[:16]


def _next_stop(start: int, steps: int, log_interval: int, seconds_per_step: float | None) -> int:
    """Where the next chunk of an epoch ends: the next log line, or about a second of work."""
    length = 1 if seconds_per_step is None else max(1, int(_CHUNK_SECONDS / seconds_per_step))
    stop = min(steps, start + length)
    if log_interval:
        stop = min(stop, (start // log_interval + 1) * log_interval)
    return stop


def _learning_rate(state: TrainState) -> float | None:
    rate = current_learning_rate(state.opt_state)
    # Seven digits are what a float32 holds: 0.01, not 0.009999999776.
    return None if rate is None else float(f"{float(rate):.7g}")
