"""Metrics on cases solved by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jaxtrain as jt

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 9.0]])
LABELS = jnp.array([0, 1, 2, 2])


def test_accuracy_is_one_where_the_largest_logit_is_the_labels() -> None:
    np.testing.assert_array_equal(jt.metrics.accuracy(LOGITS, LABELS), [1, 1, 0, 1])


def test_confusion_matrix_of_narrow_labels() -> None:
    labels = jnp.arange(20, dtype=jnp.uint8)
    np.testing.assert_array_equal(jt.metrics.confusion_matrix(jnp.eye(20), labels), np.eye(20))


def test_confusion_matrix_counts_labels_in_rows() -> None:
    expected = [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(jt.metrics.confusion_matrix(LOGITS, LABELS), expected)
