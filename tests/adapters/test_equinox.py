"""What is particular to Equinox modules: one example per call, and any arrays as fields."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import jaxtrain as jt
from tests.adapters.helpers import (
    DATA,
    INPUTS,
    KEY,
    LOSS,
    assert_close,
    assert_equal,
    evaluate,
    init,
    train,
)


class Network(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    table: Array
    count: eqx.nn.StateIndex

    def __init__(self, axis_name: str = "batch", mode: Any = "batch") -> None:
        self.linear = eqx.nn.Linear(4, 3, key=KEY)
        self.norm = eqx.nn.BatchNorm(3, axis_name=axis_name, mode=mode)
        self.table = jnp.arange(3)[::-1]
        self.count = eqx.nn.StateIndex(jnp.asarray(0))  # weakly typed

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        x, state = self.norm(self.linear(x)[self.table], state)
        return x, state.set(self.count, state.get(self.count) + 1)


class Scale(eqx.Module):
    scale: Any
    offsets: Any = None
    powers: list[int] = eqx.field(static=True, default_factory=lambda: [1])

    def __call__(self, x: Array) -> Array:
        return self.scale * x ** self.powers[0]


def test_only_inexact_arrays_are_parameters() -> None:
    state = init(Scale(np.ones(4, np.float32), np.arange(4)))
    assert isinstance(state.params.scale, jax.Array)
    assert state.params.offsets is None
    assert_equal(state.model_state["constants"].offsets, jnp.arange(4))
    assert not init(Scale(jnp.asarray(2.0))).params.scale.weak_type


def test_a_module_without_its_state_has_the_initial_one() -> None:
    state, pair = init(Network()), init(eqx.nn.make_with_state(Network)())
    assert state.model == pair.model
    assert isinstance(state.model_state["state"], eqx.nn.State)
    assert_equal(*(jax.tree.leaves(x.model_state) for x in (state, pair)))
    assert init(eqx.nn.inference_mode(Network())).model == state.model


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_counters_count_steps_and_the_state_is_a_copy(mode: str) -> None:
    pair = eqx.nn.make_with_state(Network)(mode=mode)
    state, _ = jt.train_epoch(init(pair), DATA, LOSS, batch_size=5)
    expected = evaluate(state)[0]
    module, module_state = jt.to_module(state)
    assert module_state.get(module.count) == 4
    module_state.set(module.count, jnp.array(0))  # invalidates this state alone
    assert_equal(evaluate(state)[0], expected)
    assert pair[1].get(module.count) == 0


def test_each_example_has_its_own_key() -> None:
    outputs, _ = train(init(eqx.nn.Dropout(0.5)), inputs=jnp.ones((2, 64)))
    assert (outputs[0] != outputs[1]).any()


def test_a_stateless_module_is_returned_alone() -> None:
    state = init(eqx.nn.MLP(4, 3, 8, 1, key=KEY))
    assert state.model_state == {}
    assert_close(jax.vmap(jt.to_module(state))(INPUTS), evaluate(state)[0])


def test_inputs_and_outputs_may_be_pytrees() -> None:
    class Sum(eqx.Module):
        def __call__(self, inputs: Any) -> dict[str, Array]:
            return {"sum": inputs["a"] + inputs["b"][0].sum(), "a": inputs["a"]}

    inputs = {"a": jnp.arange(3.0), "b": [jnp.ones((3, 2))]}
    outputs, _ = evaluate(init(Sum(), inputs), inputs)
    assert_equal(outputs, {"sum": jnp.arange(3.0) + 2, "a": jnp.arange(3.0)})


def test_a_static_field_may_be_a_list() -> None:
    one, other = (init(Scale(jnp.ones(4), powers=[2])).model for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert init(Scale(jnp.ones(4), powers=[3])).model != one


def test_another_axis_name_is_refused() -> None:
    with pytest.raises(jt.errors.InputError, match="expected axis_name='batch'"):
        train(init(Network(axis_name="other")))
