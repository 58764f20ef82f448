"""Inputs, predictions and targets as pytrees, weights of the losses, and accumulated metrics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close

LOSS, MSE = jt.losses.cross_entropy, jt.losses.mean_squared_error
MAE = jt.losses.mean_absolute_error
LINEAR, SGD = jt.models.LinearRegression(), jt.optimizers.sgd(0.1)


class TwoHeads(nn.Module):
    """Two inputs of different widths; predicts a class and a number."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = jnp.concatenate([inputs["image"], inputs["age"]], axis=1)
        return {"label": nn.Dense(3)(x), "value": nn.Dense(1)(x)}


def two_losses(predictions, targets):
    return LOSS(predictions["label"], targets["label"]) + MSE(
        predictions["value"], targets["value"]
    )


@pytest.fixture(scope="module")
def data() -> jt.Dataset:
    key = jax.random.key(0)
    labels = jnp.arange(50) % 3
    inputs = {"image": jax.nn.one_hot(labels, 6), "age": jax.random.normal(key, (50, 1))}
    return jt.Dataset(inputs, {"label": labels, "value": inputs["age"] * 2})


@pytest.fixture(scope="module")
def heads(data: jt.Dataset) -> jt.TrainState:
    """The network for `data`."""
    return jt.init_state(TwoHeads(), optax.adam(0.03), data.inputs, key=jax.random.key(0))


def test_every_function_takes_pytrees(heads: jt.TrainState, data: jt.Dataset) -> None:
    _, metrics = jt.train_step(heads, data, two_losses)
    found = jt.eval_step(heads, data, two_losses)
    assert metrics["loss"] == pytest.approx(float(found["loss"]), rel=1e-6)
    fitted, history = jt.fit(
        heads,
        data,
        data[:20],
        validation=data[20:],
        loss_fn=two_losses,
        metric_fns={"accuracy": lambda p, t: jt.metrics.accuracy(p["label"], t["label"])},
        epochs=30,
        batch_size=16,
        test_batch_size=10,
        key=jax.random.key(1),
    )
    assert history["test_accuracy"][-1] == 1
    assert history["test_loss"][-1] < 0.1 * history["test_loss"][0]
    predictions = jt.predict(fitted, data.inputs, batch_size=8)
    assert predictions["label"].shape == (50, 3)
    assert_close(predictions, jt.predict(fitted, data.inputs), rtol=1e-5)
    _, losses = jt.train_epoch(heads, data, two_losses, batch_size=16)
    assert losses.shape == (4,)


def test_errors_name_the_path_in_a_pytree(heads: jt.TrainState, data: jt.Dataset) -> None:
    short = data.replace(targets={**data.targets, "value": data.targets["value"][:40]})
    with pytest.raises(jt.errors.InputError, match=r"train\.targets\.value has 40"):
        jt.fit(heads, short, loss_fn=two_losses)
    ages = data.inputs["age"].at[7, 0].set(jnp.nan)
    with pytest.raises(jt.errors.InputError, match=r"train\.inputs\.age holds nan at \[7, 0\]"):
        jt.fit(heads, data.replace(inputs={**data.inputs, "age": ages}), loss_fn=two_losses)


def test_targets_may_be_none() -> None:
    """The loss of this autoencoder depends on the predictions alone."""

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(4)(nn.Dense(2)(inputs)) - inputs

    def error(predictions, targets):
        assert targets is None
        return jnp.square(predictions).sum(axis=1)

    data = jt.Dataset(jax.random.normal(jax.random.key(0), (30, 4)))
    state = jt.init_state(Autoencoder(), optax.adam(0.03), data.inputs, key=jax.random.key(0))
    _, history = jt.fit(state, data, data, loss_fn=error, epochs=20, batch_size=15)
    assert history["test_loss"][-1] < 0.7 * history["test_loss"][0]


def line(weights) -> tuple[jt.TrainState, jt.Dataset]:
    inputs = jnp.linspace(-1, 1, 12)[:, None]
    data = jt.Dataset(inputs, inputs**2, weights)
    return jt.init_state(LINEAR, SGD, inputs, key=jax.random.key(0)), data


def test_an_integer_weight_equals_repeating_the_example() -> None:
    """Weight 0 leaves an example out, and weight 3 counts it three times."""
    state, data = line(jnp.array([1.0, 0.0, 3.0] + 9 * [0.0]))
    weighted, metrics = jt.train_step(state, data, MSE)
    repeated = data.replace(weights=None).take(jnp.array([0, 2, 2, 2]))
    expected, expected_metrics = jt.train_step(state, repeated, MSE)
    assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    assert_close(weighted.params, expected.params)


@pytest.mark.parametrize("batch_size", [1, 5, 14])
def test_weighted_means_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    """Also where all examples of a batch have weight 0."""
    weights = jnp.array([0.0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1])
    state, data = line(weights)
    mae = {"mae": jt.losses.mean_absolute_error}
    found = jt.evaluate(state, data, MSE, mae, batch_size=batch_size)
    kept = data.replace(weights=None).take(jnp.flatnonzero(weights))
    assert_close(found, jt.evaluate(state, kept, MSE, mae), rtol=1e-5)


def test_weights_per_token_train_a_sequence_model() -> None:
    """Padding with the label −1 and weight 0 affects neither sums nor counts."""

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(3)(jax.nn.one_hot(inputs, 5))

    tokens = jax.random.randint(jax.random.key(0), (20, 7), 0, 5)
    lengths = 1 + jnp.arange(20) % 7
    mask = jnp.arange(7)[None] < lengths[:, None]
    data = jt.Dataset(tokens, jnp.where(mask, tokens % 3, -1), mask.astype(jnp.float32))
    state = jt.init_state(Tagger(), optax.adam(0.1), tokens, key=jax.random.key(0))
    fitted, history = jt.fit(
        state,
        data,
        data,
        loss_fn=LOSS,
        metric_fns={"accuracy": jt.metrics.accuracy},
        epochs=30,
        batch_size=8,
    )
    assert history["test_accuracy"][-1] == pytest.approx(1.0)
    logits = jt.predict(fitted, tokens)
    losses = np.asarray(LOSS(logits, data.targets))
    expected = losses[np.asarray(mask)].mean()
    assert history["test_loss"][-1] == pytest.approx(expected, rel=1e-5)
    wrong = data.replace(targets=data.targets.at[3, 0].set(3))
    with pytest.raises(
        jt.errors.InputError, match="holds the label 3; expected labels from 0 to 2"
    ):
        jt.fit(state, wrong, loss_fn=LOSS)


def test_a_batch_of_zero_weights_does_not_change_the_parameters() -> None:
    state, data = line(jnp.zeros(12))
    after, metrics = jt.train_step(state, data, MSE)
    assert metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_evaluation_of_no_weight_is_refused_or_nan() -> None:
    """There is nothing whose mean could be taken; 0 would be the best loss."""
    state, data = line(jnp.zeros(12))
    with pytest.raises(jt.errors.InputError, match=r"dataset\.weights is 0 everywhere"):
        jt.evaluate(state, data, MSE, {"mae": MAE})
    assert np.isnan(jt.eval_step(state, data, MSE)["loss"])


def test_a_pair_of_functions_defines_an_accumulated_metric(small_state, small_classes) -> None:
    """Perplexity is the exponential of a mean."""

    def sums(predictions, targets, weights):
        return jnp.sum(weights * LOSS(predictions, targets)), jnp.sum(weights)

    perplexity = (sums, lambda total: jnp.exp(total[0] / total[1]))
    _, history = jt.fit(
        small_state,
        small_classes,
        small_classes,
        loss_fn=LOSS,
        metric_fns={"perplexity": perplexity},
        epochs=1,
        test_batch_size=20,
    )
    np.testing.assert_allclose(history["test_perplexity"], np.exp(history["test_loss"]), rtol=1e-5)


def test_losses_receive_float32_predictions(small_classes) -> None:
    """The logits of a bfloat16 network are converted before the loss."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(3, dtype=jnp.bfloat16)(inputs)

    seen = []

    def loss_fn(predictions, targets):
        seen.append(predictions.dtype)
        return LOSS(predictions, targets)

    state = jt.init_state(Half(), optax.sgd(0.1), small_classes.inputs, key=jax.random.key(0))
    _, metrics = jt.train_step(state, small_classes, loss_fn)
    jt.evaluate(state, small_classes, loss_fn)
    assert set(seen) == {jnp.dtype(jnp.float32)}
    logits = jt.predict(state, small_classes.inputs)
    assert logits.dtype == jnp.bfloat16
    expected = LOSS(logits.astype(jnp.float32), small_classes.targets).mean()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "loss_fn",
    [MSE, jt.losses.cosine_distance],
)
def test_a_weight_of_zero_keeps_nan_out_of_the_gradient(loss_fn) -> None:
    """Without a mask, 0 times the gradient of a NaN target would be NaN."""
    state, data = line(jnp.ones(12).at[0].set(0.0))
    padded = data.replace(targets=data.targets.at[0].set(jnp.nan))
    ours, metrics = jt.train_step(state, padded, loss_fn)
    rest = data.replace(weights=None)[1:]
    theirs, expected = jt.train_step(state, rest, loss_fn)
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert_close(ours.params, theirs.params, rtol=1e-4)


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_a_weight_of_zero_hides_what_is_not_finite_from_training(wrong) -> None:
    """In inputs and targets, of all that trains and evaluates."""
    state, data = line(jnp.ones(12).at[1].set(0.0))
    bad = jt.Dataset(data.inputs.at[1].set(wrong), data.targets.at[1].set(wrong), data.weights)
    options = {"loss_fn": MSE, "metric_fns": {"mae": MAE, "r2": jt.metrics.r2}, "batch_size": 4}
    ours, history = jt.fit(state, bad, bad, epochs=2, **options)
    theirs, expected = jt.fit(state, data, data, epochs=2, **options)
    assert_close(ours.params, theirs.params, rtol=1e-6)
    assert_close(jt.train(state, bad, bad, epochs=2, **options)[0].params, ours.params, rtol=1e-6)
    for name in ("train_loss", "train_r2", "test_mae", "test_r2"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-6)
    after, losses = jt.train_epoch(state, bad, MSE, batch_size=4)
    expected_after, expected_losses = jt.train_epoch(state, data, MSE, batch_size=4)
    assert_close(after.params, expected_after.params, rtol=1e-6)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    counted = bad.replace(weights=data.weights.at[1].set(0.5))
    with pytest.raises(jt.errors.InputError, match=r"train.inputs holds (nan|inf) at \[1, 0\]"):
        jt.fit(state, counted, epochs=1, **options)


def test_weights_per_token_hide_padded_inputs_and_weights_per_output_missing_targets() -> None:
    """An input without weights of its own is hidden where its example has none at all."""
    inputs = jax.random.normal(jax.random.key(0), (6, 4, 2))
    mask = jnp.arange(4)[None] < 2 + jnp.arange(6)[:, None] % 3

    class PerToken(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(3)(inputs)

    state = jt.init_state(PerToken(), SGD, inputs, key=jax.random.key(0))
    labels = jnp.where(mask, 1, -1)
    padded = jt.Dataset(jnp.where(mask[..., None], inputs, jnp.nan), labels, mask)
    expected = jt.train_step(state, padded.replace(inputs=inputs), LOSS)[0]
    assert_close(jt.train_step(state, padded, LOSS)[0].params, expected.params, rtol=1e-6)

    def per_output(predictions, targets):
        return jnp.square(predictions - targets)

    state = jt.init_state(nn.Dense(3), SGD, inputs[:, 0], key=jax.random.key(0))
    weights = jnp.ones((6, 3)).at[0].set(0.0).at[2, 1].set(0.0)
    whole = jt.Dataset(inputs[:, 0], jnp.ones((6, 3)), weights)
    missing = whole.replace(
        inputs=whole.inputs.at[0].set(jnp.nan), targets=jnp.where(weights > 0, 1.0, jnp.nan)
    )
    expected = jt.fit(state, whole, loss_fn=per_output, epochs=1)[0]
    found = jt.fit(state, missing, loss_fn=per_output, epochs=1)[0]
    assert_close(found.params, expected.params, rtol=1e-6)
    broken = missing.replace(inputs=missing.inputs.at[2, 1].set(jnp.nan))
    with pytest.raises(jt.errors.InputError, match=r"train.inputs holds nan at \[2, 1\]"):
        jt.fit(state, broken, loss_fn=per_output, epochs=1)
