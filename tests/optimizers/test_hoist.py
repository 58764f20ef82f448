"""hoist_tracers makes a state created under vmap or jit with a swept argument usable outside."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.optimizers._hoist import HoistedState, hoist_tracers
from jaxtrain.optimizers._inspect import current_learning_rate

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
VALUES = jnp.array([0.1, 0.3, 0.01])


def loss_fn(params):
    return jnp.sum(params["w"] ** 2) + params["b"] ** 2


@dataclasses.dataclass(frozen=True)
class Scale:
    """An optimizer whose update is a method of an object with the learning rate."""

    rate: jax.Array

    def init(self, params):
        return optax.EmptyState()

    def update(self, updates, state, params=None):
        return jax.tree.map(lambda leaf: -self.rate * leaf, updates), state


def method(rate) -> optax.GradientTransformation:
    scale = Scale(rate)
    return optax.GradientTransformation(scale.init, scale.update)


def partial(rate) -> optax.GradientTransformation:
    def update(rates, updates, state, params=None, *, factor):
        return jax.tree.map(lambda leaf: -rates["rate"][0] * factor * leaf, updates), state

    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        functools.partial(update, {"rate": [rate]}, factor=rate),
    )


def defaults(rate) -> optax.GradientTransformation:
    @jax.jit
    def update(updates, state, params=None, rate=rate):
        return jax.tree.map(lambda leaf: -rate * leaf, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZERS = {
    "optax.sgd": optax.sgd,
    "optax.sgd, momentum": lambda value: optax.sgd(0.1, momentum=value, nesterov=True),
    "optax.adam": lambda value: optax.adam(value, b1=value),
    "sgd": jt.optimizers.sgd,
    "sgd, all": lambda value: jt.optimizers.sgd(value, value, value, value),
    "rprop": jt.optimizers.rprop,
    "adagrad, clipped": lambda value: jt.optimizers.clip_gradients(
        jt.optimizers.adagrad(value, lr_decay=value), value
    ),
    "skip_nonfinite": lambda value: jt.optimizers.skip_nonfinite(optax.adamw(value)),
    "schedule": lambda value: optax.sgd(optax.exponential_decay(value, 2, 0.5)),
    "step_lr": lambda value: jt.optimizers.sgd(jt.optimizers.step_lr(value, 1, 0.5)),
    "masked": lambda value: optax.masked(optax.sgd(value), {"w": True, "b": False}),
    "method": method,
    "partial": partial,
    "defaults": defaults,
}


def train(optimizer, params, opt_state, steps):
    """Takes steps with the extra arguments that a line search needs."""
    for _ in range(steps):
        value, grad = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grad, opt_state, params, value=value, grad=grad, value_fn=loss_fn
        )
        params = optax.apply_updates(params, updates)
    return params


def sweep_init(make, transform=lambda function: function):
    """Initializes under vmap; the optimizer leaves it as static data, as in a TrainState."""
    made = []

    def init(value):
        optimizer, opt_state = hoist_tracers(make(value), PARAMS)
        made.append(optimizer)
        return opt_state

    return transform(jax.vmap(init))(VALUES), made[-1]


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["vmap", "jit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_swept_state_trained_outside_equals_separate_runs(name: str, transform) -> None:
    make = OPTIMIZERS[name]
    states, optimizer = sweep_init(make, transform)
    # Jitted later, without the first transformation: a tracer left behind would be a leak.
    swept = jax.jit(jax.vmap(lambda state: train(optimizer, PARAMS, state, steps=4)))(states)
    for index, value in enumerate(VALUES):
        alone = make(value)
        expected = train(alone, PARAMS, alone.init(PARAMS), steps=4)
        jax.tree.map(
            lambda leaf, other, index=index: np.testing.assert_allclose(
                other[index], leaf, rtol=1e-6, atol=1e-7
            ),
            expected,
            swept,
        )


def test_a_line_search_with_a_swept_learning_rate_is_hoisted() -> None:
    states, optimizer = sweep_init(jt.optimizers.lbfgs)
    swept = jax.vmap(lambda state: train(optimizer, PARAMS, state, steps=2))(states)
    alone = jt.optimizers.lbfgs(VALUES[1])
    expected = train(alone, PARAMS, alone.init(PARAMS), steps=2)
    np.testing.assert_allclose(swept["w"][1], expected["w"], rtol=1e-5)


def test_nothing_traced_is_left_in_the_optimizer() -> None:
    with jax.check_tracer_leaks():
        jax.block_until_ready(
            jax.jit(
                jax.vmap(lambda value: hoist_tracers(optax.sgd(0.1, momentum=value), PARAMS)[1])
            )(VALUES)
        )
    _, optimizer = sweep_init(lambda value: optax.chain(optax.sgd(value), optax.trace(value)))
    from jaxtrain.optimizers import _hoist

    assert not _hoist._holds(optimizer.update, jax.core.Tracer)
    assert not _hoist._holds(optimizer.init, jax.core.Tracer)


@pytest.mark.parametrize("make", [optax.adam, jt.optimizers.adam, jt.optimizers.lbfgs])
def test_an_optimizer_of_plain_numbers_is_returned_itself(make) -> None:
    for transform in (lambda function: function, jax.jit):
        optimizer, made = make(0.1), []

        def init(params, optimizer=optimizer, made=made):
            same, opt_state = hoist_tracers(optimizer, params)
            made.append(same)
            return opt_state

        opt_state = transform(init)(PARAMS)
        assert made[-1] is optimizer
        expected = optimizer.init(PARAMS)
        assert jax.tree.structure(opt_state) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, opt_state, expected)


def test_one_tracer_used_in_many_places_is_stored_once() -> None:
    states, _ = sweep_init(lambda value: optax.chain(optax.trace(value), optax.trace(value)))
    assert isinstance(states, HoistedState)
    assert len(states.values) == 1
    np.testing.assert_array_equal(states.values[0], VALUES)


def test_recursive_functions_and_shared_variables_are_copied_consistently() -> None:
    def make(rate):
        calls = 0

        def power(base, exponent):
            nonlocal calls
            calls += 1
            return base if exponent == 1 else base * power(base, exponent - 1) * (rate / rate)

        def update(updates, state, params=None):
            factor = power(rate, 3)
            assert calls == 3  # counted in the copy of `power`, visible in that of `update`
            return jax.tree.map(lambda leaf: -factor * leaf, updates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    states, optimizer = sweep_init(make)
    swept = jax.vmap(lambda state: train(optimizer, PARAMS, state, steps=1))(states)
    np.testing.assert_allclose(swept["b"], 0.5 - VALUES**3, rtol=1e-5)


def test_init_of_a_hoisted_optimizer_is_refused() -> None:
    _, optimizer = sweep_init(optax.sgd)
    with pytest.raises(
        jt.errors.InputError, match=r"built with a traced argument.*build a new optimizer"
    ):
        optimizer.init(PARAMS)


def test_the_learning_rate_of_a_swept_state_can_be_read() -> None:
    states, _ = sweep_init(jt.optimizers.sgd)
    np.testing.assert_array_equal(current_learning_rate(states), VALUES)
