"""Values and gradients of losses compared with PyTorch's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def mean_and_grad(loss_fn, predictions, targets, weights=None):
    """The mean of a step on these predictions, and its gradient."""

    def mean(predictions):
        batch = jt.Dataset(predictions, targets, weights)
        return jt.gradients(IDENTITY.replace(params=predictions), batch, loss_fn)[0][0]

    return jax.value_and_grad(mean)(jnp.asarray(predictions))


@functools.cache
def with_options(loss, label_smoothing, weighted):
    """The compiled `mean_and_grad` of a loss, which takes the weights of classes last."""

    @jax.jit
    def run(predictions, targets, weights, weight):
        options = {"label_smoothing": label_smoothing, "weight": weight if weighted else None}
        return mean_and_grad(functools.partial(loss, **options), predictions, targets, weights)

    return run


# Its predictions are its parameters.
IDENTITY = jt.init_state(
    jt.Model(
        lambda key, inputs: (jnp.zeros(()), {}),
        lambda params, state, inputs, *, train, key: (params, state),
    ),
    optax.sgd(0.1),
    np.zeros((1, 1), np.float32),
    key=jax.random.key(0),
)


@settings(max_examples=40)
@given(
    logits=hnp.arrays(np.float32, (6, 5), elements=st.floats(-20, 20, width=32)),
    labels=hnp.arrays(np.int32, 6, elements=st.integers(0, 4)),
    weight=hnp.arrays(
        np.float32, 5, elements=st.one_of(st.just(0.0), st.floats(0.125, 4, width=32))
    ),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    kept=hnp.arrays(np.bool_, 6),
    weighted=st.booleans(),
)
def test_options_of_cross_entropy_match_pytorchs_mean(
    logits, labels, weight, label_smoothing, kept, weighted
) -> None:
    """Labels of weight 0 here are those with `ignore_index` there."""
    assume(kept.any() and (not weighted or weight[labels[kept]].sum() > 0))
    run = with_options(jt.losses.cross_entropy, label_smoothing, weighted)
    masked = np.where(kept, labels, -1)
    mean, gradient = run(logits, masked, kept.astype(np.float32), weight)
    theirs = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(weight) if weighted else None, label_smoothing=label_smoothing
    )
    leaf = torch.tensor(logits, requires_grad=True)
    expected = theirs(leaf, torch.tensor(np.where(kept, labels, -100)).long())
    expected.backward()
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=st.floats(-20, 20, width=32)),
    targets=hnp.arrays(np.float32, (4, 5), elements=st.floats(0.0625, 1, width=32)),
    weight=hnp.arrays(np.float32, 5, elements=st.floats(0, 4, width=32)),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_options_of_soft_cross_entropy_match_pytorchs_mean(
    logits, targets, weight, label_smoothing
) -> None:
    targets = targets / targets.sum(axis=1, keepdims=True)
    run = with_options(jt.losses.soft_cross_entropy, label_smoothing, True)
    mean, gradient = run(logits, targets, None, weight)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(weight), label_smoothing=label_smoothing)
    expected = theirs(leaf, torch.tensor(targets))
    expected.backward()
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 3, 5, dtype=np.float32)])
def test_losses_per_token_have_pytorchs_mean(weight) -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(4, 3, 5)).astype(np.float32)
    labels = random.integers(0, 5, (4, 3))
    loss_fn = functools.partial(jt.losses.cross_entropy, weight=weight)
    mean, gradient = mean_and_grad(loss_fn, logits, labels)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight))
    expected = theirs(leaf.movedim(2, 1), torch.tensor(labels))
    expected.backward()
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


def test_weighted_means_add_up_as_pytorchs_means() -> None:
    """A sum of losses with other weights each, by every operator that a loss may use."""
    random = np.random.default_rng(2)
    logits = random.normal(size=(6, 5)).astype(np.float32)
    labels, others = random.integers(0, 5, (2, 6))
    weight = np.linspace(0.5, 3, 5, dtype=np.float32)
    balanced = functools.partial(jt.losses.cross_entropy, weight=jnp.asarray(weight))

    def loss_fn(predictions, targets):
        first, second = (balanced(predictions, targets[:, i]) for i in (0, 1))
        squares = jt.losses.mean_squared_error(predictions, jnp.zeros((6, 5)))
        each = sum([np.float32(0.5) * first, -second / 4])
        return 2 - squares + 3 * each - first

    targets = np.stack([labels, others], axis=1)
    mean, gradient = mean_and_grad(loss_fn, logits, targets)
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(weight))
    one, two = (theirs(leaf, torch.tensor(each)) for each in (labels, others))
    expected = 2 - (leaf**2).mean() + 3 * (0.5 * one - two / 4) - one
    expected.backward()
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


def test_weighted_sums_of_weighted_means_are_sums_of_pytorchs_means() -> None:
    random = np.random.default_rng(4)
    logits = random.normal(size=(6, 5)).astype(np.float32)
    labels = random.integers(0, 5, 6)
    weight = np.linspace(0.5, 3, 5, dtype=np.float32)
    loss_fn = jt.losses.weighted_sum(
        (1.0, functools.partial(jt.losses.cross_entropy, weight=jnp.asarray(weight))),
        (0.3, jt.losses.cross_entropy),
    )
    mean, _ = mean_and_grad(loss_fn, logits, labels)
    pair = torch.tensor(logits), torch.tensor(labels)
    expected = F.cross_entropy(*pair, weight=torch.tensor(weight)) + 0.3 * F.cross_entropy(*pair)
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-5)
