"""Where a NaN or an infinity of a run could hide from its losses."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxtrain.optimizers import has_line_search
from jaxtrain.state import TrainState


@jax.jit
def largest_parameter(params: PyTree) -> Array:
    """The largest absolute value of all parameters; NaN or infinite where one of them is."""
    found = [
        jnp.abs(leaf).max().astype(jnp.float32) for leaf in jax.tree.leaves(params) if leaf.size
    ]
    return jnp.stack([jnp.zeros(()), *found]).max()


def hides_nonfinite(state: TrainState) -> bool:
    """Whether an infinite gradient can leave parameters finite, so that no later loss shows it.

    Rprop goes by signs, clipping by value makes a number of an infinity. With other optimizers
    a parameter stays NaN or infinite once it is, and to look at it at an epoch's end is enough.
    """
    if has_line_search(state.opt_state):
        return False  # a step of it is an epoch, whose gradient is measured
    leaves, structure = jax.tree.flatten(state.params)
    return _rule_hides_nonfinite(state.tx, structure, tuple(leaf.dtype for leaf in leaves))


@functools.lru_cache(maxsize=64)  # a caller of many short runs compiles it once
def _rule_hides_nonfinite(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    dtypes: tuple[np.dtype, ...],
) -> bool:
    @jax.jit
    def updated(params: PyTree, gradient: Array) -> PyTree:
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    # One number for each parameter: it is the rule that is asked for.
    params = jax.tree.unflatten(structure, [jnp.ones((), dtype) for dtype in dtypes])
    try:
        after = [updated(params, jnp.float32(gradient)) for gradient in (math.inf, math.nan)]
    except Exception:  # an optimizer for which the shape of a parameter matters
        return True
    return any(np.isfinite(leaf).any() for leaf in jax.tree.leaves(after))
