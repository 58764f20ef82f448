"""Every optimizer that optax exports takes steps that lower the loss of a quadratic."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxtrain as jt

CONTRIB = optax.contrib
SGD = optax.sgd(0.1)
# Those whose arguments are more than a learning rate.
OTHERS = {
    "cocob": lambda: CONTRIB.cocob(alpha=2),
    "dpsgd": lambda: CONTRIB.dpsgd(0.1, 1.0, 0.1, 0),
    "galore": lambda: CONTRIB.galore(0.1, rank=1),
    "lookahead": lambda: optax.lookahead(SGD, 2, 0.5),
    "mechanize": lambda: CONTRIB.mechanize(SGD, s_init=0.1),
    "momo": lambda: CONTRIB.momo(),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "sam": lambda: CONTRIB.sam(SGD, optax.sgd(0.01)),
    "sam in a chain": lambda: optax.chain(
        optax.clip_by_global_norm(10.0), CONTRIB.sam(SGD, optax.sgd(0.01))
    ),
    "sam beside one with the loss": lambda: optax.chain(
        CONTRIB.reduce_on_plateau(), CONTRIB.sam(SGD, optax.sgd(0.01))
    ),
    "sam in a wrapper": lambda: jt.optimizers.skip_nonfinite(
        jt.optimizers.clip_gradients(CONTRIB.sam(SGD, optax.sgd(0.01)), 10.0)
    ),
    "schedule_free": lambda: CONTRIB.schedule_free(SGD, 0.1),
}
# These need more than a step has: the gradient of each example, and an objective of their own.
REFUSED = {
    "dpsgd": r"updates\.w has the shape \(2,\); expected that of the parameter, \(2, 2\)",
    "sam beside one with the loss": "refuses the argument value, and another requires it; wrap",
    "sophia": "obj_fn must be provided",
}


def optimizers() -> dict:
    """The functions whose first argument is the learning rate, by name, and `OTHERS`."""
    found = {}
    for module in (optax, CONTRIB):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = list(inspect.signature(function).parameters)
            if parameters[:1] == ["learning_rate"] and not name.startswith(("scale_by_", "_")):
                found[name] = lambda function=function: function(0.1)
    return found | OTHERS


MODEL = jt.Model(
    lambda key, x: ({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, {}),
    lambda p, s, x, *, train, key: (x @ p["w"], s),
)
DATA = jt.Dataset(jnp.eye(2), jnp.zeros((2, 2)))
LOSS = jt.losses.mean_squared_error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optax's own names
@pytest.mark.parametrize("name", optimizers())
def test_it_takes_steps(name: str) -> None:
    state = jt.init_state(MODEL, optimizers()[name](), DATA.inputs, key=jax.random.key(0))
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            jt.train_step(state, DATA, LOSS)
        return
    for _ in range(3):
        state, metrics = jt.train_step(state, DATA, LOSS)
    assert metrics["loss"] < 7.5  # that of the first parameters
