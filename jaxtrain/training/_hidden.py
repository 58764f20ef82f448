"""Which optimizers hide a NaN or infinite gradient, so that every step must be checked."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxtrain.optimizers import has_line_search, skipped_steps
from jaxtrain.training.state import TrainState


def steps_to_measure(state: TrainState) -> str:
    """Returns which steps' gradient norms `fit` must check, "last" or "every".

    An infinite gradient usually makes parameters or optimizer state infinite permanently,
    which `check_arrays` detects at the end of the epoch. Some optimizers hide it: Rprop uses only
    the sign, clipping by value makes an infinity finite, `optax.zero_nans` replaces a NaN by 0.
    """
    if has_line_search(state.opt_state):  # an epoch is one step
        return "last"
    if skipped_steps(state.opt_state) is not None:  # the safeguard checks every gradient
        return "last"
    leaves, structure = jax.tree.flatten(state.params)
    hides = _hides_nonfinite(state.optimizer, structure, tuple(leaf.dtype for leaf in leaves))
    return "every" if hides else "last"


@functools.lru_cache(maxsize=64)  # many short runs compile it once
def _hides_nonfinite(
    optimizer: optax.GradientTransformation,
    structure: jax.tree_util.PyTreeDef,
    dtypes: tuple[np.dtype, ...],
) -> bool:
    @jax.jit
    def updated(params: PyTree, gradient: Array) -> PyTree:
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    # One number per array is enough, since only the update rule is tested.
    params = jax.tree.unflatten(structure, [jnp.ones((), dtype) for dtype in dtypes])
    try:
        after = [updated(params, jnp.float32(gradient)) for gradient in (math.inf, math.nan)]
    except Exception:  # the optimizer needs the shapes of the parameters
        return True
    return any(np.isfinite(leaf).any() for leaf in jax.tree.leaves(after))
