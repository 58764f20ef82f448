"""The compiled programs of training, evaluation and prediction on many examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped

from jaxtrain import parallel
from jaxtrain.dataset import Dataset, epoch_order
from jaxtrain.losses import Loss
from jaxtrain.optimizers import global_norm
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import (
    MetricItems,
    Metrics,
    finish_metrics,
    metric_sums,
    predict_batch,
    total_weight,
    update,
)


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size"))
def compiled_epoch(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    *,
    batch_size: int,
    key: Key[Array, ""] | None,
) -> tuple[TrainState, Array]:
    """Returns the same as `train_epoch`, compiled and without checks."""

    def run(state: TrainState, dataset: Dataset, key: Array | None) -> tuple[TrainState, Array]:
        order = epoch_order(len(dataset), key)
        steps = num_steps(len(dataset), batch_size)
        state, losses, _ = train_steps(
            state, dataset, order, loss_fn, 0, steps, batch_size=batch_size
        )
        return state.replace(epoch=state.epoch + 1), losses

    return parallel.on_auto_axes(run, state, dataset, key, like=(state, None))


def num_steps(examples: int, batch_size: int) -> int:
    """Returns the number of steps per epoch, a partial last batch included."""
    return -(-examples // batch_size)


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


@functools.partial(jax.jit, static_argnames=("loss_fn", "measure"))
def train_group(
    state: TrainState,
    group: Dataset,
    loss_fn: Loss,
    count: int | Int[Array, ""],
    ends_epoch: bool | Bool[Array, ""],
    *,
    measure: str = "none",
) -> tuple[TrainState, tuple[Float[Array, "steps"], Float[Array, "steps"], Float[Array, "steps"]]]:
    """Takes one step on each batch of a group, compiled.

    Args:
      state: where to start; not modified.
      group: batches, stacked along a first axis, [steps, batch, ...].
      loss_fn: per-example loss.
      count: how many of the batches to train on; the others are not used.
      ends_epoch: whether the last of them ends an epoch.
      measure: which steps' gradient norms to compute: "none", "last" or "every".

    Returns:
      The state after them; and the losses and gradient norms of `train_steps`, and the total weight
      of each batch.
    """

    def run(
        state: TrainState, group: Dataset, count: Array, ends_epoch: Array
    ) -> tuple[TrainState, tuple[Array, Array, Array]]:
        def batch(index: int | Array) -> Dataset:
            take = functools.partial(lax.dynamic_index_in_dim, index=index, keepdims=False)
            return jax.tree.map(take, group)

        def step(index: Array, carry: tuple[TrainState, Array, Array, Array]) -> Any:
            state, losses, norms, weights = carry
            is_last = index == count - 1
            state, loss, grads = update(state, batch(index), loss_fn, last=is_last & ends_epoch)
            if measure != "none":
                wanted = True if measure == "every" else is_last
                norm = lax.cond(wanted, global_norm, lambda _: jnp.zeros((), jnp.float32), grads)
                norms = norms.at[index].set(norm.astype(norms.dtype))
            weights = weights.at[index].set(total_weight(batch(index)))
            return state, losses.at[index].set(loss), norms, weights

        size = len(group)
        dtype = jax.eval_shape(lambda: update(state, batch(0), loss_fn)[1]).dtype
        norm_dtype = jnp.promote_types(dtype, jnp.float32)
        vectors = (jnp.zeros(size, each) for each in (dtype, norm_dtype, jnp.float32))
        state, *results = lax.fori_loop(0, count, step, (state, *vectors))
        return state, tuple(results)

    return parallel.on_auto_axes(run, state, group, count, ends_epoch, like=(state, None))


@functools.partial(jax.jit, static_argnames="batch_size")
def step_weights(
    weights: Shaped[Array, "examples ..."] | None, order: Int[Array, "examples"], *, batch_size: int
) -> Float[Array, "steps"]:
    """Returns the total weight of the examples of each step of an epoch.

    Args:
      weights: weights of the examples, or None.
      order: the epoch's order of the examples.
      batch_size: examples per step.
    """

    def total(weights: Array | None, order: Array) -> Array:
        examples = len(order)
        steps = num_steps(examples, batch_size)
        per_example = jnp.ones(examples)
        if weights is not None:
            per_example = jnp.sum(weights.reshape(examples, -1), axis=1)[order] + 0.0
        padded = jnp.pad(per_example, (0, steps * batch_size - examples))
        return jnp.sum(padded.reshape(steps, batch_size), axis=1)

    return parallel.on_auto_axes(total, weights, order)


@functools.partial(jax.jit, static_argnames="skip_nonfinite")
def mean_step_loss(
    losses: Float[Array, "steps"], per_step: Float[Array, "steps"], *, skip_nonfinite: bool
) -> Float[Array, ""]:
    """Returns the mean over an epoch's examples of the loss before each update.

    Args:
      losses: the loss of each step.
      per_step: the total weight of its examples.
      skip_nonfinite: whether to leave out the steps whose loss is NaN or infinite.
    """
    per_step = per_step.astype(losses.dtype)
    if skip_nonfinite:
        finite = jnp.isfinite(losses)
        losses, per_step = jnp.where(finite, losses, 0), jnp.where(finite, per_step, 0)

    def add(sums: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[Any, None]:
        loss, weight = pair
        return (sums[0] + loss * weight, sums[1] + weight), None

    # A scan gives the same bits alone, in `fit`, and inside the program of `train`; a sum does not,
    # since XLA fuses it with the operations around it.
    zero = jnp.zeros((), losses.dtype)
    (loss, total), _ = lax.scan(add, (zero, zero), (losses, per_step))
    return jnp.where(total > 0, loss / jnp.where(total > 0, total, 1), 0)


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


@functools.partial(jax.jit, static_argnames="metrics")
def batch_sums(state: TrainState, batch: Dataset, metrics: MetricItems) -> dict[str, Any]:
    """Returns the sums of each metric over a batch, compiled."""
    sums = functools.partial(metric_sums, metrics=metrics)
    return parallel.on_auto_axes(sums, state, batch)


@functools.partial(jax.jit, static_argnames="batch_size")
def compiled_predict(state: TrainState, inputs: PyTree, *, batch_size: int) -> Any:
    """Returns the same as `predict`, compiled and without checks."""

    def run(state: TrainState, inputs: PyTree) -> Any:
        def predict(batch: PyTree) -> Any:
            return predict_batch(state, parallel.divide(batch))

        # In `jax.export`, the number of examples may be symbolic; then they are one batch.
        if not isinstance(examples, int):
            return predict(inputs)
        full, *rest = _map_batches(predict, inputs, batch_size)
        return jax.tree.map(functools.partial(_in_order, examples), full, *rest)

    examples = jax.tree.leaves(inputs)[0].shape[0]
    return parallel.on_auto_axes(run, state, inputs)


def _map_batches(function: Callable[[PyTree], PyTree], examples: PyTree, size: int) -> list[PyTree]:
    """Applies a function to all examples in batches, whose order does not matter.

    With n devices the examples form n equal parts, and each batch takes its examples from all of
    them. A data set that is sharded over the devices is thus processed where it lies.

    Returns:
      The results of the full batches, [steps, ...]; then, where there are any, the result for the
      batch of the last examples of each part, and for the examples that belong to no part.
    """
    count = len(jax.tree.leaves(examples)[0])
    devices = _parts(count)
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


def _parts(examples: int) -> int:
    """Returns how many parts `_map_batches` forms: one per device, or one for few examples."""
    devices = parallel.axis_size()
    return devices if examples >= devices else 1


def _in_order(examples: int, full: Array, *rest: Array) -> Array:
    """Joins the arrays that `_map_batches` returns, in the order of the examples."""
    devices, shape = _parts(examples), full.shape[2:]
    rest, last = (rest[:-1], rest[-1:]) if examples % devices else (rest, ())
    steps = full.reshape(len(full), devices, -1, *shape)
    parts = [jnp.swapaxes(steps, 0, 1), *rest]
    joined = jnp.concatenate([array.reshape(devices, -1, *shape) for array in parts], axis=1)
    return jnp.concatenate([joined.reshape(-1, *shape), *last])
