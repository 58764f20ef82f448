"""The outputs of the models and the distribution of their initial parameters."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt


def init(model, inputs, seed=0):
    return model.init(jax.random.key(seed), inputs)["params"]


def test_layers_are_initialized_uniformly_within_1_over_root_fan_in() -> None:
    params = init(jt.models.FeedForward(), jnp.zeros((1, 784)))
    for name, fan_in in zip(sorted(params), (784, 256, 128, 64), strict=True):
        bound = 1 / math.sqrt(fan_in)
        for values in (np.asarray(params[name]["weight"]), np.asarray(params[name]["bias"])):
            assert np.abs(values).max() <= bound
            # Of n uniform draws the largest is below 0.9 of the bound with probability 0.9^n.
            assert np.abs(values).max() > (0.9 if values.size > 100 else 0.5) * bound
        weight = np.asarray(params[name]["weight"]).ravel()
        deviation = bound / math.sqrt(3)
        assert weight.std() == pytest.approx(deviation, rel=5 / math.sqrt(weight.size))
        assert abs(weight.mean()) < 5 * deviation / math.sqrt(weight.size)


def test_pixels_may_be_uint8_int32_or_floats_and_flat() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    model = jt.models.FeedForward()
    params = init(model, jnp.asarray(images))
    expected = model.apply({"params": params}, jnp.asarray(images))
    for inputs in (images.reshape(3, 784), images / np.float32(255), images.astype(np.int32)):
        logits = model.apply({"params": params}, jnp.asarray(inputs))
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_each_input_may_have_its_own_mean_and_deviation() -> None:
    table = np.random.default_rng(1).normal((5, -2, 0), (1, 10, 0.1), (7, 3)).astype(np.float32)
    mean, std = table.mean(0), table.std(0)
    options = {"key": jax.random.key(0)}
    state = jt.init_state(jt.models.FeedForward((8, 1), mean=mean, std=std), None, table, **options)
    plain = jt.init_state(jt.models.FeedForward((8, 1), mean=0, std=1), None, table, **options)
    expected = jt.predict(plain, (table - mean) / std)
    np.testing.assert_allclose(jt.predict(state, table), expected, atol=1e-5)
    with pytest.raises(jt.errors.InputError, match=r"the shape of one example; .* inputs\[None\]"):
        jt.predict(state, table[0])
    with pytest.raises(jt.errors.InputError, match="mean has 3 numbers, and an example 2 inputs"):
        jt.predict(state, table[:, :2])


def test_dropout_keeps_the_mean_and_acts_in_training_only() -> None:
    """The hidden units are 1, and the output is the mean of those kept."""
    model = jt.models.FeedForward((10_000, 1), dropout_rate=0.2, mean=0.0, std=1.0)
    params = init(model, jnp.ones((1, 1)))
    params = jax.tree.map(jnp.zeros_like, params)
    params["Dense_0"]["bias"] = jnp.ones(10_000)
    params["Dense_1"]["weight"] = jnp.full((1, 10_000), 1e-4)
    inputs = jnp.ones((4, 1))
    evaluated = model.apply({"params": params}, inputs)
    np.testing.assert_allclose(evaluated, 1.0, rtol=1e-4)
    trained = model.apply(
        {"params": params}, inputs, train=True, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_allclose(trained, 1.0, atol=0.025)  # five standard deviations of the mean
    assert len(np.unique(trained)) == 4  # each example draws its own units
    assert not np.allclose(trained, 1.0, atol=1e-4)


def test_linear_regression_computes_a_line() -> None:
    model = jt.models.LinearRegression()
    params = {"weight": jnp.array([[2.0]]), "bias": jnp.array([6.0])}
    outputs = model.apply({"params": params}, jnp.array([[0.0], [1.0], [4.0]]), train=True)
    np.testing.assert_array_equal(outputs, [[6.0], [8.0], [14.0]])


def test_linear_regression_is_initialized_from_a_normal_distribution() -> None:
    weights = np.asarray(init(jt.models.LinearRegression(500), jnp.zeros((1, 40)))["weight"])
    assert weights.std() == pytest.approx(1.0, abs=0.03)
    assert np.abs(weights).max() > 3


def test_models_do_not_rely_on_rank_promotion() -> None:
    with jax.numpy_rank_promotion("raise"):
        for model in (jt.models.LinearRegression(2), jt.models.FeedForward((5, 3))):
            inputs = jnp.ones((4, 6))
            outputs = model.apply({"params": init(model, inputs)}, inputs)
            assert outputs.shape[0] == 4
