"""Where a NaN or an infinity of a run could hide from its losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from jaxtrain.optimizers import has_line_search
from jaxtrain.state import TrainState


@jax.jit
def is_spoiled(before: PyTree, after: PyTree) -> Bool[Array, ""]:
    """Whether a number that was finite is no longer.

    (A model may keep an infinity on purpose, as the start of a running minimum.)
    """
    return jnp.array([_spoiled(*pair).any() for pair in _pairs(before, after)], bool).any()


def first_spoiled(before: PyTree, after: PyTree) -> tuple[str, float]:
    """The path of the first array that holds such a number, and the number."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(after)]
    for path, old, new in zip(paths, jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        spoiled = np.asarray(_spoiled(old, new))
        if spoiled.any():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return name, float(np.asarray(new)[spoiled][0].real)
    raise AssertionError("nothing is spoiled")


def _pairs(before: PyTree, after: PyTree) -> Iterator[tuple[Array, Array]]:
    return zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)


def _spoiled(old: Array, new: Array) -> Array:
    if not jnp.issubdtype(new.dtype, jnp.inexact):
        return jnp.zeros(new.shape, bool)
    return jnp.isfinite(old) & ~jnp.isfinite(new)


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
