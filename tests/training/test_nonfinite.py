"""NaN and infinity end a run or are skipped; gradient norms are recorded and clipped."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import list_epochs

MSE = jt.losses.mean_squared_error
SGD, MOMENTUM = jt.optimizers.sgd(0.1), jt.optimizers.sgd(0.1, momentum=0.5)
MODEL = jt.models.LinearRegression(use_bias=False)
# Wrapping an optimizer twice would compile the steps twice.
skip_nonfinite = functools.cache(jt.optimizers.skip_nonfinite)
record_gradient_norm = functools.cache(jt.optimizers.record_gradient_norm)


def line(targets, optimizer=MOMENTUM, weight: float = 1.0) -> tuple[jt.TrainState, jt.Dataset]:
    """Returns the state of a model y = w x, and its data at x = 1, 2, …"""
    inputs = jnp.arange(1.0, len(targets) + 1)[:, None]
    data = jt.Dataset(inputs, jnp.asarray(targets)[:, None])
    state = jt.init_state(MODEL, optimizer, inputs[:1], key=jax.random.key(0))
    return state.replace(params={"weight": jnp.full((1, 1), weight)}), data


def skipping(state: jt.TrainState) -> jt.TrainState:
    return jt.with_optimizer(state, skip_nonfinite(state.optimizer))


def recording(state: jt.TrainState) -> jt.TrainState:
    return jt.with_optimizer(state, record_gradient_norm(state.optimizer))


def test_the_gradient_norm_is_that_of_the_last_step() -> None:
    """Loss (w x − y)², gradient 2 (w x − y) x, at x = 2, y = 0 and w after the first step."""
    state, data = line([0.0, 0.0], SGD)
    _, history = jt.fit(recording(state), data, loss_fn=MSE, epochs=1, batch_size=1)
    after_first = 1.0 - 0.1 * 2 * 1.0
    assert history["gradient_norm"] == pytest.approx([2 * after_first * 2 * 2], rel=1e-6)


def test_clipping_with_a_line_search_is_refused() -> None:
    state, data = line([1.0], jt.optimizers.clip_gradients(jt.optimizers.lbfgs(), 1.0))
    with pytest.raises(jt.errors.InputError, match=r"clips gradients and has a line search"):
        jt.fit(state, data, loss_fn=MSE)


def test_skipped_steps_change_nothing_but_their_count() -> None:
    """The square of the third target overflows; the run equals one without that example."""
    state, data = line([1.0, -1.0, 1e30, 0.5])
    skipped, history = jt.fit(skipping(state), data, loss_fn=MSE, epochs=3, batch_size=1)
    assert history["skipped_steps"].tolist() == [1, 1, 1]
    losses = history.step_losses.reshape(3, 4)
    assert np.isinf(losses[:, 2]).all()
    expected = state
    few = data.take(jnp.array([0, 1, 3]))
    for epoch in range(3):
        for index in range(3):
            batch = few.take(jnp.array([index]))
            expected, metrics = jt.train_step(expected, batch, MSE)
            found = losses[epoch, [0, 1, 3][index]]
            assert found == pytest.approx(float(metrics["loss"]), rel=1e-5)
    np.testing.assert_allclose(skipped.params["weight"], expected.params["weight"], rtol=1e-6)
    np.testing.assert_allclose(
        jax.tree.leaves(skipped.opt_state)[0], jax.tree.leaves(expected.opt_state)[0], rtol=1e-6
    )
    assert skipped.step == 12  # skipped steps count, so that dropout differs in the next step
    finite = losses[:, [0, 1, 3]]
    np.testing.assert_allclose(history["train_loss"], finite.mean(axis=1), rtol=1e-6)


class Statistics(nn.Module):
    """Keeps a sum of squares that can overflow while loss and gradient stay finite."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        total = self.variable("statistics", "sum_of_squares", lambda: jnp.zeros(()))
        if train:
            total.value += jnp.square(inputs).sum()
        return nn.Dense(1)(jnp.clip(inputs, -1, 1))


def test_a_skipped_step_keeps_the_model_state(tmp_path: Path) -> None:
    """An input of 1e20 is finite; its square is not."""
    inputs = jnp.arange(32.0)[:, None] / 32
    data = jt.Dataset(inputs.at[5].set(1e20), inputs)
    start = jt.init_state(Statistics(), SGD, inputs[:1], key=jax.random.key(0))
    options = {"loss_fn": MSE, "epochs": 1, "batch_size": 4}
    state, history = jt.fit(skipping(start), data, **options)
    assert history["skipped_steps"].tolist() == [1]
    without = jnp.delete(inputs, jnp.arange(4, 8), axis=0)
    found = state.model_state["statistics"]["sum_of_squares"]
    assert float(found) == pytest.approx(float(jnp.square(without).sum()), rel=1e-6)
    with pytest.raises(
        jt.errors.NonFiniteError, match=r"model_state\.statistics\.sum_of_squares became inf"
    ):
        jt.fit(start, data, **options, callbacks=[jt.callbacks.checkpoint(tmp_path)])
    assert list_epochs(tmp_path) == []


def test_an_initial_state_with_nan_is_refused() -> None:
    inputs = jnp.ones((4, 1))
    state = jt.init_state(Statistics(), SGD, inputs, key=jax.random.key(0))
    state = state.replace(model_state=jax.tree.map(lambda leaf: leaf * jnp.nan, state.model_state))
    with pytest.raises(
        jt.errors.InputError, match=r"NaN in model_state\.statistics\.sum_of_squares; expected"
    ):
        jt.fit(state, jt.Dataset(inputs, inputs), loss_fn=MSE)


def test_an_infinity_in_the_initial_model_state_is_accepted() -> None:
    class Minimum(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            lowest = self.variable("statistics", "lowest", lambda: jnp.full(2, jnp.inf))
            if train:
                lowest.value = lowest.value.at[0].min(inputs.min())
            return nn.Dense(1)(inputs)

    _, data = line([1.0, 2.0])
    state = jt.init_state(Minimum(), SGD, data.inputs, key=jax.random.key(0))
    state, _ = jt.fit(state, data, loss_fn=MSE, epochs=1)
    assert state.model_state["statistics"]["lowest"].tolist() == [1.0, np.inf]


def test_a_run_whose_every_step_is_skipped_ends() -> None:
    state, data = line([1e30, 1e30])
    with pytest.raises(jt.errors.NonFiniteError, match="of every step became inf after epoch 1"):
        jt.fit(skipping(state), data, loss_fn=MSE, epochs=3, batch_size=1)


def root_loss(predictions, targets):
    """√|error|: finite everywhere, with an infinite gradient where the error is 0."""
    return jnp.sqrt(jnp.abs(predictions - targets))[:, 0]


def test_a_nonfinite_gradient_of_a_finite_loss_ends_the_run() -> None:
    """The first error is 0; the second loss is not finite."""
    state, data = line([1.0, 5.0, 5.0])
    with pytest.raises(jt.errors.NonFiniteError) as raised:
        jt.fit(state, data, loss_fn=root_loss, batch_size=1)
    found = (raised.value.epoch, raised.value.step, raised.value.quantity)
    assert found == (1, 2, "training loss")
    with pytest.raises(jt.errors.NonFiniteError) as raised:
        jt.fit(recording(state), data, loss_fn=root_loss, batch_size=1)
    found = (raised.value.epoch, raised.value.step, raised.value.quantity)
    assert found == (1, 1, "gradient norm")
    _, history = jt.fit(skipping(state), data, loss_fn=root_loss, batch_size=1, epochs=1)
    assert history["skipped_steps"].tolist() == [1]


def nan_gradient(predictions, targets):
    """0 everywhere; its gradient is NaN where the prediction equals the target."""
    error = (predictions - targets)[:, 0]
    return jnp.where(error == 0, 0.0, 0.0 * jnp.sqrt(jnp.abs(error)))


@pytest.mark.parametrize(
    ("optimizer", "loss_fn", "value"),
    [
        (jt.optimizers.rprop(0.1), root_loss, "inf"),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), root_loss, "inf"),
        (optax.chain(optax.zero_nans(), optax.sgd(0.1)), nan_gradient, "nan"),
    ],
    ids=["rprop", "clip", "zero_nans"],
)
def test_a_nonfinite_gradient_that_the_optimizer_hides_ends_the_run_where_its_norm_is_recorded(
    optimizer, loss_fn, value: str
) -> None:
    """Their updates stay finite: they use the sign of a gradient, clip it or replace NaN by 0."""
    state, data = line([1.0, 5.0, 5.0], optimizer)
    message = f"gradient norm became {value} in epoch 1, step 1"
    with pytest.raises(jt.errors.NonFiniteError, match=message):
        jt.fit(recording(state), data, loss_fn=loss_fn, batch_size=1, epochs=1)


def test_a_nonfinite_parameter_that_no_loss_depends_on_is_found(tmp_path: Path) -> None:
    """The embedding of the first example becomes infinite, and no later example uses it."""

    class Table(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Embed(2, 1, embedding_init=nn.initializers.ones)(inputs)

    data = jt.Dataset(jnp.array([1, 0, 0]), jnp.array([[1.0], [5.0], [5.0]]))
    state = jt.init_state(Table(), SGD, data.inputs[:1], key=jax.random.key(0))
    with pytest.raises(
        jt.errors.NonFiniteError, match=r"embedding became (-?inf|nan) in epoch 1, step 3"
    ):
        jt.fit(
            state,
            data,
            loss_fn=root_loss,
            batch_size=1,
            epochs=1,
            callbacks=[jt.callbacks.checkpoint(tmp_path)],
        )
    assert list_epochs(tmp_path) == []


def test_a_nonfinite_gradient_in_the_last_step_of_an_epoch_ends_the_run(tmp_path: Path) -> None:
    """No later loss would show it, since there are neither further steps nor test data."""
    state, data = line([5.0, 2.0], jt.optimizers.sgd(0.0))
    with pytest.raises(jt.errors.NonFiniteError, match=r"params\.weight became .* epoch 1, step 2"):
        jt.fit(
            state,
            data,
            loss_fn=root_loss,
            batch_size=1,
            epochs=1,
            callbacks=[jt.callbacks.checkpoint(tmp_path)],
        )
    assert list_epochs(tmp_path) == []


@pytest.mark.parametrize("field", ["inputs", "targets"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_nan_and_infinity_in_the_data_are_refused(field: str, bad: float, kind) -> None:
    arrays = {"inputs": np.ones((4, 1), np.float32), "targets": np.ones((4, 1), np.float32)}
    arrays[field][2, -1] = bad
    data = jt.Dataset(**{name: kind(array) for name, array in arrays.items()})
    message = rf"train\.{field} holds {bad} at \[2, 0\]; expected finite numbers"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(line([0.0])[0], data, loss_fn=MSE)


@pytest.mark.parametrize("array", [np.array([1 + 2j]), np.array(["a"]), np.array([object()])])
def test_data_that_are_not_real_numbers_are_refused(array: np.ndarray) -> None:
    with pytest.raises(jt.errors.InputError, match=r"train\.inputs has the dtype .*real numbers"):
        jt.fit(line([0.0])[0], jt.Dataset(array, np.zeros(1)), loss_fn=MSE)


def test_numbers_that_overflow_32_bits_are_refused() -> None:
    """JAX would convert them to infinity, or to another label."""
    far = jt.Dataset(np.array([[1.0], [1e300]]), np.zeros((2, 1)))
    wrapped = jt.Dataset(np.zeros((2, 1)), np.array([2**32 + 1, 0]))
    for data, message in (
        (far, r"train\.inputs holds 1e\+300 at \[1, 0\]; .* float32"),
        (wrapped, r"train\.targets holds 4294967297 at \[0\]; .* int32"),
    ):
        with pytest.raises(jt.errors.InputError, match=message):
            jt.fit(line([0.0])[0], data, loss_fn=MSE)


def test_a_float16_model_trains() -> None:
    """The square of its gradient norm, 400, overflows float16."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(1, use_bias=False, dtype=jnp.float16, param_dtype=jnp.float16)(inputs)

    data = jt.Dataset(jnp.full((8, 1), 20.0, jnp.float16), jnp.full((8, 1), 8.0, jnp.float16))
    state = jt.init_state(Half(), jt.optimizers.sgd(1e-4), data.inputs[:1], key=jax.random.key(0))
    state = state.replace(params={"Dense_0": {"kernel": jnp.full((1, 1), -0.1, jnp.float16)}})
    for start in (recording(state), recording(skipping(state))):
        _, history = jt.fit(start, data, loss_fn=MSE, epochs=1, batch_size=8)
        assert history["gradient_norm"] == pytest.approx([400.0], rel=1e-2)


def test_bytes_booleans_and_half_precision_are_accepted() -> None:
    state, _ = line([0.0])
    for dtype in (np.uint8, bool, jnp.bfloat16, np.float16, np.int32):
        data = jt.Dataset(jnp.ones((3, 1), dtype), np.zeros((3, 1)))
        jt.fit(state, data, loss_fn=MSE, epochs=0)


def test_an_infinite_second_moment_ends_the_run(tmp_path: Path) -> None:
    """The square of a gradient of 1e20 overflows; the update is then 0, and no loss shows it."""

    def far(predictions, targets):
        return predictions[:, 0] * targets[:, 0]

    state, data = line([1.0, 1e20, 1.0], jt.optimizers.adam(1e-3))
    with pytest.raises(
        jt.errors.NonFiniteError, match=r"opt_state\..* became inf in epoch 1, step 3"
    ):
        jt.fit(
            state,
            data,
            loss_fn=far,
            batch_size=1,
            epochs=1,
            callbacks=[jt.callbacks.checkpoint(tmp_path)],
        )
    assert list_epochs(tmp_path) == []


def test_a_nan_of_the_training_loss_advises_to_check_the_labels(small_state) -> None:
    """Labels are not checked in advance, since a user's function hides the loss."""

    def hidden(predictions, targets):
        return 2 * jt.losses.cross_entropy(predictions, targets)

    labels = jnp.arange(50) % 3
    data = jt.Dataset(jnp.ones((50, 6)), labels.at[37].set(7))
    message = r"training loss became nan in epoch 1, step 3.*class labels are below the number"
    with pytest.raises(jt.errors.NonFiniteError, match=message):
        jt.fit(small_state, data, loss_fn=hidden, batch_size=16)


def test_a_nan_in_the_state_is_never_saved_within_an_epoch(tmp_path) -> None:
    """The loss of each step is finite; the gradient of the third step is not."""
    inputs = jnp.ones((6, 1)).at[2].set(0.0)
    data = jt.Dataset(inputs, jnp.zeros((6, 1)))

    def root(predictions, targets):
        return jnp.sqrt(jnp.abs(predictions))[:, 0]

    model = jt.Model(
        lambda key, x: ({"w": jnp.ones(())}, {}),
        lambda params, state, x, *, train, key: (params["w"] * x, state),
    )
    state = jt.init_state(model, optax.sgd(0.1), data.inputs[:1], key=jax.random.key(0))
    saves = jt.callbacks.checkpoint(tmp_path, every_steps=3)
    with pytest.raises(jt.errors.NonFiniteError, match=r"params\.w became nan in epoch 1, step 3"):
        jt.fit(state, data, loss_fn=root, epochs=1, batch_size=1, callbacks=[saves])
    assert not list(tmp_path.glob("epoch-*"))
