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
    """
    if has_line_search(opt_state):
        return None
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", filtering=lambda path, value: hasattr(value, "dtype")
    )
    return found[0][1] if len(found) == 1 else None


def has_line_search(opt_state: Any) -> bool:
    """Returns whether an optimizer has a line search, which needs the same batch in each step."""
    return bool(
        _find(opt_state, optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
    )


def has_accumulation(opt_state: Any) -> bool:
    """Returns whether an optimizer accumulates gradients by `accumulate_gradients`."""
    return bool(_find(opt_state, AccumulationState))


def has_clipping(opt_state: Any) -> bool:
    """Returns whether an optimizer clips gradients by `clip_gradients`."""
    return bool(_find(opt_state, ClippingState))


def skipped_steps(opt_state: Any) -> Int[Array, "..."] | None:
    """Returns the number of steps that `skip_nonfinite` skipped, or None without it."""
    states = _find(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.maximum, [state.skipped for state in states]) if states else None


def last_step_finite(opt_state: Any) -> Bool[Array, "..."] | None:
    """Returns whether `skip_nonfinite` took the last step, or None without it."""
    states = _find(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.logical_and, [state.finite for state in states]) if states else None


def averaged_params(opt_state: Any) -> PyTree | None:
    """Returns the average that `average_parameters` keeps, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> params = jt.optimizers.averaged_params(state.opt_state)
      >>> jt.save_params("average.safetensors", state.replace(params=params))
    """
    states = _find(opt_state, AverageState)
    return states[0].average if states else None


def evaluation_params(opt_state: Any, params: PyTree) -> PyTree:
    """Returns the parameters that evaluation uses: the average if the optimizer asks for it."""
    states = [state for state in _find(opt_state, AverageState) if state.evaluate]
    return states[0].average if states else params


def _find(opt_state: Any, *kinds: type) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]
