"""skip_nonfinite, which skips steps without a trace, and clip_gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree

import jaxtrain as jt
from jaxtrain.optimizers import records, skip_nonfinite

PARAMS = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array(0.25)}
GOOD = {"a": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "b": jnp.array(-1.0)}


def with_number(tree, index, number):
    """Returns the tree with one of its numbers replaced."""
    flat, unravel = ravel_pytree(tree)
    return unravel(flat.at[index].set(number))


def skipped_steps(opt_state):
    return records(opt_state)["skipped_steps"].value


def assert_identical(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_one_nonfinite_gradient_entry_skips_the_step() -> None:
    optimizer = skip_nonfinite(jt.optimizers.adam(0.1))
    _, before = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS)
    update = jax.jit(optimizer.update)
    for number in (jnp.nan, jnp.inf, -jnp.inf):
        for index in range(5):
            updates, after = update(with_number(GOOD, index, number), before, PARAMS)
            assert_identical(optax.apply_updates(PARAMS, updates), PARAMS)
            assert_identical(after.inner, before.inner)
            assert skipped_steps(after) == 1


def test_a_finite_step_equals_that_of_the_wrapped_optimizer() -> None:
    plain = jt.optimizers.adam(0.1)
    expected, inner = plain.update(GOOD, plain.init(PARAMS), PARAMS)
    optimizer = skip_nonfinite(plain)
    updates, state = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS, value=jnp.array(1.0))
    assert_identical(updates, expected)
    assert_identical(state.inner, inner)
    assert skipped_steps(state) == 0


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_nonfinite_loss_skips_the_step(value: float) -> None:
    optimizer = skip_nonfinite(optax.sgd(0.1))
    updates, state = optimizer.update(GOOD, optimizer.init(PARAMS), PARAMS, value=jnp.array(value))
    assert skipped_steps(state) == 1
    np.testing.assert_array_equal(updates["a"], 0)


@pytest.mark.parametrize("hiding", [optax.zero_nans(), optax.clip(1.0), jt.optimizers.rprop(0.1)])
def test_a_nonfinite_gradient_that_the_optimizer_hides_skips_the_step(hiding) -> None:
    optimizer = skip_nonfinite(optax.chain(hiding, optax.sgd(0.1)))
    for number in (jnp.nan, jnp.inf):
        _, state = optimizer.update(with_number(GOOD, 0, number), optimizer.init(PARAMS), PARAMS)
        assert skipped_steps(state) == 1


def test_a_second_moment_that_would_overflow_skips_the_step() -> None:
    """A gradient of 1e20 is finite; its square is not, and Adam would freeze that parameter."""
    optimizer = skip_nonfinite(jt.optimizers.adam(0.1))
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(with_number(GOOD, 2, 1e20), state, PARAMS)
    assert skipped_steps(state) == 1
    _, state = optimizer.update(GOOD, state, PARAMS)
    assert skipped_steps(state) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_model_state_that_becomes_nonfinite_skips_the_step() -> None:
    """An infinity that was in the state before is accepted, as are integers and keys."""
    optimizer = skip_nonfinite(optax.sgd(0.1))
    before = {
        "mean": jnp.array([0.0, 1.0]),
        "lowest": jnp.array(jnp.inf),
        "count": jnp.array(3),
        "key": jax.random.key(0),
    }
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(GOOD, state, PARAMS, model_states=(before, before))
    assert skipped_steps(state) == 0
    for number in (jnp.nan, jnp.inf):
        after = before | {"mean": jnp.array([0.0, number])}
        _, state = optimizer.update(GOOD, state, PARAMS, model_states=(before, after))
    assert skipped_steps(state) == 2


@pytest.mark.parametrize("bad", [[True], [False, True, True, False], [True, False, False, True]])
def test_skipped_steps_leave_no_trace(bad: list[bool]) -> None:
    """Neither in the parameters nor in the step count of the schedule."""
    schedule = jt.optimizers.step_lr(0.1, 1, 0.5)
    plain = jt.optimizers.sgd(schedule, momentum=0.9)
    optimizer = skip_nonfinite(plain)
    params, state = PARAMS, optimizer.init(PARAMS)
    expected, plain_state = PARAMS, plain.init(PARAMS)
    for is_bad in bad:
        gradient = with_number(params, 1, jnp.nan) if is_bad else params
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if not is_bad:
            updates, plain_state = plain.update(expected, plain_state, expected)
            expected = optax.apply_updates(expected, updates)
    assert_identical(params, expected)
    assert skipped_steps(state) == sum(bad)


def test_extra_arguments_reach_the_optimizer() -> None:
    """A line search needs three of them, and must not receive `model_states`."""
    optimizer = skip_nonfinite(jt.optimizers.lbfgs())

    def loss_fn(w):
        return jnp.sum((w - 3.0) ** 2)

    params = jnp.zeros(2)
    value, grad = jax.value_and_grad(loss_fn)(params)
    updates, _ = optimizer.update(
        *(grad, optimizer.init(params), params),
        **{"value": value, "grad": grad, "value_fn": loss_fn, "model_states": ({}, {})},
    )
    assert loss_fn(params + updates) < value


def test_its_state_is_found_inside_other_transformations_and_under_vmap() -> None:
    optimizer = jt.optimizers.clip_gradients(skip_nonfinite(jt.optimizers.sgd(0.1)), 1.0)
    gradients = jnp.array([[1.0], [jnp.nan]])
    states = jax.vmap(lambda grad: optimizer.update(grad, optimizer.init(grad), grad)[1])(gradients)
    np.testing.assert_array_equal(skipped_steps(states), [0, 1])


def test_a_skipped_step_keeps_keys_and_integers_of_the_optimizer_state() -> None:
    optimizer = skip_nonfinite(
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1))
    )
    before = optimizer.init(PARAMS)
    _, after = optimizer.update(with_number(GOOD, 0, jnp.nan), before, PARAMS)
    for old, new in zip(jax.tree.leaves(before.inner), jax.tree.leaves(after.inner), strict=True):
        assert (old == new).all()


def test_an_object_that_is_not_an_optimizer_is_refused() -> None:
    # The type checker of `make test TYPES=1` raises a TypeError first.
    with pytest.raises((jt.errors.InputError, TypeError), match=r"optimizer is 0\.1|'optimizer'"):
        skip_nonfinite(0.1)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clipping_norm_that_is_not_positive_is_refused(norm: float) -> None:
    with pytest.raises(jt.errors.InputError, match=r"max_gradient_norm is .* finite and positive"):
        jt.optimizers.clip_gradients(optax.sgd(0.1), norm)


@settings(max_examples=20)
@given(
    gradient=hnp.arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
    max_norm=st.floats(1e-3, 1e3),
)
def test_clipping_scales_all_gradients_by_one_factor(gradient, max_norm) -> None:
    clip = jt.optimizers.clip_gradients(optax.identity(), max_norm)
    gradient = jnp.asarray(gradient)
    clipped, _ = clip.update(gradient, clip.init(gradient))
    norm = np.linalg.norm(np.asarray(gradient, np.float64))
    assert np.linalg.norm(np.asarray(clipped, np.float64)) <= min(norm, max_norm) * (1 + 1e-5)
    factor = 1.0 if norm + 1e-6 <= max_norm else max_norm / (norm + 1e-6)
    np.testing.assert_allclose(clipped, gradient * factor, rtol=1e-4, atol=1e-30)
