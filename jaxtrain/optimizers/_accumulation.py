"""Gradient accumulation: one update from the gradients of several batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxtrain._arguments import check_integer


class AccumulationState(NamedTuple):
    """State of `accumulate_gradients`.

    Attributes:
      inner: state of the wrapped optimizer.
      sums: the gradients since the last update, each times the weight of its batch.
      weight: the sum of these weights.
      batches: the number of batches since the last update.
    """

    inner: PyTree
    sums: PyTree
    weight: Float[Array, ""]
    batches: Int[Array, ""]


def accumulate_gradients(
    optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that makes one update from the gradients of several steps.

    The updates are those of batches `steps` times as large, for a model without dropout and batch
    norm: each gradient counts with the examples of its batch, and the last step of an epoch makes
    an update from what has accumulated. (`optax.MultiSteps` counts a partial last batch like a full
    one, and continues across epochs.) `state.step` counts the batches; schedules and the
    optimizer's own counters count the updates.

    Args:
      optimizer: any optax transformation without a line search.
      steps: batches per update.

    Returns:
      A transformation whose update also takes `weight`, the number of examples of the batch or the
      sum of their weights, and `last`, whether the epoch ends. `train_step`, `train_epoch`, `train`
      and `fit` pass both; for `train_step`, no epoch ends.

    Raises:
      InputError: `steps` is below 1.

    Example:
      >>> optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.adam(1e-3), 4)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=16)  # one update, of 64
    """
    check_integer(steps, "steps", minimum=1)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> AccumulationState:
        sums = jax.tree.map(jnp.zeros_like, params)
        return AccumulationState(inner.init(params), sums, jnp.zeros(()), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: AccumulationState,
        params: PyTree | None = None,
        *,
        weight: Array | float = 1.0,
        last: Array | bool = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulationState]:
        sums = jax.tree.map(
            lambda total, grad: total + jnp.asarray(weight, total.dtype) * grad,
            state.sums,
            updates,
        )
        total = state.weight + weight
        zeros = jax.tree.map(jnp.zeros_like, sums)

        def finish() -> tuple[PyTree, AccumulationState]:
            divisor = jnp.where(total == 0, 1, total)  # all examples masked
            mean = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), sums)
            changes, inner_state = inner.update(mean, state.inner, params, **extra_args)
            return changes, AccumulationState(
                inner_state, zeros, jnp.zeros_like(total), jnp.zeros_like(state.batches)
            )

        def wait() -> tuple[PyTree, AccumulationState]:
            return zeros, AccumulationState(state.inner, sums, total, state.batches + 1)

        return jax.lax.cond((state.batches + 1 == steps) | last, finish, wait)

    return optax.GradientTransformationExtraArgs(init, update)
