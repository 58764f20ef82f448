"""Gradient accumulation: one update from the gradients of several batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain._arguments import check_integer
from jaxtrain.optimizers._extra_args import accepting_extra_args


class AccumulationState(NamedTuple):
    """State of `accumulate_gradients`.

    Attributes:
      inner: state of the wrapped optimizer.
      sums: the gradients since the last update, each times the weight of its batch.
      value: the losses since then, in the same way.
      weight: the sum of these weights.
      batches: the number of batches since then, those left out included.
      updated: whether the latest batch completed an update.
    """

    inner: PyTree
    sums: PyTree
    value: Float[Array, ""]
    weight: Float[Array, ""]
    batches: Int[Array, ""]
    updated: Bool[Array, ""]


def accumulate_gradients(
    optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that makes one update from the gradients of several steps.

    The updates are those of batches `steps` times as large, for a model without dropout and batch
    norm: each gradient counts with the examples of its batch, and the last step of an epoch makes
    an update from what has accumulated, except in a run by steps. (`optax.MultiSteps` counts a
    partial last batch like a full one, and continues across epochs.) `state.step` counts the
    batches; schedules and the optimizer's own counters count the updates.

    Args:
      optimizer: any optax transformation without a line search.
      steps: batches per update.

    Returns:
      A transformation whose update also takes `weight`, the number of examples of the batch or the
      sum of their weights, and `last`, whether the epoch ends. `train_step`, `train_epoch`, `train`
      and `fit` pass both; for `train_step`, no epoch ends. Batches whose weights are all 0 make no
      update. With `skip`, which `skip_nonfinite` passes, the batch counts with the weight 0. The
      optimizer receives the mean of the losses as `value`.

    Raises:
      InputError: `steps` is below 1.

    Example:
      >>> optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.adam(1e-3), 4)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=16)  # one update, of 64
    """
    check_integer(steps, "steps", minimum=1)
    inner = accepting_extra_args(optimizer)

    def init(params: PyTree) -> AccumulationState:
        zero = jnp.zeros(())
        return AccumulationState(
            inner=inner.init(params),
            sums=jax.tree.map(jnp.zeros_like, params),
            value=zero,
            weight=zero,
            batches=jnp.zeros((), jnp.int32),
            updated=jnp.zeros((), bool),
        )

    def update(
        updates: PyTree,
        state: AccumulationState,
        params: PyTree | None = None,
        *,
        value: Array | None = None,
        weight: Array | float = 1.0,
        last: Array | bool = False,
        skip: Array | bool = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulationState]:
        weight = jnp.where(skip, 0, jnp.asarray(weight, state.weight.dtype))

        def add(total: Array, term: Any) -> Array:
            return jnp.asarray(total + weight.astype(total.dtype) * term, total.dtype)

        sums = jax.tree.map(add, state.sums, updates)
        losses = state.value if value is None else add(state.value, value)
        total = state.weight + weight
        is_due = (state.batches + 1 == steps) | last

        def wait() -> tuple[PyTree, AccumulationState]:
            zeros = jax.tree.map(jnp.zeros_like, sums)
            waiting = AccumulationState(
                state.inner, sums, losses, total, state.batches + 1, jnp.zeros((), bool)
            )
            return zeros, waiting

        def finish() -> tuple[PyTree, AccumulationState]:
            divisor = jnp.where(total == 0, 1, total)  # under vmap, also computed if dropped
            mean = jax.tree.map(lambda leaf: leaf / divisor.astype(leaf.dtype), sums)
            if value is not None:
                extra_args["value"] = losses / divisor
            changes, inner_state = inner.update(mean, state.inner, params, **extra_args)
            return changes, without_batches(state)._replace(inner=inner_state, updated=is_due)

        def drop() -> tuple[PyTree, AccumulationState]:
            return jax.tree.map(jnp.zeros_like, sums), without_batches(state)

        branch = jnp.where(is_due, jnp.where(total == 0, 2, 1), 0)
        return jax.lax.switch(branch, (wait, finish, drop))

    return optax.GradientTransformationExtraArgs(init, update)


def without_batches(state: AccumulationState) -> AccumulationState:
    """Returns the state of a wrapped optimizer to which no gradients have been added."""
    return state._replace(
        **{
            name: jax.tree.map(jnp.zeros_like, getattr(state, name))
            for name in state._fields
            if name != "inner"
        }
    )
