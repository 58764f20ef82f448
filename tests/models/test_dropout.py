"""Dropout's masks: their rate, and their independence of units, layers, steps, keys and examples.

Bounds are five standard deviations of what independent draws give, unless stated otherwise.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt

KEY = jax.random.key(0)


def masks(rate: float, shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """Returns dropped units, standardized to mean 0 and variance 1, for `count` keys."""
    keys = jax.random.split(jax.random.key(seed), count)
    outputs = jax.vmap(lambda key: jt.models.dropout(jnp.ones(shape), rate, key))(keys)
    dropped = np.asarray(outputs == 0, np.float32)
    return (dropped - rate) / np.sqrt(rate * (1 - rate))


def test_kept_values_are_scaled_and_the_others_are_zero() -> None:
    x = jnp.arange(1.0, 1001.0)
    y = jt.models.dropout(x, 0.25, KEY)
    kept = np.asarray(y != 0)
    np.testing.assert_array_equal(y[kept], x[kept] / 0.75)
    assert 0.25 - 5 * 0.0137 < 1 - kept.mean() < 0.25 + 5 * 0.0137


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9])
def test_rate_of_each_mask_is_that_of_independent_draws(rate: float) -> None:
    means = masks(rate, (64, 256), 200).reshape(200, -1).mean(axis=1) * 128
    assert abs(means.mean()) < 5 / np.sqrt(200)
    assert means.std() == pytest.approx(1, abs=5 / np.sqrt(2 * 200))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_units_of_a_mask_are_independent_of_each_other(rate: float) -> None:
    found = masks(rate, (64, 256), 200).reshape(200, -1)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 28, 32, 64, 128, 256, 512, 1024, 4096):
        products = (found[:, lag:] * found[:, :-lag]).mean(axis=1) * np.sqrt(64 * 256 - lag)
        # A bias of a hundredth per pair of units would be 1.3.
        assert abs(products.mean()) < 5 / np.sqrt(200), lag
        assert products.std() == pytest.approx(1, abs=5 / np.sqrt(2 * 200)), lag


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_each_unit_is_dropped_at_the_rate_and_independently_of_others_over_keys(rate) -> None:
    found = masks(rate, (1024,), 1000)
    assert np.abs(found.mean(axis=0) * np.sqrt(1000)).max() < 5.5  # of 1024
    pairs = found.T @ found / np.sqrt(1000)
    between = pairs[np.triu_indices(1024, 1)]
    assert between.std() == pytest.approx(1, abs=0.02)
    assert np.abs(between).max() < 7.5  # of 500,000


def test_masks_of_split_folded_and_adjacent_keys_are_independent() -> None:
    shape = (4096,)
    families = {
        "split": jax.random.split(KEY, 100),
        "folded": jax.vmap(lambda step: jax.random.fold_in(KEY, step))(jnp.arange(100)),
        "seeds": jax.vmap(jax.random.key)(jnp.arange(100)),
    }
    for name, keys in families.items():
        outputs = jax.vmap(lambda key: jt.models.dropout(jnp.ones(shape), 0.5, key))(keys)
        found = 2.0 * np.asarray(outputs == 0) - 1
        pairs = (found @ found.T / np.sqrt(4096))[np.triu_indices(100, 1)]
        assert pairs.std() == pytest.approx(1, abs=0.05), name
        assert np.abs(pairs).max() < 5.5, name  # of 4950


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, inputs, train: bool = False):
        first = jt.models.Dropout(0.5)(jnp.ones((len(inputs), 512)), train)
        return jnp.stack([first, jt.models.Dropout(0.5)(jnp.ones_like(first), train)])


def test_layers_and_examples_and_steps_have_masks_of_their_own() -> None:
    def outputs(step: int) -> np.ndarray:
        key = jax.random.fold_in(KEY, step)
        return np.asarray(TwoLayers().apply({}, jnp.ones((8, 1)), True, rngs={"dropout": key}))

    found = np.stack([outputs(step) for step in range(20)])  # [steps, layers, examples, units]
    flat = (found - 1).reshape(-1, 512)
    pairs = (flat @ flat.T / np.sqrt(512))[np.triu_indices(len(flat), 1)]
    assert pairs.std() == pytest.approx(1, abs=0.03)
    assert np.abs(pairs).max() < 5.5  # of 51,000


def test_the_same_key_gives_the_same_mask_compiled_vmapped_or_not() -> None:
    x = jax.random.normal(KEY, (5, 7))
    keys = jax.random.split(KEY, 3)
    eager = [jt.models.dropout(x, 0.3, key) for key in keys]
    vmapped = jax.jit(jax.vmap(lambda key: jt.models.dropout(x, 0.3, key)))(keys)
    np.testing.assert_array_equal(vmapped == 0, jnp.stack(eager) == 0)
    np.testing.assert_allclose(vmapped, jnp.stack(eager), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_kind_of_key_gives_masks_at_the_rate(implementation: str) -> None:
    keys = jax.random.split(jax.random.key(3, impl=implementation), 2)
    dropped = [np.asarray(jt.models.dropout(jnp.ones(10_000), 0.2, key) == 0) for key in keys]
    for mask in dropped:
        assert mask.mean() == pytest.approx(0.2, abs=5 * 0.004)
    assert (dropped[0] & dropped[1]).mean() == pytest.approx(0.04, abs=5 * 0.002)


def test_gradients_pass_where_units_are_kept() -> None:
    x = jnp.ones(1000)
    y, pull = jax.vjp(lambda x: jt.models.dropout(x, 0.2, KEY), x)
    np.testing.assert_array_equal(pull(jnp.ones(1000))[0], y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_kept(dtype: str) -> None:
    assert jt.models.dropout(jnp.ones(4, dtype), 0.5, KEY).dtype == dtype


def test_infinite_and_nan_units_become_zero_where_dropped() -> None:
    found = np.asarray(jt.models.dropout(jnp.array([jnp.inf, jnp.nan] * 50), 0.5, KEY))
    assert (found == 0).sum() == np.isfinite(found).sum() > 20


def test_module_needs_no_key_outside_training_and_at_rate_0() -> None:
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(jt.models.Dropout(0.5).apply({}, x), x)
    np.testing.assert_array_equal(jt.models.Dropout(0.0).apply({}, x, True), x)
    np.testing.assert_array_equal(jt.models.dropout(x, 0.0, KEY), x)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(jt.errors.InputError, match=r"rate is .*; expected a fraction in \[0, 1\)"):
        jt.models.dropout(jnp.ones(3), rate, KEY)
    with pytest.raises(jt.errors.InputError, match="rate is"):
        jt.models.Dropout(rate).apply({}, jnp.ones(3))
