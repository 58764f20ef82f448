"""Queries of optimizer states, also of chained and wrapped optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain.optimizers._accumulation import AccumulationState
from jaxtrain.optimizers._averaging import AverageState
from jaxtrain.optimizers._records import LINE_SEARCHES, find_nodes, records
from jaxtrain.optimizers._safeguards import SkipNonfiniteState
from jaxtrain.optimizers._transforms import ClippingState


def current_learning_rate(opt_state: Any) -> Float[Array, "..."] | None:
    """Returns the learning rate of the latest step, or None if the state does not record one.

    The optimizers of this package record it, except Rprop, which has a step size per parameter,
    and L-BFGS, which searches along each direction.

    Args:
      opt_state: `state.opt_state`.
    """
    record = records(opt_state).get("learning_rate")
    return None if record is None else record.value


def has_line_search(opt_state: Any) -> bool:
    """Returns whether an optimizer has a line search, which needs the same batch in each step.

    Args:
      opt_state: `state.opt_state`.
    """
    return bool(find_nodes(opt_state, *LINE_SEARCHES))


def has_accumulation(opt_state: Any) -> bool:
    """Returns whether an optimizer accumulates gradients by `accumulate_gradients`.

    Args:
      opt_state: `state.opt_state`.
    """
    return bool(find_nodes(opt_state, AccumulationState))


def has_clipping(opt_state: Any) -> bool:
    """Returns whether an optimizer clips gradients by `clip_gradients`.

    Args:
      opt_state: `state.opt_state`.
    """
    return bool(find_nodes(opt_state, ClippingState))


def skipped_steps(opt_state: Any) -> Int[Array, "..."] | None:
    """Returns the number of steps that `skip_nonfinite` skipped, or None without it.

    Args:
      opt_state: `state.opt_state`.
    """
    record = records(opt_state).get("skipped_steps")
    return None if record is None else record.value


def last_step_finite(opt_state: Any) -> Bool[Array, "..."] | None:
    """Returns whether `skip_nonfinite` took the last step, or None without it.

    Args:
      opt_state: `state.opt_state`.
    """
    states = find_nodes(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.logical_and, [state.finite for state in states]) if states else None


def averaged_params(opt_state: Any) -> PyTree | None:
    """Returns the average that `average_parameters` keeps, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(1e-3), 0.99)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
      >>> params = jt.optimizers.averaged_params(state.opt_state)
      >>> jax.tree.structure(params) == jax.tree.structure(state.params)
      True
    """
    states = find_nodes(opt_state, AverageState)
    return states[0].average if states else None


def evaluation_params(opt_state: Any, params: PyTree) -> PyTree:
    """Returns the parameters that evaluation uses: the average if the optimizer asks for it.

    Args:
      opt_state: `state.opt_state`.
      params: `state.params`, returned if the optimizer keeps no average or `evaluate` is False.
    """
    states = [state for state in find_nodes(opt_state, AverageState) if state.evaluate]
    return states[0].average if states else params
