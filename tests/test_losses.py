"""Values and gradients of losses compared with PyTorch, and the arguments they refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt

F = torch.nn.functional


def each(loss):
    """A PyTorch loss without reduction, averaged over each example."""
    return lambda predictions, targets: loss(predictions, targets, reduction="none").mean(
        dim=(1, 2)
    )


REGRESSION = {
    jt.losses.mean_absolute_error: each(F.l1_loss),
    jt.losses.mean_squared_error: each(F.mse_loss),
    jt.losses.squared_error_sum: lambda p, t: F.mse_loss(p, t, reduction="none").sum(dim=(1, 2)),
    jt.losses.euclidean_distance: lambda p, t: torch.linalg.vector_norm(p - t, dim=(1, 2)),
    jt.losses.cosine_distance: lambda p, t: 1 - F.cosine_similarity(p.flatten(1), t.flatten(1)),
}
# No subnormal numbers: XLA flushes them to 0.
VALUES = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32, allow_subnormal=False)
)


def value_and_grad(loss_fn, predictions, targets):
    def total(predictions):
        values = loss_fn(predictions, targets)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(predictions))
    return np.asarray(values), np.asarray(gradient)


def assert_pytorchs(loss_fn, theirs, predictions, targets, rtol=1e-6, scale=1.0) -> None:
    """Values and gradients, relative to their size; `scale` is the size of what they subtract."""
    values, gradient = value_and_grad(loss_fn, predictions, jnp.asarray(targets))
    leaf = torch.tensor(predictions, requires_grad=True)
    expected = theirs(leaf, torch.tensor(targets))
    expected.sum().backward()
    # XLA flushes subnormal numbers to zero.
    np.testing.assert_allclose(values, expected.detach(), rtol=rtol, atol=1e-37 + 1e-6 * scale)
    finite = np.isfinite(leaf.grad.numpy())
    np.testing.assert_allclose(
        gradient[finite], leaf.grad.numpy()[finite], rtol=rtol, atol=1e-37 + 1e-6 * scale
    )


@pytest.mark.parametrize("loss_fn", REGRESSION)
@given(pair=hnp.arrays(np.float32, (2, 3, 2, 2), elements=VALUES))
def test_regression_losses_are_pytorchs(loss_fn, pair: np.ndarray) -> None:
    scale = 0.0
    if loss_fn is jt.losses.cosine_distance:
        # The angle of vectors that are nearly parallel is a difference of nearly equal numbers,
        # and its gradient grows as 1 / length; below 1e-3 the comparison would be one of noise.
        assume(np.linalg.norm(pair.reshape(6, 4), axis=1).min() > 1e-3)
        scale = 1000.0 if np.linalg.norm(pair[0].reshape(3, 4), axis=1).min() < 1 else 1.0
    elif loss_fn is jt.losses.euclidean_distance:
        # PyTorch's norm does not square what would underflow; squares below 1e-38 do.
        difference = np.linalg.norm((pair[0] - pair[1]).reshape(3, 4), axis=1)
        assume(((difference == 0) | (difference > 1e-15)).all())
        scale = 1.0
    assert_pytorchs(loss_fn, REGRESSION[loss_fn], *pair, scale=scale)


@given(
    predictions=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
    targets=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
)
def test_binary_cross_entropy_is_pytorchs(predictions, targets) -> None:
    assert_pytorchs(
        jt.losses.binary_cross_entropy, each(F.binary_cross_entropy), predictions, targets
    )


@given(
    predictions=hnp.arrays(np.float32, (3, 2, 2), elements=VALUES),
    targets=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
)
def test_sigmoid_binary_cross_entropy_is_pytorchs(predictions, targets) -> None:
    assert_pytorchs(
        jt.losses.sigmoid_binary_cross_entropy,
        each(F.binary_cross_entropy_with_logits),
        predictions,
        targets,
        scale=max(1.0, np.abs(predictions).max() / 10),
    )


@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=VALUES),
    weights=hnp.arrays(np.float32, (4, 5), elements=st.floats(0.0625, 1, width=32)),
)
def test_soft_cross_entropy_is_pytorchs(logits, weights) -> None:
    assert_pytorchs(
        jt.losses.soft_cross_entropy,
        lambda p, t: F.cross_entropy(p, t, reduction="none"),
        logits,
        weights / weights.sum(axis=1, keepdims=True),
        scale=max(1.0, np.abs(logits).max()),
    )


@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=VALUES),
    labels=hnp.arrays(np.int32, 4, elements=st.integers(0, 4)),
)
def test_cross_entropy_is_pytorchs(logits: np.ndarray, labels: np.ndarray) -> None:
    values, gradient = value_and_grad(jt.losses.cross_entropy, logits, jnp.asarray(labels))
    theirs = torch.tensor(logits, requires_grad=True)
    targets = torch.tensor(labels).long()
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="none")
    expected.sum().backward()
    # Near 0 both subtract nearly equal numbers: compare there by the logits' own precision.
    atol = 1e-6 * max(1.0, float(np.abs(logits).max()))
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6, atol=atol)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_classes() -> None:
    values = jt.losses.cross_entropy(jnp.zeros((2, 10)), jnp.array([0, 9]))
    np.testing.assert_allclose(values, np.log(10), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_classes_gives_nan_not_a_neighbours_loss(label: int) -> None:
    values = jt.losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([1, label]))
    assert np.isfinite(values[0])
    assert np.isnan(values[1])


def test_narrow_labels_do_not_wrap() -> None:
    """Bytes are a language model's classes; 256 is 0 as uint8."""
    labels = np.array([0, 255], np.uint8)
    values = jt.losses.cross_entropy(jnp.zeros((2, 256)), jnp.asarray(labels))
    np.testing.assert_allclose(values, np.log(256), rtol=1e-6)


def test_the_distance_of_equal_vectors_has_gradient_zero() -> None:
    values, gradient = value_and_grad(
        jt.losses.euclidean_distance, np.ones((2, 3), np.float32), jnp.ones((2, 3))
    )
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("length", [1e-3, 3e-9, 1e-12])
def test_cosine_distance_of_tiny_vectors_is_pytorchs(length: float) -> None:
    short = np.float32(length) * np.array([[1.0, 0.5, 0.2]], np.float32)
    long = np.array([[1.0, -0.3, 1.0]], np.float32)
    values, gradient = value_and_grad(jt.losses.cosine_distance, short, jnp.asarray(long))
    leaf = torch.tensor(short, requires_grad=True)
    expected = 1 - F.cosine_similarity(leaf, torch.tensor(long))
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5)


def test_cosine_distances_by_hand() -> None:
    """The same direction, a right angle, opposite, 60°, and no direction at all."""
    right = jnp.array([1.0, 0.0])
    others = jnp.array([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [0.5, 0.75**0.5], [0.0, 0.0]])
    values = jt.losses.cosine_distance(others, jnp.tile(right, (5, 1)))
    np.testing.assert_allclose(values, [0, 1, 2, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certainty_that_is_wrong_costs_100_with_a_finite_gradient(p: float) -> None:
    values, gradient = value_and_grad(
        jt.losses.binary_cross_entropy, np.full((1, 1), p, np.float32), jnp.array([[1 - p]])
    )
    np.testing.assert_array_equal(values, 100)
    assert np.isfinite(gradient).all()


def test_weighted_sum_is_the_sum_of_weighted_losses() -> None:
    """The result is again a loss, also for another sum."""
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


def test_the_name_of_a_weighted_sum_lists_its_terms() -> None:
    inner = jt.losses.weighted_sum((2.0, jt.losses.cross_entropy))
    outer = jt.losses.weighted_sum((0.5, inner), (-1.0, lambda p, t: p))
    assert outer.__name__ == "(0.5 * (2.0 * cross_entropy) + -1.0 * <lambda>)"


@pytest.mark.parametrize("terms", [(), ((float("nan"), jt.losses.mean_squared_error),)])
def test_weighted_sum_refuses_no_terms_and_no_numbers(terms) -> None:
    with pytest.raises(jt.InputError, match=r"expected (\(weight, loss\) pairs|a finite)"):
        jt.losses.weighted_sum(*terms)


def test_wrapped_losses_are_found_through_all_layers() -> None:
    """So that labels are checked in range whatever surrounds the loss that takes them."""

    @functools.wraps(jt.losses.cross_entropy)
    def scaled(predictions, targets):
        return 2 * jt.losses.cross_entropy(predictions, targets)

    @jax.jit
    def own(predictions, targets):
        return predictions[:, 0]

    partial = functools.partial(scaled)
    loss_fn = jt.losses.weighted_sum((1.0, jt.losses.weighted_sum((0.5, partial))), (2.0, own))
    found = jt.losses.single_losses(loss_fn)
    assert found & jt.losses.LABEL_LOSSES == {jt.losses.cross_entropy}
    assert not found & jt.losses.PROBABILITY_LOSSES
    assert jt.losses.single_losses(own).isdisjoint(jt.losses.LABEL_LOSSES)
    assert jt.losses.single_losses(jax.jit(jt.losses.soft_cross_entropy)) & (
        jt.losses.PROBABILITY_LOSSES
    )
    assert jt.losses.name_of(partial) == "cross_entropy"


def test_bfloat16_cross_entropy_is_that_of_pytorchs_autocast() -> None:
    random = np.random.default_rng(0)
    logits = (5 * random.normal(size=(512, 10))).astype(np.float32)
    labels = random.integers(0, 10, 512)
    values = jt.losses.cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels))
    assert values.dtype == jnp.float32
    theirs = F.cross_entropy(
        torch.tensor(logits).bfloat16().float(), torch.tensor(labels), reduction="none"
    )
    np.testing.assert_allclose(values, theirs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values.mean(), theirs.mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
    "loss_fn",
    # Sorted, since parallel workers must collect the tests in the same order.
    [*REGRESSION, *sorted(jt.losses.PROBABILITY_LOSSES, key=jt.losses.name_of)],
    ids=jt.losses.name_of,
)
def test_half_precision_is_promoted_before_the_loss(loss_fn, dtype) -> None:
    pair = np.random.default_rng(0).uniform(0.1, 0.9, (2, 6, 4))
    narrow = [jnp.asarray(values, jnp.float32).astype(dtype) for values in pair]
    values = loss_fn(*narrow)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss_fn(*[v.astype(jnp.float32) for v in narrow]))
    gradient = jax.grad(lambda p: loss_fn(p, narrow[1]).sum())(narrow[0])
    assert gradient.dtype == dtype


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        values = jt.losses.mean_squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3)))
        assert values.dtype == jnp.float64


def test_cross_entropy_per_token_is_that_of_each_token_alone() -> None:
    random = np.random.default_rng(1)
    logits = jnp.asarray(random.normal(size=(3, 4, 7)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 7, (3, 4)))
    values = jt.losses.cross_entropy(logits, labels.at[1, 2].set(7))
    flat = jt.losses.cross_entropy(logits.reshape(12, 7), labels.reshape(12)).reshape(3, 4)
    np.testing.assert_allclose(values, flat.at[1, 2].set(jnp.nan), rtol=1e-6)


def test_losses_run_where_rank_promotion_is_an_error() -> None:
    pair = jnp.full((2, 3, 4), 0.5), jnp.full((2, 3, 4), 0.25)
    with jax.numpy_rank_promotion("raise"):
        for loss_fn in (*REGRESSION, *jt.losses.PROBABILITY_LOSSES):
            loss_fn(*pair)
            jax.grad(lambda p, loss_fn=loss_fn: loss_fn(p, pair[1]).sum())(pair[0])
        jt.losses.cross_entropy(pair[0], jnp.zeros((2, 3), int))
        jt.losses.weighted_sum((0.5, jt.losses.mean_squared_error))(*pair)


ALL_SHAPED = [
    *REGRESSION,
    jt.losses.binary_cross_entropy,
    jt.losses.sigmoid_binary_cross_entropy,
]


@pytest.mark.parametrize("loss_fn", ALL_SHAPED)
def test_shapes_that_would_broadcast_are_refused(loss_fn) -> None:
    with pytest.raises(jt.InputError, match=r"\(4, 1\).*\(4,\).*same shape"):
        loss_fn(jnp.zeros((4, 1)), jnp.zeros(4))


def test_cross_entropy_refuses_float_labels_and_wrong_lengths() -> None:
    with pytest.raises(jt.InputError, match=r"float32.*integer"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4))
    with pytest.raises(jt.InputError, match=r"\(4, 1\).*\(4,\)"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 1), int))
