"""What is particular to Linen modules: their own `init`, RNG streams and sown values."""

from __future__ import annotations

import operator
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import jaxtrain as jt
from tests.adapters.helpers import DATA, INPUTS, KEY, LOSS, assert_equal, evaluate, init, train


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
    with pytest.raises(jt.errors.InputError, match="rngs is 'dropout'; expected a sequence"):
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


class Sowing(nn.Module):
    """Sows 0.5 · mean square of a hidden layer, twice; in training only if asked."""

    in_training_only: bool = False
    adds: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = nn.Dense(4)(x)
        options = {"reduce_fn": operator.add, "init_fn": lambda: 0.0} if self.adds else {}
        if train or not self.in_training_only:
            for name in ("first", "second"):
                self.sow("losses", name, 0.25 * jnp.mean(h**2), **options)
        return nn.Dense(3)(h)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("in_training_only", [False, True])
def test_sown_losses_are_added_to_the_loss_of_each_step(in_training_only, precision) -> None:
    module = Sowing(in_training_only)
    network = module if precision is None else jt.mixed_precision(module, precision)
    state, plain = init(network, sown_losses=["losses"]), init(network)
    assert state.model_state == plain.model_state == {}

    def penalty(params):
        h = nn.Dense(4).apply({"params": params["Dense_0"]}, INPUTS)
        return 0.5 * jnp.mean(h**2)

    (loss, aux), grads = jt.gradients(state, DATA, LOSS)
    (unregularized, _), others = jt.gradients(plain, DATA, LOSS)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision is None else {"rtol": 0.02, "atol": 0.01}
    np.testing.assert_allclose(loss, unregularized + penalty(state.params), **tolerance)
    jax.tree.map(
        lambda found, one, other: np.testing.assert_allclose(found, one + other, **tolerance),
        grads,
        others,
        jax.grad(penalty)(state.params),
    )
    assert aux.model_state == {}
    assert jt.evaluate(state, DATA, LOSS) == jt.evaluate(plain, DATA, LOSS)


@pytest.mark.parametrize(
    ("module", "sown_losses"),
    [(Sowing(), ()), (Sowing(), ("losses",)), (Sowing(adds=True), ("losses",))],
)
def test_what_is_sown_does_not_grow_from_step_to_step(module, sown_losses) -> None:
    state = init(module, sown_losses=sown_losses)
    fitted, history = jt.fit(state, DATA, loss_fn=LOSS, epochs=2, batch_size=8)
    assert fitted.model_state == {}
    stepped = state
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
        stepped, metrics = jt.train_step(stepped, DATA[rows], LOSS)
    np.testing.assert_allclose(history.step_losses[2], metrics["loss"], rtol=1e-5)


def test_variables_that_are_tuples_are_kept() -> None:
    class Tuples(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool = False) -> Array:
            pair = self.variable("pairs", "pair", lambda: (jnp.zeros(()), jnp.ones(())))
            if train:
                pair.value = (pair.value[0] + 1, pair.value[1])
            self.sow("pairs", "inputs", x)
            return nn.Dense(3)(x)

    state, _ = jt.train_step(init(Tuples()), DATA, LOSS)
    assert state.model_state == {"pairs": {"pair": (1, 1)}}


def test_sown_losses_are_scalars_of_a_linen_module() -> None:
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            self.sow("losses", "l2", x**2)
            return nn.Dense(3)(x)

    with pytest.raises(jt.errors.InputError, match=r"sows losses\.l2\.0 of shape \(20, 4\)"):
        init(Wide(), sown_losses=("losses",))
    with pytest.raises(jt.errors.InputError, match="sown_losses has 'loss', and Sowing sows noth"):
        init(Sowing(), sown_losses=("losses", "loss"))
    with pytest.raises(jt.errors.InputError, match="sown_losses is 'losses'; expected a sequence"):
        init(Wide(), sown_losses="losses")
    model = jt.Model(lambda key, x: ({}, {}), lambda p, s, x, *, train, key: (x, s))
    with pytest.raises(jt.errors.InputError, match=r"for a jaxtrain\.Model; expected a Linen"):
        init(model, sown_losses=("losses",))
