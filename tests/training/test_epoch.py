"""One epoch uses every example once, equals its steps, and works inside JAX transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxtrain as jt

LOSS = jt.losses.cross_entropy


def assert_same(ours, theirs, **tolerance) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def total(predictions, targets):
    """A loss whose gradient with respect to a linear model's weights is the mean of the inputs."""
    return predictions[:, 0] + 0 * targets


@settings(max_examples=12)
@given(examples=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans())
def test_every_example_is_used_once_and_the_last_batch_may_be_smaller(
    examples: int, batch_size: int, shuffle: bool
) -> None:
    """Example i is the i-th unit vector: weight i moves by 1 / the size of the batch with it."""
    data = jt.Dataset(jnp.eye(examples), jnp.zeros(examples))
    state = jt.init_state(
        jt.models.LinearRegression(), optax.sgd(1.0), data.inputs[:1], key=jax.random.key(0)
    )
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    key = jax.random.key(1) if shuffle else None
    after, losses = jt.train_epoch(state, data, total, batch_size=batch_size, key=key)

    size = min(batch_size, examples)
    full, tail = divmod(examples, size)
    expected = [1 / size] * (full * size) + [1 / tail if tail else 0] * tail
    moved = -np.ravel(after.params["weight"])
    np.testing.assert_allclose(np.sort(moved), np.sort(expected), rtol=1e-6)
    if not shuffle:
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
    assert len(losses) == full + bool(tail) == after.step


def test_an_epoch_equals_its_steps(small_state, small_classes) -> None:
    after, losses = jt.train_epoch(small_state, small_classes, LOSS, batch_size=16)
    state, expected = small_state, []
    for start in range(0, 50, 16):
        batch = jax.tree.map(lambda array, at=start: array[at : at + 16], small_classes)
        state, metrics = jt.train_step(state, batch, LOSS)
        expected.append(metrics["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert_same(after.params, state.params, rtol=1e-5, atol=1e-7)


def test_the_key_determines_the_order(small_state, small_classes) -> None:
    def losses(key):
        return np.asarray(
            jt.train_epoch(small_state, small_classes, LOSS, batch_size=16, key=key)[1]
        )

    assert (losses(jax.random.key(1)) == losses(jax.random.key(1))).all()
    assert (losses(jax.random.key(1)) != losses(jax.random.key(2))).all()


def test_epochs_work_inside_scan_and_vmap(small_state, small_classes) -> None:
    """A run is a scan of epochs; a sweep is a vmap of runs."""
    keys = jax.random.split(jax.random.key(5), 3)

    def run(state, seeds):
        def epoch(state, key):
            return jt.train_epoch(state, small_classes, LOSS, batch_size=16, key=key)

        return jax.lax.scan(epoch, state, seeds)

    scanned, losses = jax.jit(run)(small_state, keys)
    state = small_state
    for index, key in enumerate(keys):
        state, expected = jt.train_epoch(state, small_classes, LOSS, batch_size=16, key=key)
        np.testing.assert_allclose(losses[index], expected, rtol=1e-5)
    assert_same(scanned.params, state.params, rtol=1e-4, atol=1e-6)

    many = jax.vmap(lambda key: small_state.replace(key=key))(keys)
    swept, _ = jax.vmap(run, in_axes=(0, None))(many, keys)
    for index, key in enumerate(keys):
        alone, _ = run(small_state.replace(key=key), keys)
        one = jax.tree.map(lambda array, at=index: array[at], swept.params)
        assert_same(one, alone.params, rtol=1e-4, atol=1e-6)


def test_an_epoch_can_be_differentiated() -> None:
    """For a linear model, the final squared error is a parabola of the initial parameters."""
    data = jt.Dataset(jnp.linspace(-1, 1, 10)[:, None], jnp.linspace(0, 3, 10)[:, None])
    loss_fn = jt.losses.mean_squared_error
    state = jt.init_state(
        jt.models.LinearRegression(), optax.sgd(0.1), data.inputs[:1], key=jax.random.key(0)
    )

    def final_loss(shift):
        params = jax.tree.map(lambda leaf: leaf + shift, state.params)
        after, _ = jt.train_epoch(state.replace(params=params), data, loss_fn, batch_size=4)
        return jt.evaluate(after, data, loss_fn)["loss"]

    gradient = jax.grad(final_loss)(0.0).item()
    # The central difference of a parabola is its derivative.
    assert gradient == pytest.approx((final_loss(1.0) - final_loss(-1.0)).item() / 2, rel=1e-4)


@given(batch_size=st.integers(1, 60))
@settings(max_examples=5)
def test_evaluation_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    data = jt.Dataset(jnp.linspace(-1, 1, 50)[:, None], jnp.linspace(0, 3, 50)[:, None])
    state = jt.init_state(
        jt.models.LinearRegression(), optax.sgd(0.1), data.inputs[:1], key=jax.random.key(0)
    )
    metrics = jt.evaluate(
        state,
        data,
        jt.losses.mean_squared_error,
        {"mae": jt.losses.mean_absolute_error},
        batch_size=batch_size,
    )
    error = np.ravel(jt.predict(state, data.inputs) - data.targets)
    assert metrics["loss"] == pytest.approx(np.mean(error**2), rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-5)
    np.testing.assert_allclose(
        np.ravel(jt.predict(state, data.inputs, batch_size=batch_size) - data.targets),
        error,
        rtol=1e-6,
    )


def test_integer_targets_are_labels_only_for_classification_losses() -> None:
    """The targets go up to 19, and the model has one output."""
    data = jt.Dataset(jnp.arange(20.0)[:, None], jnp.arange(20))
    state = jt.init_state(
        jt.models.LinearRegression(), optax.sgd(1e-3), data.inputs[:1], key=jax.random.key(0)
    )

    def squared(predictions, targets):
        return (predictions[:, 0] - targets) ** 2

    before = jt.evaluate(state, data, squared)["loss"]
    state, _ = jt.train_epoch(state, data, squared, batch_size=5)
    assert jt.evaluate(state, data, squared)["loss"] < before


def bad(inputs=(50, 6), targets=(50,), dtype=jnp.int32, fill=0):
    return jt.Dataset(jnp.zeros(inputs), jnp.full(targets, fill, dtype))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (bad(), {"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        (bad(), {"batch_size": -3}, "batch_size is -3"),
        (bad(targets=(49,)), {}, r"dataset\.inputs has 50 examples and dataset\.targets has 49"),
        (bad((0, 6), (0,)), {}, "dataset is empty; expected at least one example"),
        (bad(dtype=jnp.float32), {}, "float32; expected integer class labels"),
        (bad(fill=3), {}, r"dataset\.targets holds the label 3; expected labels from 0 to 2"),
        (bad(fill=-1), {}, "label -1; expected labels from 0 to 2"),
    ],
)
@pytest.mark.parametrize("function", [jt.train_epoch, jt.evaluate])
def test_invalid_arguments_are_named(small_state, function, data, options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        function(small_state, data, LOSS, **options)


def test_a_batch_size_above_the_number_of_examples_gives_one_batch(
    small_state, small_classes
) -> None:
    after, losses = jt.train_epoch(small_state, small_classes, LOSS, batch_size=1000)
    expected, metrics = jt.train_step(small_state, small_classes, LOSS)
    np.testing.assert_allclose(losses, [metrics["loss"]], rtol=1e-6)
    assert_same(after.params, expected.params, rtol=1e-5, atol=1e-7)


def test_the_data_may_be_traced(small_state: jt.TrainState, small_classes: jt.Dataset) -> None:
    def run(data: jt.Dataset) -> tuple[jax.Array, jax.Array]:
        state, losses = jt.train_epoch(small_state, data, jt.losses.cross_entropy, batch_size=16)
        return losses, jt.evaluate(state, data, jt.losses.cross_entropy)["loss"]

    weighted = small_classes.replace(weights=np.ones(50, np.float32))
    for data in (small_classes, weighted):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(data), run(data))
