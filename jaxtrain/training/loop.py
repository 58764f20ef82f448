"""The compiled loops: training steps, evaluation and prediction on many examples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxtrain import parallel
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._carry import keep_types
from jaxtrain._compiler import bounded, limit_rows
from jaxtrain.data.stream import Source
from jaxtrain.dataset import (
    Dataset,
    check_dataset,
    check_inputs,
    epoch_order,
    map_examples,
    without_drop_last,
)
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.training.checks import check_run, check_source
from jaxtrain.training.sources import (
    InMemory,
    Segment,
    Streamed,
    make_source,
    segments_in_order,
)
from jaxtrain.training.state import (
    TrainState,
    check_state_type,
    next_epoch,
    recorded,
    to_shapes,
    with_epoch,
)
from jaxtrain.training.step import (
    Metrics,
    Objective,
    StepFn,
    Totals,
    batch_key,
    check_evaluation_key,
    check_first_step,
    evaluate_batch,
    finish_metrics,
    first_totals,
    make_objective,
    model_inputs,
    predict_batch,
    take_step,
)
from jaxtrain.training.tracing import check_batch_axis, traced_prediction

State = TypeVar("State")


class StepLog(NamedTuple):
    """Results of consecutive steps of an epoch: of one compiled call, or so far in a `Run`.

    Attributes:
      loss: the loss of each step before its update, [steps].
      weight: the total weight of the examples of each step, [steps].
      totals: the metrics of the steps' own predictions over all steps, for `finish_metrics`.
      recorded: what the optimizer records in each step of a call, by name, [steps].
    """

    loss: Any
    weight: Any
    totals: Totals
    recorded: dict[str, Any] = {}  # noqa: RUF012


def train_steps(
    state: Any,
    totals: Totals | None,
    segment: Segment,
    first: int | Array,
    stop: int | Array,
    objective: Objective,
) -> tuple[Any, StepLog]:
    """Takes the steps `first` to `stop - 1` of a segment.

    Python integers for `first` and `stop` give a scan. Traced ones give one program for any part of
    a segment, so that `fit` can return to the host between steps without recompiling.

    Args:
      state: where to start.
      totals: those of the metrics over the earlier steps of the epoch, so that they do not depend
        on how an epoch is divided into calls; None for the first steps.
      segment: the data.
      first: the first step to take, counted from 0 in the segment.
      stop: the step to stop before.
      objective: what the steps minimize and measure.

    Returns:
      The state after them, and their log, in which steps that are not taken are 0, with the totals
      over the epoch so far.
    """

    def step(index: Any, carry: tuple[Any, StepLog]) -> tuple[Any, StepLog]:
        before, log = carry
        batch = segment.batch(index)
        is_last = index == segment.last
        state, loss, weight, totals = take_step(before, log.totals, batch, objective, is_last)
        state = keep_types(state, before, "the training step")
        return state, StepLog(
            log.loss.at[index].set(loss),
            log.weight.at[index].set(weight),
            totals,
            jax.tree.map(
                lambda values, new: values.at[index].set(new), log.recorded, recorded(state)
            ),
        )

    if totals is None:
        shapes = jax.eval_shape(lambda: first_totals(state, segment.batch(0), objective))
        totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    steps = segment.capacity
    values = {
        name: jnp.zeros((steps, *value.shape), value.dtype)
        for name, value in recorded(state).items()
    }
    log = StepLog(jnp.zeros(steps), jnp.zeros(steps), totals, values)
    return lax.fori_loop(first, stop, step, (state, log))


def first_log(state: Any, batch: Dataset, objective: Objective) -> StepLog:
    """Returns an empty log on the host, for batches of the shapes of `batch`."""
    with parallel.without_mesh():  # the shapes do not depend on it
        shapes = _first_training_totals.eval_shape(to_shapes(state), batch, objective)
    none = np.zeros(0, jnp.result_type(float))
    return StepLog(none, none, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


# Jitted functions keep their traces, so the next `fit` or evaluation need not trace again.
_first_training_totals = bounded(jax.jit(first_totals, static_argnames="objective"))


@bounded
@functools.partial(jax.jit, static_argnames="objective", donate_argnames="state")
def compiled_steps(
    state: Any,
    totals: Totals | None,
    segment: Segment,
    first: int | Array,
    stop: int | Array,
    objective: Objective,
) -> tuple[Any, StepLog]:
    """Jitted `train_steps`, which donates `state`."""
    steps = functools.partial(train_steps, objective=objective)
    return parallel.on_auto_axes(steps, state, totals, segment, first, stop, like=(state, None))


@bounded
@jax.jit
def copied(state: Any) -> Any:
    """Returns a copy of the state, which `compiled_steps` may donate."""
    copy = functools.partial(jax.tree.map, jnp.copy)
    return parallel.on_auto_axes(copy, state, like=state)


def train_epoch(
    state: State,
    dataset: Dataset | tuple[Any, ...] | Iterable[Any] | Source,
    loss_fn: Loss | None = None,
    *,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
    step_fn: StepFn | None = None,
) -> tuple[State, Float[Array, "steps"]]:
    """Trains on every example once.

    A partial last batch is averaged over its own examples, or left out if the `Dataset` has
    `drop_last`. On a data set in memory the function is one compiled program, which may be called
    under `jit`, scanned over epochs, and vmapped over states.

    Args:
      state: where to start; not modified.
      dataset: inputs and targets with leading axis [examples], a `Dataset` or a tuple; or a stream,
        as for `fit`.
      loss_fn: per-example loss; may be left out with `step_fn`.
      batch_size: examples per step; if larger than the data set, all examples are one batch.
      key: PRNG key of the shuffle; None keeps the stored order.
      step_fn: a custom step function, as for `fit`.

    Returns:
      The state after the epoch, and the loss of each step before its update, [steps].

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes.
      StreamError: a stream raised an error.

    Example:
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=16, key=key)
      >>> losses.shape
      (4,)
    """
    check_arguments(train_epoch, locals())
    check_integer(batch_size, "batch_size", minimum=1)
    objective = make_objective(loss_fn, step_fn=step_fn)
    check_state_type(state, step_fn)
    with _opened(state, dataset, batch_size, key, next_epoch(state)) as source:
        check_run(state, {"train": source}, objective)
        check_first_step(
            *(state, source.batch_shapes(), objective),
            lambda: {"batch_size": source.batch_size, "the order": source.describe_order()},
        )
        if isinstance(source, Streamed):
            return _train_on_stream(state, source, objective)
        return _compiled_epoch(state, source.sample, key, objective, source.batch_size)


@contextlib.contextmanager
def _opened(
    state: Any, data: Any, batch_size: int, key: Key[Array, ""] | None, epoch: int
) -> Iterator[InMemory | Streamed]:
    """Enters the mesh of the state and the data, and yields the data as a source."""
    with contextlib.ExitStack() as stack:
        in_memory = data if isinstance(data, Dataset | tuple) else None
        stack.enter_context(parallel.mesh_of(state, in_memory))
        yield make_source(data, "dataset", batch_size, key, epoch, stack, once=True)


@bounded
@functools.partial(jax.jit, static_argnames=("objective", "batch_size"))
def _compiled_epoch(
    state: Any,
    dataset: Dataset,
    key: Key[Array, ""] | None,
    objective: Objective,
    batch_size: int,
) -> tuple[Any, Array]:
    def run(state: Any, dataset: Dataset, key: Array | None) -> tuple[Any, Array]:
        order = epoch_order(len(dataset), key)
        after, log = train_in_order(state, dataset, order, objective, batch_size)
        return with_epoch(after, state.epoch + 1), log.loss

    return parallel.on_auto_axes(run, state, dataset, key, like=(state, None))


def train_in_order(
    state: Any, dataset: Dataset, order: Array, objective: Objective, batch_size: int
) -> tuple[Any, StepLog]:
    """Trains on every example of a data set in memory; for use inside a larger program."""
    logs: list[StepLog] = []
    for segment in segments_in_order(dataset, order, batch_size):
        totals = logs[-1].totals if logs else None
        state, log = train_steps(state, totals, segment, 0, segment.steps, objective)
        logs.append(log)
    loss = jnp.concatenate([log.loss for log in logs])
    weight = jnp.concatenate([log.weight for log in logs])
    return state, StepLog(loss, weight, logs[-1].totals)


def _train_on_stream(state: Any, source: Streamed, objective: Objective) -> tuple[Any, Array]:
    losses: list[tuple[Array, int]] = []
    with contextlib.closing(source.segments(next_epoch(state))) as segments:
        begun, state = state.epoch, copied(state)
        for segment in segments:
            # At most two segments are in flight, since they take memory.
            jax.block_until_ready(losses[-2:-1])
            state, log = compiled_steps(state, None, segment, 0, segment.steps, objective)
            losses.append((log.loss, segment.steps))
    found = np.concatenate([np.asarray(loss)[:steps] for loss, steps in losses])
    return with_epoch(state, begun + 1), jnp.asarray(found)


def evaluate(
    state: TrainState,
    dataset: Dataset | tuple[Any, ...] | Iterable[Any] | Source,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    *,
    batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
) -> Metrics:
    """Returns the mean loss and the metrics of a data set, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      dataset: inputs and targets with leading axis [examples], a `Dataset` or a tuple; or a stream,
        as for `fit`.
      loss_fn: per-example loss.
      metric_fns: metrics by name.
      batch_size: examples at a time; changes memory and speed, and otherwise only what is drawn.
      key: PRNG key, for a model with `init_state(..., draws_in_evaluation=True)` or a loss with a
        parameter `key`. Batch i, counted from 0, draws from `fold_in(key, i)`, and its examples
        draw different numbers. On a mesh, the batches have other examples than on one device.

    Returns:
      {"loss": (weighted) mean loss over all examples, and each metric by its name}.

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes; a key is missing or superfluous.
      StreamError: a stream raised an error.

    Example:
      >>> metrics = jt.evaluate(state, test, loss_fn, {"accuracy": jt.metrics.accuracy})
      >>> sorted(metrics)
      ['accuracy', 'loss']
    """
    check_arguments(evaluate, locals())
    check_state_type(state)
    check_integer(batch_size, "batch_size", minimum=1)
    objective = make_objective(loss_fn, metric_fns)
    check_evaluation_key(state, key, objective.evaluated)
    with _opened(state, without_drop_last(dataset), batch_size, None, 1) as source:
        check_source(state, source, objective)
        return evaluate_source(state, source, objective, key=key)


def evaluate_source(
    state: TrainState,
    source: InMemory | Streamed,
    objective: Objective,
    epoch: int = 1,
    key: Key[Array, ""] | None = None,
) -> Metrics:
    """Returns the mean loss and the metrics of a source; see `evaluate`."""
    if isinstance(source, InMemory):
        return compiled_evaluate(state, source.sample, objective, key, batch_size=source.batch_size)
    with parallel.without_mesh():
        state_shape, key_shape = to_shapes((state, key))
        shapes = _first_totals.eval_shape(
            state_shape, None, source.batch_shapes(), key_shape, objective
        )
    totals: Any = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with contextlib.closing(source.segments(epoch)) as segments:
        for segment in segments:
            jax.block_until_ready(totals)  # segments take memory
            steps, first = segment.steps, segment.start
            totals = _compiled_totals(state, totals, segment, steps, key, first, objective)
    return finish_metrics(totals, objective.evaluated)


@bounded
@functools.partial(jax.jit, static_argnames=("objective", "batch_size"))
def compiled_evaluate(
    state: TrainState,
    dataset: Dataset,
    objective: Objective,
    key: Key[Array, ""] | None,
    *,
    batch_size: int,
) -> Metrics:
    """Returns the same as `evaluate` on data in memory, compiled and without checks."""

    def evaluate_all(state: TrainState, dataset: Dataset, key: Array | None) -> Totals:
        totals = None
        for segment in _batched(dataset, batch_size):
            steps, first = segment.steps, segment.start
            totals = eval_steps(state, totals, segment, steps, key, first, objective)
        assert totals is not None  # a data set has at least one example
        return totals

    totals = parallel.on_auto_axes(evaluate_all, state, dataset, key)
    return finish_metrics(totals, objective.evaluated)


_first_totals = bounded(jax.jit(evaluate_batch, static_argnames="objective"))


@bounded
@functools.partial(jax.jit, static_argnames="objective")
def _compiled_totals(
    state: TrainState,
    totals: Totals,
    segment: Segment,
    stop: Array,
    key: Key[Array, ""] | None,
    first: Array,
    objective: Objective,
) -> Totals:
    steps = functools.partial(eval_steps, objective=objective)
    return parallel.on_auto_axes(steps, state, totals, segment, stop, key, first)


def eval_steps(
    state: TrainState,
    totals: Totals | None,
    segment: Segment,
    stop: int | Array,
    key: Key[Array, ""] | None,
    first: int | Array,
    objective: Objective,
) -> Totals:
    """Returns the totals of the metrics after the first `stop` batches of a segment.

    `first` is the number of the first batch among all of the evaluation.
    """

    def step(index: Any, totals: Totals | None) -> Totals:
        own_key = batch_key(key, first + index)
        return evaluate_batch(state, totals, segment.batch(index), own_key, objective)

    if totals is None:
        shapes = jax.eval_shape(lambda: step(0, None))
        totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.fori_loop(0, stop, step, totals)


def predict(
    state: TrainState,
    inputs: PyTree,
    *,
    batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
) -> Any:
    """Returns the model's outputs for many inputs, in evaluation mode.

    May be called under `jax.jit`, and in `jax.export` with a symbolic number of examples, which
    are then evaluated in one batch.

    Args:
      state: the parameters to predict with.
      inputs: array or pytree of arrays, [examples, ...]; or a `Dataset`, whose targets and weights
        are not used.
      batch_size: examples at a time; changes memory and speed, and otherwise only what is drawn.
      key: PRNG key, for a model with `init_state(..., draws_in_evaluation=True)`; see `evaluate`.

    Returns:
      Predictions [examples, ...].

    Raises:
      InputError: there are no inputs, the model does not take them, the batch size is below 1, or a
        key is missing or superfluous.

    Example:
      >>> logits = jt.predict(state, test.inputs)
      >>> labels = jnp.argmax(logits, axis=-1)
      >>> labels.shape
      (16,)
    """
    check_arguments(predict, locals())
    check_state_type(state)
    shared = None
    if isinstance(inputs, Dataset):
        check_dataset(inputs, "inputs")
        inputs, shared = inputs.inputs, inputs.shared
    check_inputs(inputs)
    check_batch_axis(state, inputs)
    check_integer(batch_size, "batch_size", minimum=1)
    check_evaluation_key(state, key)
    with parallel.mesh_of(state, inputs):
        data = Dataset(inputs, shared=shared)
        try:
            return _compiled_predict(state, data, key, batch_size=batch_size)
        except Exception:
            traced_prediction(state, data, "predict")
            raise


@bounded
@functools.partial(jax.jit, static_argnames="batch_size")
def _compiled_predict(
    state: TrainState, data: Dataset, key: Key[Array, ""] | None, *, batch_size: int
) -> Any:
    def run(state: TrainState, data: Dataset, key: Array | None) -> Any:
        # In `jax.export`, the number of examples may be symbolic; then they are one batch.
        if not isinstance(examples, int):
            return predict_batch(state, model_inputs(data), batch_key(key, 0))
        found = [
            lax.map(
                lambda index, segment=segment: predict_batch(
                    state,
                    model_inputs(parallel.divide(segment.batch(index))),
                    batch_key(key, segment.start + index),
                ),
                jnp.arange(segment.steps),
            )
            for segment in _batched(data, batch_size)
        ]
        return jax.tree.map(functools.partial(_unbatched, examples), *found)

    examples = jax.tree.leaves(data)[0].shape[0]
    return parallel.on_auto_axes(run, state, data, key)


def _batched(dataset: Dataset, batch_size: int) -> list[Segment]:
    """Returns all examples as batches, for evaluation.

    With n devices the examples form n equal parts, and each batch takes its examples from all of
    them, so that a sharded data set need not be moved. The last examples of each part, and those
    that n does not divide, are segments of one batch each.
    """
    examples = len(dataset)
    devices = _parts(examples)
    part = examples // devices
    size = max(1, min(limit_rows(-(-batch_size // devices)), part))  # of one device
    steps, rest = divmod(part, size)

    def parts(array: Array) -> Array:
        return array[: devices * part].reshape(devices, part, *array.shape[1:])

    data = map_examples(parts, dataset)
    segments = [Segment(data, None, -1, devices * size, 0, steps)]
    if rest:
        ends = map_examples(lambda array: array[:, steps * size :], data)
        segments.append(Segment(ends, None, -1, devices * rest, steps, 1))
    if left := examples % devices:
        ends = map_examples(lambda array: array[None, devices * part :], dataset)
        segments.append(Segment(ends, None, -1, left, steps + (rest > 0), 1))
    return segments


def _parts(examples: int) -> int:
    """Returns how many parts `_batched` forms: one per device, or one for few examples."""
    devices = parallel.axis_size()
    return devices if examples >= devices else 1


def _unbatched(examples: int, *arrays: Array) -> Array:
    """Joins the results for the segments of `_batched`, in the order of the examples."""
    devices, shape = _parts(examples), arrays[0].shape[2:]
    arrays, left = (arrays[:-1], arrays[-1:]) if examples % devices else (arrays, ())
    parts = [
        array.reshape(len(array), devices, -1, *shape).swapaxes(0, 1).reshape(devices, -1, *shape)
        for array in arrays
    ]
    joined = jnp.concatenate(parts, axis=1).reshape(-1, *shape)
    return jnp.concatenate([joined, *(array.reshape(-1, *shape) for array in left)])
