"""fit: the loop over epochs, the only one on the host."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxtrain.checks import check_key, check_labels, check_line_search, check_whole
from jaxtrain.data.dataset import Dataset, check_dataset
from jaxtrain.epochs import epoch_order, evaluation, num_steps, train_steps
from jaxtrain.errors import InputError, NonFiniteLossError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import current_learning_rate
from jaxtrain.state import TrainState
from jaxtrain.steps import metric_items

History = dict[str, np.ndarray]

# The host looks in this often: a progress bar moves, and Ctrl-C is heard.
_CHUNK_SECONDS = 1.0

_train_steps = jax.jit(train_steps, static_argnames=("loss_fn", "batch_size"))


class Compiled(NamedTuple):
    """Reported once, before the first step.

    Attributes:
      seconds: tracing and compiling, training and evaluation together.
      epochs: the epochs to come.
      steps: steps in each.
      examples: training examples in each.
    """

    seconds: float
    epochs: int
    steps: int
    examples: int


class StepsDone(NamedTuple):
    """Reported several times an epoch.

    Attributes:
      epoch: the running epoch, counted from 1.
      step: steps finished in this epoch.
      examples_seen: examples used in this epoch.
      loss: training loss of the latest step.
      state: the state after it.
    """

    epoch: int
    step: int
    examples_seen: int
    loss: float
    state: TrainState


class EpochDone(NamedTuple):
    """Reported after each epoch.

    Attributes:
      epoch: the epoch, counted from 1.
      metrics: this epoch's entry of each column of the history.
      state: the state after it.
    """

    epoch: int
    metrics: dict[str, float]
    state: TrainState


Event = Compiled | StepsDone | EpochDone
Report = Callable[[Event], None]


def fit(
    state: TrainState,
    train_data: Dataset,
    test_data: Dataset | None = None,
    *,
    validation_data: Dataset | None = None,
    patience: int | None = None,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    log_interval: int = 100,
    report: Report | None = None,
) -> tuple[TrainState, History]:
    """Train for some epochs, evaluating after each.

    Calling it again with the state it returned, the same data and batch size continues the run (the
    epoch is counted by the state's steps): 2 and 3 epochs give exactly what 5 in one call give.

    Args:
      state: where to start; left untouched.
      train_data: inputs [examples, ...] and targets [examples, ...].
      test_data: likewise; None skips evaluation.
      validation_data: likewise, evaluated after each epoch, too: what decides early stopping.
      patience: stop after so many epochs without a smaller validation loss, and return the state
        of the epoch with the smallest; None trains all epochs and returns the last state.
      loss_fn: per-example loss.
      metric_fns: further per-example functions to evaluate on test and validation data, by name.
      epochs: passes over `train_data`, at least 0.
      batch_size: examples a step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffling (epoch e is ordered by `fold_in(key, e)`); None takes the
        examples in stored order.
      log_interval: a `StepsDone` is reported at least every so many steps; 0 sets no such bound.
      report: called with `Compiled`, then `StepsDone` and `EpochDone` as they happen;
        `jaxtrain.progress.console` makes one that prints them.

    Returns:
      The state after the last epoch, and the history: arrays with one entry an epoch, `epoch`,
      `train_loss` (mean over the epoch's examples, each loss taken before its update), `test_loss`
      and `test_NAME` for each metric, `validation_loss` and so on, `learning_rate` (of the epoch's
      last step, for optimizers that record it) and `seconds` (training and evaluation, without
      compiling); and `step_losses`, one entry a step.

    Raises:
      InputError: an argument is out of range; labels do not fit the model's classes.
      NonFiniteLossError: the loss became NaN or infinite; carries the finished epochs' history.
    """
    check_dataset(train_data, "train_data")
    check_whole(epochs, "epochs", least=0)
    check_whole(batch_size, "batch_size", least=1)
    check_whole(test_batch_size, "test_batch_size", least=1)
    check_whole(log_interval, "log_interval", least=0)
    if key is not None:
        check_key(key, "key")
    if hasattr(report, "__enter__"):
        raise InputError(
            "report is a context manager; expected what it yields: "
            "with progress.console() as report: fit(..., report=report)"
        )
    # On the device once, not at every call.
    train_data = Dataset(*map(jnp.asarray, train_data))
    check_labels(state, train_data, loss_fn, "train_data")
    check_line_search(state, train_data.num_examples, batch_size)
    held_out: dict[str, Dataset] = {}
    for name, data in (("test", test_data), ("validation", validation_data)):
        if data is not None:
            check_dataset(data, f"{name}_data")
            held_out[name] = Dataset(*map(jnp.asarray, data))
            check_labels(state, held_out[name], loss_fn, f"{name}_data")
    if patience is not None:
        check_whole(patience, "patience", least=1)
        if validation_data is None:
            raise InputError(
                f"patience is {patience} without validation_data; expected some to watch, "
                "train_data.split(0.1, key) makes it"
            )
    report = report or (lambda event: None)
    examples = train_data.num_examples
    batch_size = min(batch_size, examples)
    steps = num_steps(examples, batch_size)
    first_epoch = int(state.step) // steps

    started = time.perf_counter()
    any_order = jax.eval_shape(functools.partial(epoch_order, examples), key)
    _train_steps.lower(
        state, train_data, any_order, loss_fn, 0, steps, batch_size=batch_size
    ).compile()
    metrics = metric_items(loss_fn, metric_fns)
    for data in held_out.values():
        evaluation.lower(state, data, metrics, batch_size=test_batch_size).compile()
    report(Compiled(time.perf_counter() - started, epochs, steps, examples))

    batch_sizes = np.full(steps, batch_size)
    batch_sizes[-1] = examples - (steps - 1) * batch_size
    metric_names = [f"{part}_{name}" for part in held_out for name, _ in metrics]
    rate_names = [] if _learning_rate(state) is None else ["learning_rate"]
    columns = ["epoch", "train_loss", *metric_names, *rate_names, "seconds"]
    rows: list[dict[str, float]] = []
    step_losses: list[np.ndarray] = []
    seconds_per_step: float | None = None
    best: EpochDone | None = None

    for epoch in range(first_epoch + 1, first_epoch + epochs + 1):
        epoch_started = time.perf_counter()
        epoch_key = None if key is None else jax.random.fold_in(key, epoch)
        order = epoch_order(examples, epoch_key)
        losses = np.empty(0, np.float32)
        while len(losses) < steps:
            start = len(losses)
            stop = _next_stop(start, steps, log_interval, seconds_per_step)
            chunk_started = time.perf_counter()
            before = state
            state, all_losses = _train_steps(
                state, train_data, order, loss_fn, start, stop, batch_size=batch_size
            )
            chunk = np.asarray(all_losses)[start:stop]
            seconds_per_step = (time.perf_counter() - chunk_started) / (stop - start)
            if not np.isfinite(chunk).all():
                bad = int(np.argmin(np.isfinite(chunk)))
                # Once more up to that step, for the learning rate that it used.
                state, _ = _train_steps(
                    before,
                    train_data,
                    order,
                    loss_fn,
                    start,
                    start + bad + 1,
                    batch_size=batch_size,
                )
                raise NonFiniteLossError(
                    epoch,
                    start + bad + 1,
                    float(chunk[bad]),
                    _learning_rate(state),
                    _history(columns, rows, step_losses),
                )
            losses = np.append(losses, chunk)
            report(StepsDone(epoch, stop, int(batch_sizes[:stop].sum()), float(chunk[-1]), state))
        row = {"epoch": epoch, "train_loss": float(np.average(losses, weights=batch_sizes))}
        for name, data in held_out.items():
            means = evaluation(state, data, metrics, batch_size=test_batch_size)
            row |= {f"{name}_{metric}": float(means[metric]) for metric, _ in metrics}
            if not np.isfinite(row[f"{name}_loss"]):
                raise NonFiniteLossError(
                    epoch,
                    None,
                    row[f"{name}_loss"],
                    _learning_rate(state),
                    _history(columns, rows, step_losses),
                )
        rate = _learning_rate(state)
        if rate is not None:
            row["learning_rate"] = rate
        row["seconds"] = time.perf_counter() - epoch_started
        rows.append(row)
        step_losses.append(losses)
        report(EpochDone(epoch, row, state))
        if patience is not None:
            if best is None or row["validation_loss"] < best.metrics["validation_loss"]:
                best = EpochDone(epoch, row, state)
            elif epoch - best.epoch >= patience:
                break
    return (state if best is None else best.state), _history(columns, rows, step_losses)


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


def _history(
    columns: list[str], rows: list[dict[str, float]], step_losses: list[np.ndarray]
) -> History:
    history = {name: np.asarray([row[name] for row in rows]) for name in columns}
    return history | {"step_losses": np.concatenate([np.empty(0, np.float32), *step_losses])}
