"""The adapter of Equinox modules maps them over the batch, as their users do."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import jaxtrain as jt
from jaxtrain import adapters

INPUTS = jax.random.normal(jax.random.key(3), (8, 4))
TARGETS = jnp.arange(8) % 3
KEY = jax.random.key(0)


class Network(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear
    table: Array

    def __init__(self, seed: int = 0, rate: float = 0.5, axis_name: str = "batch") -> None:
        keys = jax.random.split(jax.random.key(seed))
        self.hidden = eqx.nn.Linear(4, 16, key=keys[0])
        self.norm = eqx.nn.BatchNorm(16, axis_name=axis_name, mode="batch", momentum=0.9)
        self.dropout = eqx.nn.Dropout(rate)
        self.out = eqx.nn.Linear(16, 3, key=keys[1])
        self.table = jnp.arange(16)[::-1]

    def __call__(self, x: Array, state: Any, *, key: Any) -> tuple[Array, Any]:
        keys = jax.random.split(key)
        x, state = self.norm(self.hidden(x), state)
        x = self.dropout(jax.nn.relu(x), key=keys[0])[self.table]
        return self.out(x), state


MODULES = {
    "with its state": eqx.nn.make_with_state(Network),
    "without its state": Network,
}


@pytest.fixture(params=MODULES)
def make(request) -> Any:
    return MODULES[request.param]


def start(module: Any) -> tuple[jt.Model, Any, Any]:
    model, held = adapters.adapt(module, ())
    assert held is not None
    return model, *held


def train(start: tuple[jt.Model, Any, Any], key: Array = KEY) -> tuple[Any, Any]:
    model, params, model_state = start
    return model.apply(params, model_state, INPUTS, train=True, key=key)


def evaluate(start: tuple[jt.Model, Any, Any], inputs: Any = INPUTS) -> tuple[Any, Any]:
    model, params, model_state = start
    return model.apply(params, model_state, inputs, train=False, key=None)


def trained(module: Any, steps: int = 20) -> tuple[list[float], tuple[jt.Model, Any, Any]]:
    """Returns the losses of a few gradient steps, and the model after them."""
    model, params, model_state = start(module)

    def loss(params, model_state):
        outputs, model_state = model.apply(params, model_state, INPUTS, train=True, key=KEY)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, TARGETS)
        return losses.mean(), model_state

    @jax.jit
    def step(params, model_state):
        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(params, model_state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), model_state, value

    values = []
    for _ in range(steps):
        params, model_state, value = step(params, model_state)
        values.append(float(value))
    return values, (model, params, model_state)


def mapped(module: Any, state: Any, keys: Any, inputs: Any = INPUTS) -> tuple[Any, Any]:
    """Returns the outputs of the module itself, mapped over the batch."""
    call = jax.vmap(
        lambda x, state, key: module(x, state, key=key),
        in_axes=(0, None, 0),
        out_axes=(0, None),
        axis_name="batch",
    )
    return call(inputs, state, keys)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected
    )


def test_only_inexact_arrays_are_parameters(make) -> None:
    _, params, model_state = start(make())
    assert params.hidden.weight.shape == (16, 4)
    assert params.table is None
    assert_equal(model_state["constants"].table, jnp.arange(16)[::-1])
    assert isinstance(model_state["state"], eqx.nn.State)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))


def test_gradient_steps_reduce_the_loss(make) -> None:
    values, _ = trained(make())
    assert values[-1] < 0.7 * values[0]


def test_evaluation_equals_that_of_the_module_and_keeps_the_state(make) -> None:
    _, (model, params, model_state) = trained(make(), steps=2)
    outputs, after = evaluate((model, params, model_state))
    assert after is model_state
    assert_equal(outputs, evaluate((model, params, model_state))[0])
    module, _ = eqx.nn.make_with_state(Network)()
    module = eqx.tree_at(
        lambda m: (m.hidden, m.norm.weight, m.norm.bias, m.out),
        eqx.nn.inference_mode(module),
        (params.hidden, params.norm.weight, params.norm.bias, params.out),
    )
    keys = jax.random.split(KEY, 8)
    assert_close(outputs, mapped(module, model_state["state"], keys)[0])


def test_training_equals_that_of_the_module_with_a_key_per_example(make) -> None:
    outputs, after = train(start(make()))
    module, state = eqx.nn.make_with_state(Network)()
    expected, state = mapped(module, state, jax.random.split(KEY, 8))
    assert_close(outputs, expected)
    assert_close(jax.tree.leaves(after["state"]), jax.tree.leaves(state))


def test_training_returns_a_new_state(make) -> None:
    first = start(make())
    _, after = train(first)
    assert jax.tree.structure(after) == jax.tree.structure(first[2])
    old, new = jax.tree.leaves(first[2]["state"]), jax.tree.leaves(after["state"])
    assert all((x != y).any() for x, y in zip(old, new, strict=True))
    assert_equal(train(first)[1], after)


def test_dropout_depends_on_the_key_and_differs_between_examples(make) -> None:
    first = start(make())
    assert_equal(train(first)[0], train(first)[0])
    assert (train(first)[0] != train(first, jax.random.key(1))[0]).any()
    model, params, model_state = start(eqx.nn.Dropout(0.5))
    outputs, _ = model.apply(params, model_state, jnp.ones((2, 64)), train=True, key=KEY)
    assert (outputs[0] != outputs[1]).any()


def test_to_module_gives_the_same_predictions(make) -> None:
    _, result = trained(make())
    expected = evaluate(result)[0]
    module, state = adapters.to_module(*result)
    keys = jax.random.split(KEY, 8)
    assert_close(mapped(module, state, keys)[0], expected)
    again = start((module, state))
    state.set(module.norm.batch_counter, jnp.array(0))  # invalidates this state alone
    assert_close(evaluate(result)[0], expected)
    assert again[0] == result[0]
    assert_close(evaluate(again)[0], expected)


def test_to_module_returns_a_stateless_module_alone() -> None:
    result = start(eqx.nn.MLP(4, 3, 8, 1, key=KEY))
    assert result[2] == {}
    module = adapters.to_module(*result)
    assert_close(jax.vmap(module)(INPUTS), evaluate(result)[0])


def test_counters_beside_exponential_averages_are_updated() -> None:
    class Counts(eqx.Module):
        norm: eqx.nn.BatchNorm
        index: eqx.nn.StateIndex

        def __init__(self) -> None:
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="ema")
            self.index = eqx.nn.StateIndex(jnp.asarray(0))

        def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
            state = state.set(self.index, jnp.asarray(1))
            return self.norm(x, state)

    _, (model, params, model_state) = trained(Counts(), steps=3)
    module, state = adapters.to_module(model, params, model_state)
    assert state.get(module.index) == 1


def test_a_module_without_the_argument_key_is_called_without_it() -> None:
    class Double(eqx.Module):
        weight: Array

        def __call__(self, x: Array) -> Array:
            return self.weight * x

    first = start(Double(jnp.asarray(2.0)))
    assert not first[1].weight.weak_type
    assert_equal(train(first)[0], 2 * INPUTS)


def test_inputs_and_outputs_may_be_pytrees() -> None:
    class Sum(eqx.Module):
        def __call__(self, inputs: Any) -> dict[str, Array]:
            return {"sum": inputs["a"] + inputs["b"][0].sum(), "a": inputs["a"]}

    inputs = {"a": jnp.arange(3.0), "b": [jnp.ones((3, 2))]}
    outputs, _ = evaluate(start(Sum()), inputs)
    assert_equal(outputs, {"sum": jnp.arange(3.0) + 2, "a": jnp.arange(3.0)})


def test_equal_modules_have_equal_models(make) -> None:
    one, params, model_state = start(make(seed=0))
    other, *rest = start(make(seed=1))
    assert one == other
    assert hash(one) == hash(other)
    assert jax.tree.structure((params, model_state)) == jax.tree.structure(tuple(rest))
    assert start(make(rate=0.4))[0] != one
    assert start(eqx.nn.inference_mode(Network()))[0] == start(Network())[0]


def test_numpy_arrays_of_a_module_are_trained() -> None:
    class Scale(eqx.Module):
        scale: Any
        offsets: Any

        def __call__(self, x: Array) -> Array:
            return self.scale * x + self.offsets

    _, params, model_state = start(Scale(np.ones(4, np.float32), np.arange(4)))
    assert isinstance(params.scale, jax.Array)
    assert isinstance(model_state["constants"].offsets, jax.Array)


def test_a_static_field_may_be_a_list() -> None:
    class Scale(eqx.Module):
        scale: Array
        powers: list[int] = eqx.field(static=True)

        def __call__(self, x: Array) -> Array:
            return self.scale * x ** self.powers[0]

    one, other = (trained(Scale(jnp.ones(4), [2]), steps=2)[1] for _ in range(2))
    assert one[0] == other[0]
    assert hash(one[0]) == hash(other[0])
    assert start(Scale(jnp.ones(4), [3]))[0] != one[0]


def test_a_module_without_its_state_is_refused() -> None:
    module, _ = eqx.nn.make_with_state(Network)()
    with pytest.raises(jt.errors.InputError, match=r"comes without its state; expected the pair"):
        adapters.adapt(module, ())


def test_another_axis_name_is_refused() -> None:
    with pytest.raises(jt.errors.InputError, match="expected axis_name='batch'"):
        train(start(Network(axis_name="other")))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: eqx.nn.make_with_state(Network)()[1], "equinox.State; expected an eqx.Module"),
        (lambda: (Network(), None), "tuple; expected"),
        (lambda: Network, "the class Network"),
    ],
)
def test_objects_other_than_modules_are_refused(make, match) -> None:
    with pytest.raises(jt.errors.InputError, match=match):
        adapters.adapt(make(), ())


def test_init_is_refused_since_the_module_has_parameters() -> None:
    with pytest.raises(jt.errors.InputError, match="holds its own parameters"):
        start(Network())[0].init(KEY, INPUTS)
