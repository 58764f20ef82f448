"""NaN as a missing target: left out by `ignore_nan`, and refused by `fit` without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxtrain as jt

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(11, 3)).astype(np.float32)
Y = RANDOM.normal(size=(11, 2)).astype(np.float32)
Y[RANDOM.random(Y.shape) < 0.4] = np.nan
Y[4] = np.nan  # an example without any target
BY_OUTPUT = {
    jt.losses.mean_squared_error: lambda p, t: (p - t) ** 2,
    jt.losses.mean_absolute_error: lambda p, t: np.abs(p - t),
    jt.losses.sigmoid_binary_cross_entropy: lambda p, t: np.log1p(np.exp(p)) - p * t,
}


def make_state():
    return jt.init_state(nn.Dense(2), optax.sgd(0.1), X[:1], key=jax.random.key(0))


@pytest.mark.parametrize("loss_fn", BY_OUTPUT)
def test_the_mean_is_that_of_the_outputs_with_a_target(loss_fn) -> None:
    targets = (Y > 0) + 0 * Y if loss_fn is jt.losses.sigmoid_binary_cross_entropy else Y
    data, state = jt.Dataset(X, targets), make_state()
    predictions = np.asarray(jt.predict(state, X))
    mask = ~np.isnan(targets)
    expected = BY_OUTPUT[loss_fn](predictions[mask], targets[mask]).mean()
    masked = jt.losses.ignore_nan(loss_fn)
    for size in (4, 11):  # batches with different numbers of targets
        metrics = jt.evaluate(state, data, masked, {"again": masked}, batch_size=size)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["again"], expected, rtol=1e-5)


def test_examples_of_weight_0_do_not_count() -> None:
    weights = np.arange(11) % 3
    data, state = jt.Dataset(X, Y, weights.astype(np.float32)), make_state()
    errors = (np.asarray(jt.predict(state, X)) - Y) ** 2
    total = np.nansum(weights[:, None] * errors)
    expected = total / np.sum(weights[:, None] * ~np.isnan(Y))
    loss_fn = jt.losses.ignore_nan(jt.losses.mean_squared_error)
    np.testing.assert_allclose(jt.evaluate(state, data, loss_fn)["loss"], expected, rtol=1e-5)


def test_fit_trains_on_the_targets_that_are_present() -> None:
    """The history's mean counts each target once, however they are spread over the batches."""
    loss_fn = jt.losses.ignore_nan(jt.losses.mean_squared_error)
    state = make_state().replace(opt_state=optax.sgd(0.0).init(None))
    still = jt.with_optimizer(state, optax.sgd(0.0))
    options = {"loss_fn": loss_fn, "epochs": 1, "batch_size": 4}
    metric_fns = {"error": jt.losses.ignore_nan(jt.losses.mean_absolute_error)}
    for loop in (jt.fit, jt.train):
        _, history = loop(still, (X, Y), (X, Y), metric_fns=metric_fns, **options)
        np.testing.assert_allclose(history["train_loss"], history["test_loss"], rtol=1e-5)
        np.testing.assert_allclose(history["train_error"], history["test_error"], rtol=1e-5)
        trained, _ = loop(state, (X, Y), **options)
        assert jt.evaluate(trained, (X, Y), loss_fn)["loss"] < history["test_loss"][0]


def two_heads(predictions, targets):
    first = jt.losses.mean_squared_error(predictions[:, :1], targets[:, :1])
    return first + jt.losses.ignore_nan(jt.losses.huber)(predictions[:, 1:], targets[:, 1:])


def unsafe(predictions, targets):
    """Its gradient is NaN where a target is missing, although its values are finite."""
    return jnp.mean(jnp.where(jnp.isnan(targets), 0, (predictions - targets) ** 2), axis=-1)


@pytest.mark.parametrize(
    ("loss_fn", "column", "weights"),
    [
        (jt.losses.mean_squared_error, 0, None),
        (unsafe, 0, None),
        (two_heads, 0, None),
        (two_heads, 1, None),
        (jt.losses.mean_squared_error, 0, 0.0),
    ],
    ids=["mean squared error", "gradient", "other head", "masked head", "weight 0"],
)
def test_fit_asks_the_loss_whether_a_target_may_be_missing(loss_fn, column, weights) -> None:
    targets = np.nan_to_num(Y)
    targets[7, column] = np.nan
    weight = np.ones(11, np.float32)
    weight[7] = 1 if weights is None else weights
    data = jt.Dataset(X, targets, weight)
    is_fine = weights == 0 or (loss_fn is two_heads and column == 1)
    for loop in (jt.fit, jt.train):
        if is_fine:
            _, history = loop(make_state(), data, loss_fn=loss_fn, epochs=1, batch_size=4)
            assert np.isfinite(history["train_loss"]).all()
        else:
            message = rf"train\.targets holds nan at \[7, {column}\]; .*ignore_nan\(loss_fn\)"
            with pytest.raises(jt.errors.InputError, match=message):
                loop(make_state(), data, loss_fn=loss_fn, epochs=1)


def test_missing_inputs_and_infinite_targets_stay_refused() -> None:
    loss_fn = jt.losses.ignore_nan(jt.losses.mean_squared_error)
    inputs, targets = X.copy(), Y.copy()
    inputs[2, 1], targets[3, 0] = np.nan, np.inf
    for data, message in (
        ((inputs, Y), r"train\.inputs holds nan at \[2, 1\]"),
        ((X, targets), r"train\.targets holds inf at \[3, 0\]"),
    ):
        with pytest.raises(jt.errors.InputError, match=message):
            jt.fit(make_state(), data, loss_fn=loss_fn, epochs=1)
    probabilities = np.where(np.isnan(Y), np.nan, 2.0)
    with pytest.raises(jt.errors.InputError, match=r"holds the probability 2\.0"):
        jt.fit(
            make_state(),
            (X, probabilities.astype(np.float32)),
            loss_fn=jt.losses.ignore_nan(jt.losses.sigmoid_binary_cross_entropy),
        )


@pytest.mark.parametrize(
    "loss_fn",
    [
        jt.losses.cosine_distance,
        jt.losses.weighted_sum((1.0, jt.losses.euclidean_distance)),
        jt.losses.soft_cross_entropy,
    ],
)
def test_losses_of_whole_examples_are_refused(loss_fn) -> None:
    with pytest.raises(jt.errors.InputError, match="compares examples as a whole; expected a loss"):
        jt.losses.ignore_nan(loss_fn)
