"""The adapter of NNX modules computes what the modules themselves compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import Array

import jaxtrain as jt
from jaxtrain import adapters

INPUTS = jax.random.normal(jax.random.key(3), (8, 4))
TARGETS = jnp.arange(8) % 3
KEY = jax.random.key(0)


class Network(nnx.Module):
    def __init__(self, seed: int = 0, rate: float = 0.5) -> None:
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.List([nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)])
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.hidden[0](x)))
        return self.out(self.dropout(self.hidden[1](self.dropout(x))))


def start(module: Any) -> tuple[jt.Model, Any, Any]:
    model, held = adapters.adapt(module, ())
    assert held is not None
    return model, *held


def train(start: tuple[jt.Model, Any, Any], key: Array = KEY) -> tuple[Any, Any]:
    model, params, model_state = start
    return model.apply(params, model_state, INPUTS, train=True, key=key)


def evaluate(start: tuple[jt.Model, Any, Any]) -> tuple[Any, Any]:
    model, params, model_state = start
    return model.apply(params, model_state, INPUTS, train=False, key=None)


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


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_parameters_and_state_are_dicts_of_arrays() -> None:
    _, params, model_state = start(Network())
    assert set(params) == {"hidden", "norm", "out"}
    assert params["hidden"][1]["kernel"].shape == (16, 16)
    assert set(model_state) == {"dropout", "norm"}
    leaves = jax.tree.leaves((params, model_state))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_gradient_steps_reduce_the_loss() -> None:
    values, _ = trained(Network())
    assert values[-1] < 0.7 * values[0]


def test_evaluation_equals_that_of_the_module_and_keeps_the_state() -> None:
    _, (model, params, model_state) = trained(Network(), steps=2)
    outputs, after = evaluate((model, params, model_state))
    module = Network()
    nnx.update(module, params, model_state)
    module.eval()
    assert_close(outputs, module(INPUTS))
    assert after is model_state
    assert_equal(outputs, evaluate((model, params, model_state))[0])


def test_training_equals_that_of_the_module_with_the_same_rng() -> None:
    outputs, after = train(start(Network()))
    module = Network()
    module.dropout.rngs.key.set_value(jax.random.fold_in(KEY, 0))
    module.dropout.rngs.count.set_value(jnp.uint32(0))
    module.train()
    assert_close(outputs, module(INPUTS))
    assert_close(after["norm"]["mean"], module.norm.mean[...])


def test_training_updates_statistics_and_keeps_the_rng_state() -> None:
    first = start(Network())
    _, after = train(first)
    assert jax.tree.structure(after) == jax.tree.structure(first[2])
    assert (after["norm"]["mean"] != first[2]["norm"]["mean"]).any()
    assert_equal(
        jax.random.key_data(after["dropout"]["rngs"]["key"]),
        jax.random.key_data(first[2]["dropout"]["rngs"]["key"]),
    )
    assert after["dropout"]["rngs"]["count"] == first[2]["dropout"]["rngs"]["count"]


def test_dropout_depends_on_the_key_and_not_on_the_seed_of_the_module() -> None:
    first, other = start(Network(seed=0)), start(Network(seed=1))
    assert_equal(train(first)[0], train(first)[0])
    assert (train(first)[0] != train(first, jax.random.key(1))[0]).any()
    used = Network(seed=0)
    used(INPUTS)  # increments the count of its stream
    assert_equal(train(start(used))[0], train(first)[0])
    # The parameters of one, the RNG state of the other.
    assert_equal(train((first[0], first[1], other[2]))[0], train(first)[0])


def test_dropout_layers_have_different_masks() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

        def __call__(self, x: Array) -> Array:
            return jnp.stack([layer(jnp.ones((8, 64))) for layer in self.layers])

    outputs, _ = train(start(Twice()))
    assert (outputs[0] != outputs[1]).any()


def test_a_raw_key_and_a_batch_of_streams_work() -> None:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            self.rngs = nnx.RngStream(jax.random.split(KEY, 3), tag="dropout")

        def __call__(self, x: Array) -> Array:
            return jax.vmap(lambda key: jax.random.normal(key, (4,)))(self.rngs.key[...])

    outputs, _ = train(start(Layers()), jax.random.PRNGKey(0))
    assert len(np.unique(np.asarray(outputs))) == 12


def test_the_users_module_is_not_modified() -> None:
    module = Network()
    module.eval()
    graphdef, state = nnx.split(module)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(state))
    _, result = trained(module, steps=2)
    adapters.to_module(*result).train()
    assert nnx.graphdef(module) == graphdef
    after = nnx.to_pure_dict(nnx.state(module))
    data = jax.random.key_data
    assert_equal(
        data(after["dropout"]["rngs"].pop("key")), data(before["dropout"]["rngs"].pop("key"))
    )
    assert_equal(after, before)


def test_to_module_gives_the_same_predictions() -> None:
    _, result = trained(Network())
    module = adapters.to_module(*result)
    assert isinstance(module, Network)
    assert_close(module(INPUTS), evaluate(result)[0])
    again = start(module)
    assert again[0] == result[0]
    assert_equal(again[1], result[1])


def test_equal_modules_have_equal_models() -> None:
    one, other = start(Network(seed=0))[0], start(Network(seed=1))[0]
    assert one == other
    assert hash(one) == hash(other)
    module = Network()
    module.eval()
    assert start(module)[0] == one
    assert start(Network(rate=0.4))[0] != one


def test_the_repr_of_a_model_contains_layers_and_rates_but_no_addresses() -> None:
    text = repr(start(Network(rate=0.25))[0])
    assert "hidden.1: Linear(in_features=16, out_features=16" in text
    assert "rate=0.25" in text
    assert "0x" not in text
    assert text == repr(start(Network(seed=1, rate=0.25))[0])


def test_shared_variables_stay_shared() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.encoder = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
            self.decoder = self.encoder

        def __call__(self, x: Array) -> Array:
            return self.decoder(self.encoder(x))

    model, params, model_state = start(Tied())
    assert len(jax.tree.leaves(params)) == 1
    assert model_state == {}
    module = adapters.to_module(model, params, model_state)
    assert module.encoder is module.decoder


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sown_outputs_are_not_part_of_the_state() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: Array) -> Array:
            self.sow(nnx.Intermediate, "seen", x)
            return self.linear(x)

    module = Sows()
    module(INPUTS)
    first = start(module)
    assert first[2] == {}
    assert train(first)[1] == {}


def test_the_argument_train_is_passed_to_a_module_that_has_it() -> None:
    class Flagged(nnx.Module):
        def __call__(self, x: Array, train: bool = False) -> Array:
            return x if train else -x

    first = start(Flagged())
    assert_equal(train(first)[0], INPUTS)
    assert_equal(evaluate(first)[0], -INPUTS)


def test_nnx_objects_other_than_modules_are_refused() -> None:
    with pytest.raises(jt.errors.InputError, match=r"flax.Rngs; expected an nnx.Module"):
        adapters.adapt(nnx.Rngs(0), ())


def test_init_is_refused_since_the_module_has_parameters() -> None:
    with pytest.raises(jt.errors.InputError, match="holds its own parameters"):
        start(Network())[0].init(KEY, INPUTS)
