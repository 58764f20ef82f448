"""Records of an optimizer's state: which are found, the gradient norm, and the learning rate."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.optimizers import Record, record_gradient_norm, records, skip_nonfinite

PARAMS = {"weight": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.25])}
GRADS = {"weight": jnp.array([[1.0, 2.0], [0.0, -4.0]]), "bias": jnp.array([2.0])}  # norm 5
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
NANS = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)


def norm_of(opt_state) -> jax.Array:
    return records(opt_state)["gradient_norm"].value


def after(optimizer, *gradients, **extra_args):
    """Returns the updates and the optimizer state after an update with each of the gradients."""
    state, updates = optimizer.init(PARAMS), None
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for gradient in gradients:
        updates, state = update(gradient, state, PARAMS, **extra_args)
    return updates, state


def scaled(factor: float):
    return jax.tree.map(lambda leaf: factor * leaf, GRADS)


def test_the_norm_is_over_all_parameters_and_starts_at_0() -> None:
    optimizer = record_gradient_norm(jt.optimizers.sgd(0.1))
    assert norm_of(optimizer.init(PARAMS)) == 0
    assert norm_of(after(optimizer, GRADS)[1]) == 5
    assert norm_of(after(optimizer, GRADS, scaled(3.0))[1]) == 15  # the latest, not a sum


def test_the_norm_equals_that_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in [(64, 3, 3), (10, 7), (5,)]]
    tensors = [torch.zeros(array.shape, requires_grad=True) for array in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.grad = torch.tensor(array)
    expected = torch.nn.utils.clip_grad_norm_(tensors, 1.0).item()
    optimizer = record_gradient_norm(jt.optimizers.clip_gradients(optax.sgd(0.1), 1.0))
    _, state = optimizer.update(arrays, optimizer.init(arrays))
    assert float(norm_of(state)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "rprop"])
def test_it_changes_neither_the_updates_nor_the_inner_state(name: str) -> None:
    plain = jt.optimizers.make(name, 0.1)
    expected_updates, expected = after(plain, GRADS, scaled(0.5))
    updates, state = after(record_gradient_norm(plain), GRADS, scaled(0.5))
    jax.tree.map(np.testing.assert_array_equal, updates, expected_updates)
    jax.tree.map(np.testing.assert_array_equal, state.inner, expected)


def test_the_norm_precedes_clipping_or_follows_it() -> None:
    sgd = jt.optimizers.sgd(0.1)
    outside = record_gradient_norm(jt.optimizers.clip_gradients(sgd, 1.0))
    inside = jt.optimizers.clip_gradients(record_gradient_norm(sgd), 1.0)
    updates, state = after(outside, GRADS)
    assert norm_of(state) == 5
    assert float(optax.tree_utils.tree_norm(updates)) == pytest.approx(0.1, rel=1e-5)
    assert float(norm_of(after(inside, GRADS)[1])) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("size", "value"), [(4, 1000.0), (10_000, 1e-4)])
def test_half_precision_gradients_have_a_norm_in_float32(size: int, value: float) -> None:
    """In float16 the first square would overflow and the second underflow."""
    optimizer = record_gradient_norm(optax.sgd(0.1))
    before = optimizer.init(jnp.zeros(size, jnp.float16))
    _, state = optimizer.update(jnp.full(size, value, jnp.float16), before)
    assert norm_of(before).dtype == norm_of(state).dtype == jnp.float32
    assert float(norm_of(state)) == pytest.approx(value * size**0.5, rel=1e-3)


def test_a_nan_gradient_has_a_nan_norm_although_the_step_is_skipped() -> None:
    optimizer = record_gradient_norm(skip_nonfinite(jt.optimizers.adam(0.1)))
    updates, state = after(optimizer, GRADS, NANS)
    assert np.isnan(norm_of(state))
    assert records(state)["skipped_steps"].value == 1
    jax.tree.map(np.testing.assert_array_equal, updates, ZEROS)
    assert norm_of(after(optimizer, NANS, GRADS)[1]) == 5


def test_inside_skip_nonfinite_the_norm_is_that_of_the_latest_step_taken() -> None:
    optimizer = skip_nonfinite(record_gradient_norm(jt.optimizers.adam(0.1)))
    _, state = after(optimizer, GRADS, NANS)
    assert (norm_of(state), records(state)["skipped_steps"].value) == (5, 1)


def test_a_record_that_is_not_finite_does_not_skip_a_step() -> None:
    """The square of 1e20 is not finite in float32, but the update is."""
    optimizer = skip_nonfinite(record_gradient_norm(jt.optimizers.sgd(0.1)))
    updates, state = after(optimizer, jax.tree.map(lambda leaf: leaf * 1e20, GRADS))
    assert records(state)["skipped_steps"].value == 0
    assert norm_of(state) == np.inf
    assert updates["bias"][0] == pytest.approx(-2e19)


def test_accumulation_records_each_batch_or_each_mean() -> None:
    sgd = jt.optimizers.sgd(0.1)
    outside = record_gradient_norm(jt.optimizers.accumulate_gradients(sgd, 2))
    inside = jt.optimizers.accumulate_gradients(record_gradient_norm(sgd), 2)
    gradients = (GRADS, scaled(3.0), scaled(7.0))
    assert [float(norm_of(after(outside, *gradients[:n])[1])) for n in (1, 2, 3)] == [5, 15, 35]
    assert [float(norm_of(after(inside, *gradients[:n])[1])) for n in (1, 2, 3)] == [0, 10, 10]
    _, last = after(outside, GRADS, weight=jnp.array(3.0), last=jnp.array(True))
    assert last.inner.batches == 0  # both arguments reached the wrapped optimizer


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def test_lbfgs_makes_the_same_steps() -> None:
    start = jnp.array([-1.2, 1.0])
    plain, recording = (
        jt.minimize(rosenbrock, start, optimizer, max_steps=20)
        for optimizer in (
            jt.optimizers.lbfgs(),
            record_gradient_norm(skip_nonfinite(jt.optimizers.lbfgs())),
        )
    )
    np.testing.assert_allclose(recording.losses, plain.losses, rtol=1e-4)
    assert recording.evaluations == plain.evaluations
    optimizer = record_gradient_norm(jt.optimizers.lbfgs())
    opt_state = optimizer.init(start)
    assert "learning_rate" not in records(opt_state)
    value, grad = jax.value_and_grad(rosenbrock)(start)
    extra = {"value": value, "grad": grad, "value_fn": rosenbrock}
    _, opt_state = optimizer.update(grad, opt_state, start, **extra)
    assert float(norm_of(opt_state)) == pytest.approx(232.86768, rel=1e-6)  # (-215.6, -88)


def test_under_vmap_each_run_has_its_own_norm() -> None:
    """Also with a learning rate that was a tracer when the optimizer was made."""
    model = jt.Model(lambda key, x: (PARAMS, {}), lambda params, state, x, **_: (x, state))

    def start(rate):
        optimizer = record_gradient_norm(optax.sgd(rate))
        return jt.init_state(model, optimizer, jnp.zeros(1), key=jax.random.key(0))

    def update(state, factor):
        return jt.apply_gradients(state, jax.tree.map(lambda leaf: factor * leaf, GRADS))

    states = jax.vmap(start)(jnp.array([0.1, 0.2, 0.3]))
    states = jax.vmap(update)(states, jnp.array([0.0, 2.0, jnp.nan]))
    np.testing.assert_array_equal(norm_of(states.opt_state), [0.0, 10.0, jnp.nan])
    np.testing.assert_allclose(states.params["bias"][:2, 0], [0.25, 0.25 - 0.8], rtol=1e-6)


class CountingState(NamedTuple):
    large: Record
    inner: optax.OptState


def count_large(optimizer, threshold):
    """A user's transformation: counts the gradients with an entry above a threshold."""

    def init(params):
        large = Record("large_gradients", jnp.zeros((), jnp.int32), counts=True)
        return CountingState(large, optimizer.init(params))

    def update(updates, state, params=None):
        is_large = optax.tree_utils.tree_norm(updates, ord=jnp.inf) > threshold
        large = dataclasses.replace(state.large, value=state.large.value + is_large)
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, CountingState(large, inner)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: optimizer,
        lambda optimizer: optax.chain(optax.clip(10.0), optimizer),
        lambda optimizer: optax.masked(optimizer, {"weight": True, "bias": False}),
        lambda optimizer: optax.MultiSteps(optimizer, 1).gradient_transformation(),
        lambda optimizer: optax.apply_if_finite(optimizer, 3),
        lambda optimizer: jt.optimizers.accumulate_gradients(optimizer, 1),
        lambda optimizer: jt.optimizers.average_parameters(optimizer),
        lambda optimizer: jt.optimizers.clip_gradients(optimizer, 100.0),
    ],
    ids=[
        *("alone", "chain", "masked", "MultiSteps", "apply_if_finite", "accumulate"),
        *("average", "clip"),
    ],
)
def test_a_record_of_ones_own_is_found(wrap) -> None:
    optimizer = wrap(skip_nonfinite(count_large(jt.optimizers.sgd(0.5), 3.0)))
    _, state = after(optimizer, GRADS, scaled(0.5), GRADS)
    found = records(state)
    assert list(found) == ["skipped_steps", "learning_rate", "large_gradients"]
    assert [float(record.value) for record in found.values()] == [0, 0.5, 2]
    assert [record.counts for record in found.values()] == [True, False, True]
    assert all(name == record.name for name, record in found.items())


def test_of_records_of_one_name_the_largest_counts() -> None:
    assert records(optax.adam(0.1).init(PARAMS)) == records(()) == {}

    def names(*values, counts=False):
        return [Record("a", jnp.array(value), counts) for value in values]

    assert records(names(1.0, 3.0, 2.0))["a"].value == 3
    assert np.isnan(records(names(1.0, jnp.nan, 2.0))["a"].value)
    found = records([*names([1, 5]), *names([2, 4], counts=True)])["a"]
    assert (found.value.tolist(), found.counts) == ([2, 5], True)
    optimizer = optax.multi_transform(
        {"a": record_gradient_norm(optax.sgd(0.1)), "b": record_gradient_norm(optax.adam(0.1))},
        {"weight": "a", "bias": "b"},
    )
    assert float(norm_of(after(optimizer, GRADS)[1])) == pytest.approx(21**0.5, rel=1e-6)


def test_a_recorded_learning_rate_precedes_that_of_the_state() -> None:
    opt_state = jt.optimizers.sgd(0.5).init(PARAMS)
    both = [Record("norm", jnp.array(1.0)), Record("learning_rate", jnp.array(0.1)), opt_state]
    found = records(both)
    assert list(found) == ["learning_rate", "norm"]
    assert found["learning_rate"].value == pytest.approx(0.1)


def falling(count):
    return 0.5 * 0.9**count


def scheduled():
    return jt.optimizers.sgd(falling)


def plateau(optimizer):
    """Each second update without improvement divides the rate by ten."""
    return optax.chain(optimizer, optax.contrib.reduce_on_plateau(factor=0.1, patience=2))


def multi_steps(optimizer):
    return optax.MultiSteps(optimizer, 2).gradient_transformation()


def record_rate(schedule):
    """A user's transformation: scales by a schedule, and records the rate."""

    def init(params):
        return (jnp.zeros((), jnp.int32), Record("learning_rate", jnp.zeros(())))

    def update(updates, state, params=None):
        rate = jnp.asarray(schedule(state[0]))
        updates = jax.tree.map(lambda leaf: -rate * leaf, updates)
        return updates, (state[0] + 1, Record("learning_rate", rate))

    return optax.GradientTransformation(init, update)


def partition(weight, bias):
    return optax.partition({"a": weight, "b": bias}, {"weight": "a", "bias": "b"})


ACCUMULATED = functools.partial(jt.optimizers.accumulate_gradients, steps=2)
CLIPPED = functools.partial(jt.optimizers.clip_gradients, max_gradient_norm=100.0)
RATES = {
    "number": jt.optimizers.sgd(0.5),
    "schedule": scheduled(),
    "own record": record_rate(falling),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=falling),
    "plateau": plateau(jt.optimizers.sgd(0.5)),
    "schedule, plateau": plateau(scheduled()),
    "own record, plateau": plateau(record_rate(falling)),
    "two plateaus": plateau(plateau(scheduled())),
    "clip, plateau": CLIPPED(plateau(scheduled())),
    "plateau, clip": plateau(CLIPPED(scheduled())),
    "accumulate": ACCUMULATED(scheduled()),
    "accumulate, plateau": ACCUMULATED(plateau(scheduled())),
    "MultiSteps": multi_steps(scheduled()),
    "plateau of MultiSteps": plateau(multi_steps(scheduled())),
    "plateau of accumulate": plateau(ACCUMULATED(scheduled())),
    "all": skip_nonfinite(
        jt.optimizers.average_parameters(
            record_gradient_norm(ACCUMULATED(plateau(CLIPPED(scheduled()))))
        )
    ),
    "apply_if_finite": optax.apply_if_finite(plateau(scheduled()), 3),
    "frozen": partition(plateau(scheduled()), optax.set_to_zero()),
    "masked": optax.masked(plateau(scheduled()), {"weight": True, "bias": False}),
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_is_the_length_of_the_step(name: str) -> None:
    """On a constant gradient, whose mean over batches it also is; 0 where nothing is updated."""
    optimizer = optax.with_extra_args_support(RATES[name])
    state, lengths = optimizer.init(PARAMS), set()
    update = jax.jit(optimizer.update)
    for value in (1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5):
        updates, state = update(GRADS, state, PARAMS, value=jnp.array(value))
        length = float(-updates["weight"][0, 0] / GRADS["weight"][0, 0])
        if length:
            assert records(state)["learning_rate"].value == pytest.approx(length, rel=1e-6)
            lengths.add(round(length, 8))
    assert len(lengths) > 1 or name == "number"


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5),
        optax.sgd(falling),
        optax.chain(optax.contrib.reduce_on_plateau(), jt.optimizers.sgd(0.5)),
        optax.chain(jt.optimizers.sgd(0.5), optax.scale(0.1)),
        optax.named_chain(("sgd", jt.optimizers.sgd(0.5)), ("scale", optax.scale(0.1))),
        optax.chain(jt.optimizers.sgd(0.5), jt.optimizers.sgd(0.1)),
        plateau(optax.adam(0.5)),
        partition(jt.optimizers.sgd(0.5), jt.optimizers.sgd(0.1)),
        partition(jt.optimizers.sgd(0.5), optax.sgd(0.1)),
        partition(record_rate(falling), record_rate(falling)),
        jt.optimizers.rprop(0.1),
        jt.optimizers.lbfgs(),
    ],
)
def test_a_learning_rate_that_is_unknown_is_not_reported(optimizer) -> None:
    assert "learning_rate" not in records(optimizer.init(PARAMS))
