"""One epoch uses every example once, equals its steps, and works inside JAX transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close

LOSS = jt.losses.cross_entropy
LINE = jt.Dataset(jnp.linspace(-1, 1, 10)[:, None], jnp.linspace(0, 3, 10)[:, None])
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def line() -> jt.TrainState:
    """A linear model for `LINE`."""
    return jt.init_state(jt.models.LinearRegression(), SGD, LINE.inputs, key=jax.random.key(0))


def total(predictions, targets):
    """A loss whose gradient with respect to a linear model's weights is the mean of the inputs."""
    return predictions[:, 0] + 0 * targets


@pytest.mark.parametrize("batch_size", [1, 4, 13, 50])
def test_every_example_is_used_once_and_the_last_batch_may_be_smaller(batch_size: int) -> None:
    """Example i is the i-th unit vector: weight i moves by 1 / the size of the batch with it."""
    data = jt.Dataset(jnp.eye(13), jnp.zeros(13))
    state = jt.init_state(
        jt.models.LinearRegression(), optax.sgd(1.0), data.inputs[:1], key=jax.random.key(0)
    )
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    size = min(batch_size, 13)
    full, tail = divmod(13, size)
    expected = [1 / size] * (full * size) + [1 / tail if tail else 0] * tail
    order = []
    for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2)):
        after, losses = jt.train_epoch(state, data, total, batch_size=batch_size, key=key)
        moved = -np.ravel(after.params["weight"])
        np.testing.assert_allclose(np.sort(moved), np.sort(expected), rtol=1e-6)
        assert len(losses) == full + bool(tail) == after.step
        order.append(moved.tolist())
    np.testing.assert_allclose(order[0], expected, rtol=1e-6)
    # The key determines the order.
    assert order[1] == order[2]
    if batch_size == 4:
        assert order[1] != order[3]


def test_an_epoch_equals_its_steps(small_state, small_classes) -> None:
    after, losses = jt.train_epoch(small_state, small_classes, LOSS, batch_size=16)
    state, expected = small_state, []
    for start in range(0, 50, 16):
        state, metrics = jt.train_step(state, small_classes[start : start + 16], LOSS)
        expected.append(metrics["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert_close(after.params, state.params, rtol=1e-5, atol=1e-7)


def test_epochs_work_inside_scan_and_vmap(small_state, small_classes) -> None:
    """A run is a scan of epochs; a sweep is a vmap of runs."""
    keys = jax.random.split(jax.random.key(5), 2)

    @jax.jit
    def run(state, keys):
        def epoch(state, key):
            return jt.train_epoch(state, small_classes, LOSS, batch_size=16, key=key)

        return jax.lax.scan(epoch, state, keys)

    scanned, losses = run(small_state, keys)
    state = small_state
    for index, key in enumerate(keys):
        state, expected = jt.train_epoch(state, small_classes, LOSS, batch_size=16, key=key)
        np.testing.assert_allclose(losses[index], expected, rtol=1e-5)
    assert_close(scanned.params, state.params, rtol=1e-4)

    many = jax.vmap(lambda key: small_state.replace(key=key))(keys)
    swept, _ = jax.vmap(run, in_axes=(0, None))(many, keys)
    for index, key in enumerate(keys):
        alone, _ = run(small_state.replace(key=key), keys)
        one = jax.tree.map(lambda array, at=index: array[at], swept.params)
        assert_close(one, alone.params, rtol=1e-4)


def test_an_epoch_can_be_differentiated(line) -> None:
    """For a linear model, the final squared error is a parabola of the initial parameters."""
    loss_fn = jt.losses.mean_squared_error

    @jax.jit
    def final_loss(shift):
        params = jax.tree.map(lambda leaf: leaf + shift, line.params)
        after, _ = jt.train_epoch(line.replace(params=params), LINE, loss_fn, batch_size=4)
        return jt.evaluate(after, LINE, loss_fn)["loss"]

    gradient = jax.grad(final_loss)(0.0).item()
    # The central difference of a parabola is its derivative.
    assert gradient == pytest.approx((final_loss(1.0) - final_loss(-1.0)).item() / 2, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 60])
def test_evaluation_does_not_depend_on_the_batch_size(line, batch_size: int) -> None:
    metric_fns = {"mae": jt.losses.mean_absolute_error}
    found = jt.evaluate(line, LINE, jt.losses.mean_squared_error, metric_fns, batch_size=batch_size)
    error = np.ravel(jt.predict(line, LINE.inputs) - LINE.targets)
    assert found["loss"] == pytest.approx(np.mean(error**2), rel=1e-5)
    assert found["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-5)
    predictions = jt.predict(line, LINE.inputs, batch_size=batch_size)
    np.testing.assert_allclose(np.ravel(predictions - LINE.targets), error, rtol=1e-6)


def test_integer_targets_are_labels_only_for_classification_losses(line) -> None:
    """The targets go up to 9, and the model has one output."""

    def squared(predictions, targets):
        return (predictions[:, 0] - targets) ** 2

    data = LINE.replace(targets=jnp.arange(10))
    _, losses = jt.train_epoch(line, data, squared, batch_size=5)
    assert np.isfinite(losses).all()


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
        (
            jt.Dataset(jnp.ones((6, 6)), jnp.arange(6) % 3 + 1),
            {},
            "label 3; .*: count the labels from 0, by targets - 1, or give",
        ),
    ],
)
@pytest.mark.parametrize("function", [jt.train_epoch, jt.evaluate])
def test_invalid_arguments_are_named(small_state, function, data, options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        function(small_state, data, LOSS, **options)


def test_the_data_may_be_traced(small_state: jt.TrainState, small_classes: jt.Dataset) -> None:
    def run(data: jt.Dataset) -> tuple[jax.Array, jax.Array]:
        state, losses = jt.train_epoch(small_state, data, jt.losses.cross_entropy, batch_size=16)
        return losses, jt.evaluate(state, data, jt.losses.cross_entropy)["loss"]

    weighted = small_classes.replace(weights=np.ones(50, np.float32))
    for data in (small_classes, weighted):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(data), run(data))
