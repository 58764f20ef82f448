"""The types of the state in a compiled loop: kept, cast where that loses nothing, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

DATA = jt.Dataset(np.ones((6, 1), np.float32), np.ones((6, 1), np.float32))
LOSS = jt.losses.mean_squared_error


def make_state(start, change):
    """A state whose model state `change` maps to the next one."""
    model = jt.Model(
        lambda key, inputs: ({"w": jnp.ones((1, 1))}, {"count": start}),
        lambda params, state, inputs, *, train, key: (
            inputs @ params["w"],
            {"count": change(state["count"])} if train else state,
        ),
    )
    return jt.init_state(model, optax.sgd(0.1), DATA.inputs, key=jax.random.key(0))


LOOPS = {
    "epoch": lambda state: jt.train_epoch(state, DATA, LOSS, batch_size=2)[0],
    "train": lambda state: jt.train(state, DATA, loss_fn=LOSS, epochs=1, batch_size=2)[0],
    "fit": lambda state: jt.fit(state, DATA, loss_fn=LOSS, epochs=1, batch_size=2)[0],
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("start", "change"),
    [
        (jnp.float32(0), lambda count: count.astype(jnp.bfloat16) + 1),
        (jnp.int32(0), lambda count: count.astype(jnp.int8) + 1),
        (jnp.asarray(0.0), lambda count: count + 1),  # a weak type
    ],
    ids=["bfloat16", "int8", "weak"],
)
def test_narrower_types_are_cast_to_those_of_the_state(loop, start, change) -> None:
    count = LOOPS[loop](make_state(start, change)).model_state["count"]
    assert (count, count.dtype) == (3, start.dtype)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        (
            jnp.bfloat16(0),
            lambda count: jnp.float32(count) + 1,
            r"returned state\.model_state\.count as float32\[\]; expected bfloat16\[\]",
        ),
        (jnp.int32(0), lambda count: jnp.float32(count) + 1, r"as float32\[\]; expected int32\[\]"),
        (
            jnp.zeros(2),
            lambda count: jnp.append(count, 1.0),
            r"as float32\[3\]; expected float32\[2\]",
        ),
        (
            (jnp.zeros(()),),
            lambda count: (*count, jnp.zeros(())),
            r"another structure, which differs at state\.model_state\.count\.1",
        ),
    ],
    ids=["wider", "integer", "shape", "structure"],
)
def test_a_type_that_changes_is_named(loop, start, change, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        LOOPS[loop](make_state(start, change))
