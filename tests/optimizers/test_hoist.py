"""A state made under vmap or jit with a swept hyperparameter is usable outside."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

PARAMS = {"w": jnp.array([[1.0], [-2.0]]), "b": jnp.array([[0.5], [0.5]])}
MODEL = jt.Model(
    lambda key, inputs: (PARAMS, {}),
    lambda params, state, inputs, **_: (inputs @ params["w"] + params["b"], state),
)
DATA = jt.Dataset(jnp.array([[1.0, 0.0], [0.5, -1.0]]), jnp.ones((2, 1)))
NUMBERS = (0.1, 0.02)
VALUES = jnp.array(NUMBERS)


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


def recursive(rate) -> optax.GradientTransformation:
    calls = 0

    def power(base, exponent):
        nonlocal calls
        calls += 1
        return base if exponent == 1 else base * power(base, exponent - 1) * (rate / rate)

    def update(updates, state, params=None):
        before = calls
        factor = power(rate, 3)
        assert calls == before + 3  # `update` and `power` still share the variable
        return jax.tree.map(lambda leaf: -factor * leaf, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZERS = {
    "optax.sgd, momentum": lambda value: optax.sgd(0.1, momentum=value, nesterov=True),
    "optax.adam": lambda value: optax.adam(value, b1=value),
    "sgd, all": lambda value: jt.optimizers.sgd(value, value, value, value),
    "rprop": jt.optimizers.rprop,
    "adagrad, clipped": lambda value: jt.optimizers.clip_gradients(
        jt.optimizers.adagrad(value, lr_decay=value), value
    ),
    "skip_nonfinite": lambda value: jt.optimizers.skip_nonfinite(optax.adamw(value)),
    "accumulate": lambda value: jt.optimizers.accumulate_gradients(jt.optimizers.sgd(value), 2),
    "schedule": lambda value: optax.sgd(optax.exponential_decay(value, 2, 0.5)),
    "step_lr": lambda value: jt.optimizers.sgd(jt.optimizers.step_lr(value, 1, 0.5)),
    "masked": lambda value: optax.masked(optax.sgd(value), {"w": True, "b": False}),
    "line search": jt.optimizers.lbfgs,
    "method": method,
    "partial": partial,
    "defaults": defaults,
    "recursive": recursive,
}


def start(make, value) -> jt.TrainState:
    return jt.init_state(MODEL, make(value), DATA.inputs, key=jax.random.key(0))


def train(state: jt.TrainState):
    def step(_, state):
        return jt.train_step(state, DATA, jt.losses.mean_squared_error)[0]

    return jax.lax.fori_loop(0, 3, step, state).params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_swept_state_trained_outside_equals_separate_runs(name: str) -> None:
    begin = functools.partial(start, OPTIMIZERS[name])
    states = jax.jit(jax.vmap(begin))(VALUES)
    # Compiled later, without the first transformation: a tracer left behind would be a leak.
    swept = jax.jit(jax.vmap(train))(states)
    alone = jax.jit(lambda: [train(begin(number)) for number in NUMBERS])()
    for index, expected in enumerate(alone):
        for ours, theirs in zip(jax.tree.leaves(swept), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours[index], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_no_transformation_leaves_a_tracer(transform) -> None:
    begin = functools.partial(
        start, lambda value: optax.chain(optax.sgd(value), optax.trace(value))
    )
    values = VALUES if transform is jax.vmap else VALUES[0]
    with jax.check_tracer_leaks():
        state = jax.block_until_ready(transform(begin)(values))
    assert state.opt_state.values[0] is not None
    params = transform(train)(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_an_optimizer_of_plain_numbers_is_kept() -> None:
    optimizer = jt.optimizers.lbfgs(0.1)
    state = jax.jit(lambda: start(lambda _: optimizer, 0.1))()
    assert state.optimizer is optimizer
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(optimizer.init(PARAMS))


def test_a_value_used_in_many_places_is_stored_once() -> None:
    begin = functools.partial(
        start, lambda value: optax.chain(optax.trace(value), optax.trace(value))
    )
    states = jax.vmap(begin)(VALUES)
    *traces, value = jax.tree.leaves(states.opt_state)
    assert len(traces) == 4  # two transformations, two parameters
    np.testing.assert_array_equal(value, VALUES)


def test_init_of_a_hoisted_optimizer_is_refused_and_its_rate_can_be_read() -> None:
    states = jax.vmap(functools.partial(start, jt.optimizers.sgd))(VALUES)
    rate = jt.optimizers.records(states.opt_state)["learning_rate"].value
    np.testing.assert_array_equal(rate, VALUES)
    with pytest.raises(
        jt.errors.InputError, match=r"built with a traced argument.*build a new optimizer"
    ):
        states.optimizer.init(PARAMS)
