"""train_epoch, evaluate and predict: one pass over a Dataset, one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from jaxtrain import parallel
from jaxtrain._arguments import check_integer, check_key
from jaxtrain.dataset import Dataset, check_dataset
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import global_norm
from jaxtrain.training._validation import check_inputs, check_line_search, check_targets
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import (
    MetricItems,
    Metrics,
    check_loss,
    finish_metrics,
    metric_items,
    metric_sums,
    predict_batch,
    update,
)


def train_epoch(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    *,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
) -> tuple[TrainState, Float[Array, "steps"]]:
    """Trains on every example once.

    A partial last batch is averaged over its own examples. The function may be called under `jit`,
    scanned over epochs, and vmapped over states.

    Args:
      state: where to start; not modified.
      dataset: inputs and targets with leading axis [examples].
      loss_fn: per-example loss.
      batch_size: examples per step; if larger than the data set, all examples are one batch.
      key: PRNG key of the shuffle; None keeps the stored order.

    Returns:
      The state after the epoch, and the loss of each step before its update, [steps].

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes.

    Example:
      >>> state, losses = jt.train_epoch(state, train, loss_fn, key=jax.random.key(1))
    """
    check_state_type(state)
    check_loss(loss_fn)
    check_dataset(dataset, "dataset")
    check_integer(batch_size, "batch_size", minimum=1)
    if key is not None:
        check_key(key)
    check_targets(state, dataset, loss_fn, "dataset")
    check_line_search(state, len(dataset), batch_size)
    with parallel.mesh_of(state, dataset):
        parallel.check_batch_size(batch_size, len(dataset))
        return _train_epoch(state, dataset, loss_fn, batch_size=batch_size, key=key)


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size"))
def _train_epoch(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    *,
    batch_size: int,
    key: Key[Array, ""] | None,
) -> tuple[TrainState, Array]:
    def run(state: TrainState, dataset: Dataset, key: Array | None) -> tuple[TrainState, Array]:
        order = epoch_order(len(dataset), key)
        steps = num_steps(len(dataset), batch_size)
        state, losses, _ = train_steps(
            state, dataset, order, loss_fn, 0, steps, batch_size=batch_size
        )
        return state.replace(epoch=state.epoch + 1), losses

    return parallel.on_auto_axes(run, state, dataset, key, returns_state=True)


def num_steps(examples: int, batch_size: int) -> int:
    """Returns the number of steps per epoch, a partial last batch included."""
    return -(-examples // batch_size)


@functools.partial(jax.jit, static_argnames="examples")
def epoch_order(examples: int, key: Key[Array, ""] | None) -> Int[Array, "examples"]:
    """Returns the order of an epoch's examples: a permutation, or as stored if key is None."""
    if key is None:
        return jnp.arange(examples, dtype=jnp.int32)
    return jax.random.permutation(key, examples)


def train_steps(
    state: TrainState,
    dataset: Dataset,
    order: Int[Array, "examples"],
    loss_fn: Loss,
    start: int | Int[Array, ""],
    stop: int | Int[Array, ""],
    *,
    batch_size: int,
    measure: str = "none",
) -> tuple[TrainState, Float[Array, "steps"], Float[Array, "steps"]]:
    """Takes the steps `start` to `stop - 1` of an epoch.

    Python integers for `start` and `stop` give at most two scans. Traced ones give one program for
    any part of an epoch, so that `fit` can return to the host between steps without recompiling.

    Args:
      state: where to start; not modified.
      dataset: inputs and targets with leading axis [examples].
      order: the epoch's order of the examples.
      loss_fn: per-example loss.
      start: the first step to take, counted from 0.
      stop: the step to stop before.
      batch_size: examples per step.
      measure: which steps' gradient norms to compute: "none", "last" or "every". On a CPU the norm
        takes about 12 % of a small network's step, so `fit` usually measures the last step alone.

    Returns:
      The state after them; the loss of each of the epoch's steps before its update; and the
      Euclidean norm of its gradient over all parameters, before any clipping. Both are 0 for
      steps that are not taken or not measured.
    """
    examples = len(dataset)
    batch_size = min(batch_size, examples)
    steps = num_steps(examples, batch_size)
    last_size = examples - (steps - 1) * batch_size
    Carry = tuple[TrainState, Array, Array]

    def step(size: int, measured: bool, index: Array, carry: Carry) -> Carry:
        state, losses, norms = carry
        indices = lax.dynamic_slice_in_dim(order, index * batch_size, size)
        batch = dataset.take(indices)
        state, loss, grads = update(state, batch, loss_fn, last=index == steps - 1)
        if measured:
            norms = norms.at[index].set(global_norm(grads).astype(norms.dtype))
        return state, losses.at[index].set(loss), norms

    first = dataset.take(order[:batch_size])
    loss_dtype = jax.eval_shape(lambda: update(state, first, loss_fn)[1]).dtype
    norm_dtype = jnp.promote_types(loss_dtype, jnp.float32)
    carry = (state, jnp.zeros(steps, loss_dtype), jnp.zeros(steps, norm_dtype))
    # The last step has its own loop if its batch is smaller or only its gradient is measured.
    separate_last = last_size != batch_size or measure == "last"
    # Python's `min` keeps the bound static; JAX then turns the loop into a scan.
    minimum = min if isinstance(stop, int) else jnp.minimum
    equal_steps = steps - 1 if separate_last else steps
    if equal_steps:
        body = functools.partial(step, batch_size, measure == "every")
        carry = lax.fori_loop(start, minimum(stop, equal_steps), body, carry)
    if separate_last:
        body = functools.partial(step, last_size, measure != "none")
        carry = lax.fori_loop(steps - 1, stop, body, carry)
    return carry


@functools.partial(jax.jit, static_argnames=("batch_size", "skip_nonfinite"))
def mean_step_loss(
    losses: Float[Array, "steps"],
    weights: Shaped[Array, "examples ..."] | None,
    order: Int[Array, "examples"],
    *,
    batch_size: int,
    skip_nonfinite: bool,
) -> Float[Array, ""]:
    """Returns the mean over an epoch's examples of the loss before each update.

    Args:
      losses: the loss of each step.
      weights: weights of the examples, or None.
      order: the epoch's order of the examples.
      batch_size: examples per step.
      skip_nonfinite: whether to leave out the steps whose loss is NaN or infinite.
    """

    def mean(losses: Array, weights: Array | None, order: Array) -> Array:
        examples, steps = len(order), len(losses)
        per_example = jnp.ones(examples, losses.dtype)
        if weights is not None:
            per_example = jnp.sum(weights.reshape(examples, -1), axis=1)[order].astype(losses.dtype)
        padded = jnp.pad(per_example, (0, steps * batch_size - examples))
        per_step = jnp.sum(padded.reshape(steps, batch_size), axis=1)
        if skip_nonfinite:
            finite = jnp.isfinite(losses)
            losses, per_step = jnp.where(finite, losses, 0), jnp.where(finite, per_step, 0)

        def add(sums: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[Any, None]:
            loss, weight = pair
            return (sums[0] + loss * weight, sums[1] + weight), None

        # A loop has the same bits alone, in `fit`, and inside the program of `train`. A sum has
        # not: XLA fuses it with what surrounds it.
        zero = jnp.zeros((), losses.dtype)
        (loss, total), _ = lax.scan(add, (zero, zero), (losses, per_step))
        return jnp.where(total > 0, loss / jnp.where(total > 0, total, 1), 0)

    return parallel.on_auto_axes(mean, losses, weights, order)


def evaluate(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    *,
    batch_size: int = 1000,
) -> Metrics:
    """Returns the mean loss and the metrics of a data set, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      dataset: inputs and targets with leading axis [examples].
      loss_fn: per-example loss.
      metric_fns: metrics by name.
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      {"loss": (weighted) mean loss over all examples, and each metric by its name}.

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes.

    Example:
      >>> jt.evaluate(state, test, jt.losses.cross_entropy, {"accuracy": jt.metrics.accuracy})
      {'loss': Array(0.167, dtype=float32), 'accuracy': Array(0.949, dtype=float32)}
    """
    check_state_type(state)
    check_dataset(dataset, "dataset")
    check_integer(batch_size, "batch_size", minimum=1)
    check_targets(state, dataset, loss_fn, "dataset")
    metrics = metric_items(loss_fn, metric_fns)
    with parallel.mesh_of(state, dataset):
        return compiled_evaluate(state, dataset, metrics, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("metrics", "batch_size"))
def compiled_evaluate(
    state: TrainState, dataset: Dataset, metrics: MetricItems, *, batch_size: int
) -> Metrics:
    """Returns the same as `evaluate`, compiled and without checks."""

    def sums(state: TrainState, dataset: Dataset) -> dict[str, Any]:
        measure = functools.partial(metric_sums, state, metrics=metrics)
        full, *rest = _map_batches(measure, dataset, batch_size)
        full = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), full)
        return functools.reduce(functools.partial(jax.tree.map, jnp.add), rest, full)

    found = parallel.on_auto_axes(sums, state, dataset)
    return finish_metrics(found, metrics, len(dataset))


def predict(state: TrainState, inputs: PyTree, *, batch_size: int = 1000) -> Any:
    """Returns the model's outputs for many inputs, in evaluation mode.

    Args:
      state: the parameters to predict with.
      inputs: array or pytree of arrays, [examples, ...].
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      Predictions [examples, ...].

    Raises:
      InputError: there are no inputs, or the batch size is below 1.

    Example:
      >>> logits = jt.predict(state, test.inputs)
      >>> labels = jnp.argmax(logits, axis=-1)
    """
    check_state_type(state)
    check_inputs(inputs)
    check_integer(batch_size, "batch_size", minimum=1)
    with parallel.mesh_of(state, inputs):
        return _predict(state, inputs, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _predict(state: TrainState, inputs: PyTree, *, batch_size: int) -> Any:
    def run(state: TrainState, inputs: PyTree) -> Any:
        def predict(batch: PyTree) -> Any:
            return predict_batch(state, parallel.divide(batch))

        full, *rest = _map_batches(predict, inputs, batch_size)
        return jax.tree.map(functools.partial(_in_order, examples), full, *rest)

    examples = len(jax.tree.leaves(inputs)[0])
    return parallel.on_auto_axes(run, state, inputs)


def _map_batches(function: Callable[[PyTree], PyTree], examples: PyTree, size: int) -> list[PyTree]:
    """Applies a function to all examples in batches, whose order does not matter.

    With n devices the examples form n equal parts, and each batch takes its examples from all of
    them. A data set that is sharded over the devices is thus processed where it lies.

    Returns:
      The results of the full batches, [steps, ...]; then, where there are any, the result for the
      batch of the last examples of each part, and for the examples that belong to no part.
    """
    count, devices = len(jax.tree.leaves(examples)[0]), parallel.axis_size()
    part = count // devices
    size = max(1, min(-(-size // devices), part))  # of one device

    def batch(start: int | Array, size: int) -> PyTree:
        def take(array: Array) -> Array:
            parts = array[: devices * part].reshape(devices, part, *array.shape[1:])
            chosen = lax.dynamic_slice_in_dim(parts, start, size, axis=1)
            return chosen.reshape(devices * size, *array.shape[1:])

        return jax.tree.map(take, examples)

    steps, left = divmod(part, size)
    results = [lax.map(lambda step: function(batch(step * size, size)), jnp.arange(steps))]
    if left:
        results.append(function(batch(steps * size, left)))
    if count % devices:
        results.append(function(jax.tree.map(lambda array: array[devices * part :], examples)))
    return results


def _in_order(examples: int, full: Array, *rest: Array) -> Array:
    """Joins the arrays that `_map_batches` returns, in the order of the examples."""
    devices, shape = parallel.axis_size(), full.shape[2:]
    rest, last = (rest[:-1], rest[-1:]) if examples % devices else (rest, ())
    steps = full.reshape(len(full), devices, -1, *shape)
    parts = [jnp.swapaxes(steps, 0, 1), *rest]
    joined = jnp.concatenate([array.reshape(devices, -1, *shape) for array in parts], axis=1)
    return jnp.concatenate([joined.reshape(-1, *shape), *last])
