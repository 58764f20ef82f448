"""Losses beside PyTorch's, values and gradients, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt

REGRESSION = {
    jt.losses.mean_absolute_error: torch.nn.functional.l1_loss,
    jt.losses.mean_squared_error: torch.nn.functional.mse_loss,
}
VALUES = st.floats(-1e4, 1e4, width=32)


def value_and_grad(loss_fn, predictions, targets):
    def total(predictions):
        values = loss_fn(predictions, targets)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(predictions))
    return np.asarray(values), np.asarray(gradient)


@pytest.mark.parametrize("loss_fn", REGRESSION)
@given(pair=hnp.arrays(np.float32, (2, 3, 4), elements=VALUES))
def test_regression_losses_are_pytorchs(loss_fn, pair: np.ndarray) -> None:
    predictions, targets = pair
    values, gradient = value_and_grad(loss_fn, predictions, jnp.asarray(targets))
    theirs = torch.tensor(predictions, requires_grad=True)
    expected = REGRESSION[loss_fn](theirs, torch.tensor(targets), reduction="none").mean(dim=1)
    expected.sum().backward()
    # XLA flushes subnormal numbers to zero.
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-6, atol=1e-37)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-6, atol=1e-37)


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
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("loss_fn", REGRESSION)
def test_shapes_that_would_broadcast_are_refused(loss_fn) -> None:
    with pytest.raises(jt.InputError, match=r"\(4, 1\).*\(4,\).*same shape"):
        loss_fn(jnp.zeros((4, 1)), jnp.zeros(4))


def test_cross_entropy_refuses_float_labels_and_wrong_lengths() -> None:
    with pytest.raises(jt.InputError, match=r"float32.*integer"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4))
    with pytest.raises(jt.InputError, match=r"\(4, 1\).*\(4,\)"):
        jt.losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros((4, 1), int))
