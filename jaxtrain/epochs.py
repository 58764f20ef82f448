"""train_epoch, evaluate: one pass over a Dataset, one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from jaxtrain.checks import check_inputs, check_key, check_line_search, check_targets, check_whole
from jaxtrain.data.dataset import Dataset, check_dataset
from jaxtrain.health import is_spoiled
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.state import TrainState
from jaxtrain.steps import (
    Metrics,
    gradient_step,
    metric_items,
    metric_sums,
    predict_batch,
    unless_nonfinite,
)
from jaxtrain.transforms import global_norm

# The steps of an epoch whose gradient is measured.
Norms = Literal["none", "last", "every"]


def train_epoch(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    *,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
) -> tuple[TrainState, Float[Array, "steps"]]:
    """Train on every example once.

    A partial last batch is averaged over its own examples. May itself be jitted, scanned over
    epochs, vmapped over states.

    Args:
      state: where to start; left untouched.
      dataset: inputs [examples, ...] and targets [examples, ...].
      loss_fn: per-example loss.
      batch_size: examples a step, at least 1; more than there are means one batch of all.
      key: PRNG key of the order; None takes the stored order.

    Returns:
      The state after the epoch, and the loss of each step before its update, [steps].

    Raises:
      InputError: an argument is out of range; targets are no labels or probabilities where the loss
        takes such.
    """
    check_dataset(dataset, "dataset")
    check_whole(batch_size, "batch_size", least=1)
    if key is not None:
        check_key(key, "key")
    check_targets(state, dataset, loss_fn, "dataset")
    check_line_search(state, dataset.num_examples, batch_size)
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
    order = epoch_order(dataset.num_examples, key)
    steps = num_steps(dataset.num_examples, batch_size)
    state, losses, _ = train_steps(state, dataset, order, loss_fn, 0, steps, batch_size=batch_size)
    return state, losses


def num_steps(examples: int, batch_size: int) -> int:
    """Steps in an epoch, the partial last batch counted."""
    return -(-examples // batch_size)


@functools.partial(jax.jit, static_argnames="examples")
def epoch_order(examples: int, key: Key[Array, ""] | None) -> Int[Array, "examples"]:
    """The order of an epoch's examples: a permutation, or as stored if key is None."""
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
    norms: Norms = "none",
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Float[Array, "steps"], Float[Array, "steps"]]:
    """Steps `start` to `stop` of an epoch.

    With Python integers for `start` and `stop` this is two scans; with traced ones it is one
    program for any part of an epoch, which lets the host look in between without another
    compilation.

    Args:
      state: where to start; left untouched.
      dataset: inputs [examples, ...] and targets [examples, ...].
      order: the epoch's order of the examples.
      loss_fn: per-example loss.
      start: steps of this epoch that are done.
      stop: step before which to end.
      batch_size: examples a step.
      norms: the steps whose gradient's norm to compute. On a CPU it takes an eighth of a small
        network's step, so "last", the epoch's last step alone, is what `fit` asks for.
      skip_nonfinite: leave out the update of a step whose loss or gradient is not finite; norms
        must be "every".

    Returns:
      The state after them, the loss of each of the epoch's steps before its update, and the
      Euclidean norm of its gradient over all parameters, before any clipping; 0 outside
      start … stop and where no norm is computed, NaN where a step is skipped for what it would
      make of the model's other variables.
    """
    examples = dataset.num_examples
    batch_size = min(batch_size, examples)
    steps = num_steps(examples, batch_size)
    last_size = examples - (steps - 1) * batch_size
    Carry = tuple[TrainState, Array, Array]

    def step(size: int, measured: bool, index: Array, carry: Carry) -> Carry:
        before, losses, gradient_norms = carry
        indices = lax.dynamic_slice_in_dim(order, index * batch_size, size)
        after, loss, grads = gradient_step(before, dataset.take(indices), loss_fn)
        if measured:
            norm = global_norm(grads).astype(gradient_norms.dtype)
            if skip_nonfinite:
                # Batch statistics may overflow where neither loss nor gradient does.
                norm = jnp.where(is_spoiled(before.model_state, after.model_state), jnp.nan, norm)
                after = unless_nonfinite(before, after, loss, norm)
            gradient_norms = gradient_norms.at[index].set(norm)
        return after, losses.at[index].set(loss), gradient_norms

    first = dataset.take(order[:batch_size])
    loss_dtype = jax.eval_shape(lambda: gradient_step(state, first, loss_fn)[1]).dtype
    norm_dtype = jnp.promote_types(loss_dtype, jnp.float32)
    carry = (state, jnp.zeros(steps, loss_dtype), jnp.zeros(steps, norm_dtype))
    # The last step has a loop of its own, of one round or none, where its batch has a shape of its
    # own or it alone is measured.
    apart = last_size != batch_size or norms == "last"
    # Python's min keeps a known bound known to JAX, which then scans.
    least = min if isinstance(stop, int) else jnp.minimum
    alike = steps - 1 if apart else steps
    if alike:
        body = functools.partial(step, batch_size, norms == "every")
        carry = lax.fori_loop(start, least(stop, alike), body, carry)
    if apart:
        body = functools.partial(step, last_size, norms != "none")
        carry = lax.fori_loop(steps - 1, stop, body, carry)
    return carry


def evaluate(
    state: TrainState,
    dataset: Dataset,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    *,
    batch_size: int = 1000,
) -> Metrics:
    """Mean loss and metrics over a data set, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      dataset: inputs [examples, ...] and targets [examples, ...].
      loss_fn: per-example loss.
      metric_fns: further per-example functions by name.
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      {"loss": …, and each name: its mean over all examples}.

    Raises:
      InputError: an argument is out of range; targets are no labels or probabilities where the loss
        takes such.
    """
    check_dataset(dataset, "dataset")
    check_whole(batch_size, "batch_size", least=1)
    check_targets(state, dataset, loss_fn, "dataset")
    return evaluation(state, dataset, metric_items(loss_fn, metric_fns), batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("metrics", "batch_size"))
def evaluation(
    state: TrainState,
    dataset: Dataset,
    metrics: tuple[tuple[str, Metric], ...],
    *,
    batch_size: int,
) -> Metrics:
    """`evaluate` after its checks, with the metrics that `metric_items` gives."""
    full, tail = _split_batches(dataset, batch_size)
    sums = jax.tree.map(jnp.sum, lax.map(lambda batch: metric_sums(state, batch, metrics), full))
    if tail is not None:
        sums = jax.tree.map(jnp.add, sums, metric_sums(state, tail, metrics))
    return {name: total / dataset.num_examples for name, total in sums.items()}


def predict(
    state: TrainState, inputs: Shaped[Array, "examples ..."], *, batch_size: int = 1000
) -> Array:
    """The model's output for many inputs, in evaluation mode.

    Args:
      state: the parameters to predict with.
      inputs: [examples, ...].
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      Predictions [examples, ...].

    Raises:
      InputError: no inputs, or a batch size below 1.
    """
    check_inputs(inputs, "inputs")
    check_whole(batch_size, "batch_size", least=1)
    return _predict(state, inputs, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _predict(state: TrainState, inputs: Array, *, batch_size: int) -> Array:
    full, tail = _split_batches(inputs, batch_size)
    predictions = lax.map(lambda batch: predict_batch(state, batch), full)
    predictions = predictions.reshape(-1, *predictions.shape[2:])
    if tail is not None:
        predictions = jnp.concatenate([predictions, predict_batch(state, tail)])
    return predictions


def _split_batches(examples: PyTree, batch_size: int) -> tuple[PyTree, PyTree | None]:
    """The full batches, stacked along a new first axis, and the examples left over, if any."""
    count = len(jax.tree.leaves(examples)[0])
    batch_size = min(batch_size, count)
    whole = count // batch_size * batch_size
    full = jax.tree.map(
        lambda array: array[:whole].reshape(-1, batch_size, *array.shape[1:]), examples
    )
    tail = jax.tree.map(lambda array: array[whole:], examples) if whole < count else None
    return full, tail
