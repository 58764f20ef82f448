"""What is particular to NNX modules: graphs, RNG streams inside the module, and sown outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

import jaxtrain as jt
from tests.adapters.helpers import DATA, INPUTS, KEY, LOSS, assert_equal, init, train


class Network(nnx.Module):
    """Two layers draw from one stream."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.hidden[0](x)))
        return self.out(self.dropout(self.hidden[1](self.dropout(x))))


@pytest.fixture(scope="module")
def state() -> jt.TrainState:
    return init(Network())


def test_parameters_and_state_are_dicts_of_arrays(state) -> None:
    assert set(state.params) == {"hidden", "norm", "out"}
    assert state.params["hidden"][1]["kernel"].shape == (8, 8)
    assert set(state.model_state) == {"dropout", "norm"}
    leaves = jax.tree.leaves((state.params, state.model_state))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_draws_depend_neither_on_the_seed_nor_on_earlier_calls_of_the_module(state) -> None:
    used = Network()
    used(INPUTS)  # increments the count of its stream
    assert_equal(train(init(used))[0], train(state)[0])
    other = init(Network(seed=1))
    assert_equal(train(state.replace(model_state=other.model_state))[0], train(state)[0])


def test_training_keeps_the_rng_state(state) -> None:
    before, after = (x["dropout"]["rngs"] for x in (state.model_state, train(state)[1]))
    assert_equal(jax.random.key_data(after["key"]), jax.random.key_data(before["key"]))
    assert after["count"] == before["count"]


def test_dropout_layers_have_different_masks() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

        def __call__(self, x: Array) -> Array:
            return jnp.stack([layer(jnp.ones((8, 64))) for layer in self.layers])

    outputs, _ = train(init(Twice()))
    assert (outputs[0] != outputs[1]).any()


def test_a_raw_key_and_a_batch_of_streams_work() -> None:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            self.rngs = nnx.RngStream(jax.random.split(KEY, 3), tag="dropout")

        def __call__(self, x: Array, train: bool) -> Array:
            draw = jax.vmap(lambda key: jax.random.normal(key, (4,)))
            return draw(self.rngs.key[...]) if train else x

    outputs, _ = train(init(Layers()), jax.random.PRNGKey(0))
    assert len(np.unique(np.asarray(outputs))) == 12


def test_the_users_module_is_not_modified() -> None:
    module = Network()
    module.eval()
    graphdef, variables = nnx.split(module)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))
    after, _ = jt.train_epoch(init(module), DATA, LOSS, batch_size=10)
    jt.to_module(after).train()
    assert nnx.graphdef(module) == graphdef
    found = nnx.to_pure_dict(nnx.state(module))
    keys = [x["dropout"]["rngs"].pop("key") for x in (found, before)]
    assert_equal(*map(jax.random.key_data, keys))
    assert_equal(found, before)
    assert init(module).model == init(Network()).model  # its mode does not matter


def test_the_repr_of_a_model_contains_layers_and_rates_but_no_addresses(state) -> None:
    text = repr(state.model)
    assert "hidden.1: Linear(in_features=8, out_features=8" in text
    assert "rate=0.25" in text
    assert "0x" not in text
    assert text == repr(init(Network(seed=1)).model)


def test_shared_variables_stay_shared() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.encoder = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
            self.decoder = self.encoder

        def __call__(self, x: Array) -> Array:
            return self.decoder(self.encoder(x))

    state = init(Tied())
    assert len(jax.tree.leaves(state.params)) == 1
    assert state.model_state == {}
    module = jt.to_module(state)
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
    state = init(module)
    assert state.model_state == train(state)[1] == {}
