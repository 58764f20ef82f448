"""What is particular to Linen modules: their own `init`, RNG streams and the argument `train`."""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import jaxtrain as jt
from tests.adapters.helpers import INPUTS, KEY, assert_equal, evaluate, init, train


class Network(nn.Module):
    features: Any = (8, 3)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.features[0])(x))
        return nn.Dense(self.features[1])(x)


class Latent(nn.Module):
    """Draws from its own RNG stream, also in `init`."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(3)(x)
        assert not (train and self.is_initializing())
        if train or self.is_initializing():
            x += jax.random.normal(self.make_rng("latent"), x.shape)
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_init_matches_flax_bit_by_bit_and_needs_only_shapes() -> None:
    expected = jax.jit(Network().init, static_argnames="train")(KEY, INPUTS, train=False)
    model = init(Network()).model
    for inputs in (INPUTS, jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)):
        params, model_state = model.init(KEY, inputs)
        assert_equal({"params": params, **model_state}, dict(expected))


def test_each_rng_stream_has_its_own_key() -> None:
    state = init(Latent(), rngs=("dropout", "latent"))
    latent = jax.random.fold_in(KEY, zlib.crc32(b"latent"))
    expected = Latent().apply(
        {"params": state.params}, INPUTS, train=True, rngs={"dropout": KEY, "latent": latent}
    )
    assert_equal(train(state)[0], expected)
    assert state.model != init(Latent(), rngs=("latent", "dropout")).model


def test_rng_streams_are_a_sequence_of_names() -> None:
    with pytest.raises(jt.errors.InputError, match="expected the names of RNG streams"):
        init(Network(), rngs="dropout")


def test_a_module_without_parameters_has_none() -> None:
    state = init(nn.Sequential([jnp.square]))
    assert (state.params, state.model_state) == ({}, {})
    assert_equal(train(state)[0], INPUTS**2)


def test_an_unhashable_module_equals_itself() -> None:
    module = Network(features=np.array([8, 3]))
    assert init(module).model == init(module).model
    assert init(module).model != init(Network(features=np.array([8, 3]))).model


@pytest.mark.parametrize("call", [train, evaluate])
def test_missing_batch_statistics_are_named(call) -> None:
    state = init(Network()).replace(model_state={})
    with pytest.raises(jt.errors.InputError, match="the model_state that init_state returns"):
        call(state)


def test_a_module_holds_no_parameters() -> None:
    with pytest.raises(jt.errors.InputError, match="Linen modules hold no parameters"):
        jt.to_module(init(Network()))
