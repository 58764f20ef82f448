"""Values and gradients of losses compared with PyTorch's."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt
from tests.test_losses import value_and_grad

torch = pytest.importorskip("torch")
F = torch.nn.functional


def each(loss):
    """Returns the PyTorch loss averaged over each example."""
    return lambda predictions, targets: loss(predictions, targets, reduction="none").mean(
        dim=(1, 2)
    )


REGRESSION = {
    jt.losses.mean_absolute_error: each(F.l1_loss),
    jt.losses.mean_squared_error: each(F.mse_loss),
    jt.losses.squared_error_sum: lambda p, t: F.mse_loss(p, t, reduction="none").sum(dim=(1, 2)),
    jt.losses.euclidean_distance: lambda p, t: torch.linalg.vector_norm(p - t, dim=(1, 2)),
    jt.losses.cosine_distance: lambda p, t: 1 - F.cosine_similarity(p.flatten(1), t.flatten(1)),
    jt.losses.huber: each(F.huber_loss),
    functools.partial(jt.losses.huber, delta=0.5): each(functools.partial(F.huber_loss, delta=0.5)),
    jt.losses.smooth_l1: each(F.smooth_l1_loss),
    functools.partial(jt.losses.smooth_l1, beta=0.5): each(
        functools.partial(F.smooth_l1_loss, beta=0.5)
    ),
    functools.partial(jt.losses.smooth_l1, beta=0): each(
        functools.partial(F.smooth_l1_loss, beta=0)
    ),
}
# No subnormal numbers: XLA flushes them to 0.
VALUES = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32, allow_subnormal=False)
)


def assert_matches_pytorch(loss_fn, theirs, predictions, targets, rtol=1e-6, scale=1.0) -> None:
    """Compares values and gradients; `scale` is the size of the numbers that they subtract."""
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
@settings(max_examples=20)
@given(pair=hnp.arrays(np.float32, (2, 3, 2, 2), elements=VALUES))
def test_regression_losses_match_pytorch(loss_fn, pair: np.ndarray) -> None:
    scale = 0.0
    if loss_fn is jt.losses.cosine_distance:
        # The angle of vectors that are nearly parallel is a difference of nearly equal numbers,
        # and its gradient grows as 1 / length; below 1e-3 rounding errors dominate.
        assume(np.linalg.norm(pair.reshape(6, 4), axis=1).min() > 1e-3)
        scale = 1000.0 if np.linalg.norm(pair[0].reshape(3, 4), axis=1).min() < 1 else 1.0
    elif loss_fn is jt.losses.euclidean_distance:
        # Unlike PyTorch, the loss squares differences that underflow, those below 1e-19.
        difference = np.linalg.norm((pair[0] - pair[1]).reshape(3, 4), axis=1)
        assume(((difference == 0) | (difference > 1e-15)).all())
        scale = 1.0
    assert_matches_pytorch(loss_fn, REGRESSION[loss_fn], *pair, scale=scale)


@settings(max_examples=20)
@given(
    predictions=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
    targets=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
)
def test_binary_cross_entropy_matches_pytorch(predictions, targets) -> None:
    assert_matches_pytorch(
        jt.losses.binary_cross_entropy, each(F.binary_cross_entropy), predictions, targets
    )


@settings(max_examples=20)
@given(
    predictions=hnp.arrays(np.float32, (3, 2, 2), elements=VALUES),
    targets=hnp.arrays(np.float32, (3, 2, 2), elements=PROBABILITIES),
)
def test_sigmoid_binary_cross_entropy_matches_pytorch(predictions, targets) -> None:
    assert_matches_pytorch(
        jt.losses.sigmoid_binary_cross_entropy,
        each(F.binary_cross_entropy_with_logits),
        predictions,
        targets,
        scale=max(1.0, np.abs(predictions).max() / 10),
    )


@settings(max_examples=20)
@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=VALUES),
    weights=hnp.arrays(np.float32, (4, 5), elements=st.floats(0.0625, 1, width=32)),
)
def test_soft_cross_entropy_matches_pytorch(logits, weights) -> None:
    assert_matches_pytorch(
        jt.losses.soft_cross_entropy,
        lambda p, t: F.cross_entropy(p, t, reduction="none"),
        logits,
        weights / weights.sum(axis=1, keepdims=True),
        scale=max(1.0, np.abs(logits).max()),
    )


@settings(max_examples=20)
@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=VALUES),
    labels=hnp.arrays(np.int32, 4, elements=st.integers(0, 4)),
)
def test_cross_entropy_matches_pytorch(logits: np.ndarray, labels: np.ndarray) -> None:
    values, gradient = value_and_grad(jt.losses.cross_entropy, logits, jnp.asarray(labels))
    theirs = torch.tensor(logits, requires_grad=True)
    targets = torch.tensor(labels).long()
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="none")
    expected.sum().backward()
    # Values near 0 are differences of nearly equal numbers, as precise as the logits.
    atol = 1e-6 * max(1.0, float(np.abs(logits).max()))
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6, atol=atol)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1e-3, 3e-9, 1e-12])
def test_cosine_distance_of_tiny_vectors_matches_pytorch(length: float) -> None:
    short = np.float32(length) * np.array([[1.0, 0.5, 0.2]], np.float32)
    long = np.array([[1.0, -0.3, 1.0]], np.float32)
    values, gradient = value_and_grad(jt.losses.cosine_distance, short, jnp.asarray(long))
    leaf = torch.tensor(short, requires_grad=True)
    expected = 1 - F.cosine_similarity(leaf, torch.tensor(long))
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-5)


def test_bfloat16_cross_entropy_matches_pytorchs_autocast() -> None:
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


@settings(max_examples=20)
@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=st.floats(-20, 20, width=32)),
    labels=hnp.arrays(np.int32, 4, elements=st.integers(0, 4)),
    weight=hnp.arrays(np.float32, 5, elements=st.floats(0.125, 4, width=32)),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
)
def test_options_of_cross_entropy_match_pytorch(
    logits, labels, weight, label_smoothing, weighted
) -> None:
    loss_fn = functools.partial(
        jt.losses.cross_entropy,
        label_smoothing=label_smoothing,
        weight=jnp.asarray(weight) if weighted else None,
    )

    def theirs(predictions, targets):
        return F.cross_entropy(
            predictions,
            targets.long(),
            weight=torch.tensor(weight) if weighted else None,
            label_smoothing=label_smoothing,
            reduction="none",
        )

    assert_matches_pytorch(loss_fn, theirs, logits, labels, rtol=1e-5, scale=10.0)


def test_a_step_with_class_weights_on_the_examples_has_pytorchs_mean(
    small_state, small_classes
) -> None:
    weight = np.array([0.5, 1.0, 3.0], np.float32)
    batch = small_classes[:16]
    weights = jnp.asarray(weight)[batch.targets]
    weighted = jt.Dataset(batch.inputs, batch.targets, weights)
    loss = jt.evaluate(small_state, weighted, jt.losses.cross_entropy)["loss"]
    logits = np.array(jt.predict(small_state, batch.inputs))
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor(weight))(
        torch.tensor(logits), torch.tensor(np.array(batch.targets)).long()
    )
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
