"""Queries of optimizer states, also of chained and wrapped optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain.optimizers._accumulation import AccumulationState
from jaxtrain.optimizers._averaging import AverageState
from jaxtrain.optimizers._safeguards import SkipNonfiniteState
from jaxtrain.optimizers._transforms import ClippingState


def current_learning_rate(opt_state: Any) -> Float[Array, "..."] | None:
    """Returns the learning rate of the latest step, or None if the state does not record one.

    The optimizers of this package record it, except Rprop, which has a step size per parameter,
    and L-BFGS, which searches along each direction.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> state = jt.with_optimizer(state, jt.optimizers.sgd(0.5))
      >>> jt.optimizers.current_learning_rate(state.opt_state)
      Array(0.5, dtype=float32)
    """
    if has_line_search(opt_state):
        return None
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", filtering=lambda path, value: hasattr(value, "dtype")
    )
    return found[0][1] if len(found) == 1 else None


def has_line_search(opt_state: Any) -> bool:
    """Returns whether an optimizer has a line search, which needs the same batch in each step.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> state = jt.with_optimizer(state, jt.optimizers.lbfgs())
      >>> jt.optimizers.has_line_search(state.opt_state)
      True
    """
    return bool(
        _find(opt_state, optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    )


def has_accumulation(opt_state: Any) -> bool:
    """Returns whether an optimizer accumulates gradients by `accumulate_gradients`.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.adam(1e-3), 4)
      >>> jt.optimizers.has_accumulation(optimizer.init(state.params))
      True
    """
    return bool(_find(opt_state, AccumulationState))


def has_clipping(opt_state: Any) -> bool:
    """Returns whether an optimizer clips gradients by `clip_gradients`.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.clip_gradients(jt.optimizers.adam(1e-3), 1.0)
      >>> jt.optimizers.has_clipping(optimizer.init(state.params))
      True
    """
    return bool(_find(opt_state, ClippingState))


def skipped_steps(opt_state: Any) -> Int[Array, "..."] | None:
    """Returns the number of steps that `skip_nonfinite` skipped, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.adam(1e-3))
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> bad_batch = batch.replace(inputs=batch.inputs * jnp.nan)
      >>> state, metrics = jt.train_step(state, bad_batch, loss_fn)
      >>> jt.optimizers.skipped_steps(state.opt_state)
      Array(1, dtype=int32)
    """
    states = _find(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.maximum, [state.skipped for state in states]) if states else None


def last_step_finite(opt_state: Any) -> Bool[Array, "..."] | None:
    """Returns whether `skip_nonfinite` took the last step, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.adam(1e-3))
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> bad_batch = batch.replace(inputs=batch.inputs * jnp.nan)
      >>> state, metrics = jt.train_step(state, bad_batch, loss_fn)
      >>> jt.optimizers.last_step_finite(state.opt_state)
      Array(False, dtype=bool)
    """
    states = _find(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.logical_and, [state.finite for state in states]) if states else None


def averaged_params(opt_state: Any) -> PyTree | None:
    """Returns the average that `average_parameters` keeps, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(1e-3), 0.99)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> params = jt.optimizers.averaged_params(state.opt_state)
      >>> jt.save_params("average.safetensors", state.replace(params=params))
    """
    states = _find(opt_state, AverageState)
    return states[0].average if states else None


def evaluation_params(opt_state: Any, params: PyTree) -> PyTree:
    """Returns the parameters that evaluation uses: the average if the optimizer asks for it.

    Args:
      opt_state: `state.opt_state`.
      params: `state.params`, returned if the optimizer keeps no average or `evaluate` is False.

    Example:
      >>> params = jt.optimizers.evaluation_params(state.opt_state, state.params)
      >>> params is state.params  # the optimizer keeps no average
      True
    """
    states = [state for state in _find(opt_state, AverageState) if state.evaluate]
    return states[0].average if states else params


def _find(opt_state: Any, *kinds: type) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]
