"""Data, and short names for the calls, of the tests of the adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtrain as jt

KEY = jax.random.key(0)
LOSS = jt.losses.cross_entropy
_OPTIMIZER = optax.adam(0.01)
_LABELS = jnp.arange(20) % 3
DATA = jt.Dataset(
    jax.nn.one_hot(_LABELS, 4) + 0.3 * jax.random.normal(jax.random.key(7), (20, 4)), _LABELS
)
INPUTS = DATA.inputs


def init(module: Any, inputs: Any = INPUTS, **options: Any) -> jt.TrainState:
    return jt.init_state(module, _OPTIMIZER, inputs, key=KEY, **options)


def train(state: jt.TrainState, key: Any = KEY, inputs: Any = INPUTS) -> tuple[Any, Any]:
    """Returns the outputs in training mode, and the new model state."""
    return state.model.apply(state.params, state.model_state, inputs, train=True, key=key)


def evaluate(state: jt.TrainState, inputs: Any = INPUTS) -> tuple[Any, Any]:
    """Returns the outputs in evaluation mode, and the model state."""
    return state.model.apply(state.params, state.model_state, inputs, train=False, key=None)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
    )
