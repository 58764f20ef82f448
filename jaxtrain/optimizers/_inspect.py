"""Queries of optimizer states, also of chained and wrapped optimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

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


def _find(opt_state: Any, *kinds: type) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]
