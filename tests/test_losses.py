"""Losses on cases solved by hand, their dtypes, and the arguments they refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt

REGRESSION = [
    jt.losses.mean_absolute_error,
    jt.losses.mean_squared_error,
    jt.losses.squared_error_sum,
    jt.losses.euclidean_distance,
    jt.losses.cosine_distance,
]


def value_and_grad(loss_fn, predictions, targets):
    def total(predictions):
        values = loss_fn(predictions, targets)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(predictions))
    return np.asarray(values), np.asarray(gradient)


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (jt.losses.mean_absolute_error, [1, 3.5]),
        (jt.losses.mean_squared_error, [2, 12.5]),
        (jt.losses.squared_error_sum, [4, 25]),
        (jt.losses.euclidean_distance, [2, 5]),
    ],
)
def test_distances_equal_solutions_by_hand(loss_fn, expected) -> None:
    """The differences are (0, 2) and (3, 4)."""
    values = loss_fn(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_cross_entropies_of_probabilities_equal_solutions_by_hand() -> None:
    """Logits of ln 3 and 0 are the probabilities 3/4 and 1/4."""
    logits, half = jnp.array([[np.log(3.0), 0.0]]), jnp.array([[0.5, 0.5]])
    expected = [-np.log(3 / 16) / 2]
    np.testing.assert_allclose(jt.losses.soft_cross_entropy(logits, half), expected, rtol=1e-6)
    single, target = logits[:, :1], jnp.array([[1.0]])
    loss = jt.losses.sigmoid_binary_cross_entropy(single, target)
    np.testing.assert_allclose(loss, [-np.log(3 / 4)], rtol=1e-6)
    loss = jt.losses.binary_cross_entropy(jnp.array([[0.75]]), target)
    np.testing.assert_allclose(loss, [-np.log(3 / 4)], rtol=1e-6)


def test_cross_entropy_of_equal_logits_is_the_log_of_their_number() -> None:
    values = jt.losses.cross_entropy(jnp.zeros((2, 10)), jnp.array([0, 9]))
    np.testing.assert_allclose(values, np.log(10), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_out_of_range_gives_nan(label: int) -> None:
    values = jt.losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([1, label]))
    assert np.isfinite(values[0])
    assert np.isnan(values[1])


def test_uint8_labels_do_not_overflow() -> None:
    """With 256 classes of bytes, the number of classes would be 0 as uint8."""
    labels = np.array([0, 255], np.uint8)
    values = jt.losses.cross_entropy(jnp.zeros((2, 256)), jnp.asarray(labels))
    np.testing.assert_allclose(values, np.log(256), rtol=1e-6)


def test_the_distance_of_equal_vectors_has_gradient_zero() -> None:
    values, gradient = value_and_grad(
        jt.losses.euclidean_distance, np.ones((2, 3), np.float32), jnp.ones((2, 3))
    )
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "loss_fn",
    [*REGRESSION, *sorted(jt.losses.PROBABILITY_LOSSES, key=jt.losses.name_of)],
    ids=jt.losses.name_of,
)
def test_the_loss_of_nan_is_nan(loss_fn) -> None:
    """A run that has diverged must not have the smallest loss."""
    pair = jnp.full((2, 3, 4), 0.5)
    with_nan = pair.at[1, 0, 2].set(jnp.nan)
    for arguments in ((with_nan, pair), (pair, with_nan)):
        found = np.isnan(loss_fn(*arguments)).reshape(2, -1).any(axis=1)
        np.testing.assert_array_equal(found, [False, True])


def test_cosine_distances_by_hand() -> None:
    """The same direction, a right angle, the opposite, 60°, and the zero vector."""
    right = jnp.array([1.0, 0.0])
    others = jnp.array([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [0.5, 0.75**0.5], [0.0, 0.0]])
    values = jt.losses.cosine_distance(others, jnp.tile(right, (5, 1)))
    np.testing.assert_allclose(values, [0, 1, 2, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_binary_cross_entropy_is_clipped_at_100_with_a_finite_gradient(p: float) -> None:
    values, gradient = value_and_grad(
        jt.losses.binary_cross_entropy, np.full((1, 1), p, np.float32), jnp.array([[1 - p]])
    )
    np.testing.assert_array_equal(values, 100)
    assert np.isfinite(gradient).all()


def test_weighted_sum_is_the_sum_of_weighted_losses() -> None:
    """A weighted sum can be a term of another one."""
    l1, l2 = jt.losses.mean_absolute_error, jt.losses.mean_squared_error
    predictions, targets = jnp.array([[3.0], [1.0]]), jnp.array([[1.0], [1.5]])
    elastic = jt.losses.weighted_sum((1.0, l1), (0.5, l2))
    np.testing.assert_allclose(elastic(predictions, targets), [2 + 0.5 * 4, 0.5 + 0.5 * 0.25])
    nested = jt.losses.weighted_sum((2.0, elastic), (-1.0, l1))
    np.testing.assert_allclose(nested(predictions, targets), [8 - 2, 1.25 - 0.5])


def test_weighted_sum_mixes_labels_and_a_teachers_distribution() -> None:
    """Distillation: targets are the label, followed by the teacher's probabilities."""
    logits = jnp.array([[2.0, 0.0, 1.0]])
    teacher = jnp.array([[0.7, 0.1, 0.2]])
    targets = jnp.concatenate([jnp.array([[2.0]]), teacher], axis=1)
    loss_fn = jt.losses.weighted_sum(
        (0.3, lambda p, t: jt.losses.cross_entropy(p, t[:, 0].astype(int))),
        (0.7, lambda p, t: jt.losses.soft_cross_entropy(p, t[:, 1:])),
    )
    log_probabilities = np.asarray(logits - np.log(np.exp(logits).sum()))[0]
    expected = -0.3 * log_probabilities[2] - 0.7 * np.sum(
        np.asarray(teacher)[0] * log_probabilities
    )
    np.testing.assert_allclose(loss_fn(logits, targets), [expected], rtol=1e-6)


@pytest.mark.parametrize("terms", [(), ((float("nan"), jt.losses.mean_squared_error),)])
def test_weighted_sum_refuses_no_terms_and_nan_weights(terms) -> None:
    with pytest.raises(jt.errors.InputError, match=r"expected (\(weight, loss\) pairs|a finite)"):
        jt.losses.weighted_sum(*terms)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    "loss_fn",
    # Sorted, since parallel workers must collect the tests in the same order.
    [*REGRESSION, *sorted(jt.losses.PROBABILITY_LOSSES, key=jt.losses.name_of)],
    ids=jt.losses.name_of,
)
def test_half_precision_is_converted_to_float32_before_the_loss(loss_fn, dtype) -> None:
    pair = np.random.default_rng(0).uniform(0.1, 0.9, (2, 6, 4))
    narrow = [jnp.asarray(values, jnp.float32).astype(dtype) for values in pair]
    values = loss_fn(*narrow)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss_fn(*[v.astype(jnp.float32) for v in narrow]))
    gradient = jax.grad(lambda p: loss_fn(p, narrow[1]).sum())(narrow[0])
    assert gradient.dtype == dtype


def test_cross_entropy_per_token_equals_that_of_each_token_alone() -> None:
    random = np.random.default_rng(1)
    logits = jnp.asarray(random.normal(size=(3, 4, 7)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 7, (3, 4)))
    values = jt.losses.cross_entropy(logits, labels.at[1, 2].set(7))
    flat = jt.losses.cross_entropy(logits.reshape(12, 7), labels.reshape(12)).reshape(3, 4)
    np.testing.assert_allclose(values, flat.at[1, 2].set(jnp.nan), rtol=1e-6)


ALL_SHAPED = [
    *REGRESSION,
    jt.losses.binary_cross_entropy,
    jt.losses.sigmoid_binary_cross_entropy,
]


@pytest.mark.parametrize("loss_fn", ALL_SHAPED)
def test_shapes_that_would_broadcast_are_refused(loss_fn) -> None:
    message = r"\(4, 1\).*\(4,\).*same shape.*: give targets\[:, None\]$"
    with pytest.raises(jt.errors.InputError, match=message):
        loss_fn(jnp.zeros((4, 1)), jnp.zeros(4))
    with pytest.raises(jt.errors.InputError, match=r": give targets\[\.\.\., 0\]$"):
        loss_fn(jnp.zeros((4, 2)), jnp.zeros((4, 2, 1)))
    with pytest.raises(jt.errors.InputError, match=r"with all others$"):
        loss_fn(jnp.zeros((4, 2)), jnp.zeros((4, 1)))


def test_cross_entropy_refuses_float_labels_and_wrong_lengths() -> None:
    with pytest.raises(jt.errors.InputError, match=r"float32.*integer.*astype\(int\)"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4))
    with pytest.raises(jt.errors.InputError, match=r"float32.*: soft_cross_entropy takes"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 3)))
    with pytest.raises(jt.errors.InputError, match=r"\(4, 1\).*\(4,\): give targets\[:, 0\]"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 1), int))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (functools.partial(jt.losses.huber, delta=0), "delta is 0; expected a number above 0"),
        (functools.partial(jt.losses.smooth_l1, beta=-1), "beta is -1; expected a number of at"),
    ],
)
def test_a_huber_loss_refuses_a_width_that_is_not_positive(loss_fn, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        loss_fn(jnp.zeros((2, 1)), jnp.zeros((2, 1)))


def test_cross_entropy_refuses_options_out_of_range() -> None:
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(
        jt.errors.InputError, match=r"label_smoothing is 1.5; expected a number from 0 to"
    ):
        jt.losses.cross_entropy(logits, labels, label_smoothing=1.5)
    with pytest.raises(
        jt.errors.InputError, match=r"weight has the shape \(2,\); expected one number per"
    ):
        jt.losses.cross_entropy(logits, labels, weight=jnp.ones(2))
