"""Metrics on cases solved by hand, and compared with scikit-learn's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

import jaxtrain as jt

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 9.0]])
LABELS = jnp.array([0, 1, 2, 2])


def test_accuracy_is_1_where_the_largest_logit_is_that_of_the_label() -> None:
    np.testing.assert_array_equal(jt.metrics.accuracy(LOGITS, LABELS), [1, 1, 0, 1])


def test_confusion_matrix_takes_uint8_labels() -> None:
    labels = jnp.arange(20, dtype=jnp.uint8)
    np.testing.assert_array_equal(jt.metrics.confusion_matrix(jnp.eye(20), labels), np.eye(20))


def test_confusion_matrix_counts_labels_in_rows() -> None:
    expected = [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(jt.metrics.confusion_matrix(LOGITS, LABELS), expected)


def test_accuracy_of_sequences_is_per_token() -> None:
    values = jt.metrics.accuracy(jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, 0 * LABELS]))
    np.testing.assert_array_equal(values, [[1, 1, 0, 1], [1, 0, 0, 0]])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=25)
@given(seed=st.integers(0, 1000), examples=st.integers(1, 30), classes=st.integers(2, 6))
def test_balanced_accuracy_matches_scikit_learn(seed: int, examples: int, classes: int) -> None:
    """On two batches, with weights, and with classes that have no examples."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(examples, classes)).astype(np.float32)
    labels = random.integers(0, classes, examples).astype(np.uint8)
    weights = random.uniform(0.1, 2, examples).astype(np.float32)
    sums, finish = jt.metrics.balanced_accuracy
    parts = [
        sums(jnp.asarray(logits[part]), jnp.asarray(labels[part]), jnp.asarray(weights[part]))
        for part in (slice(0, 7), slice(7, None))
    ]
    value = finish(jax.tree.map(jnp.add, *parts))
    expected = balanced_accuracy_score(labels, logits.argmax(axis=1), sample_weight=weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_balanced_accuracy_equals_a_solution_by_hand() -> None:
    """The recalls are 1, 1 and 1/2; without weights, every example has weight 1."""
    sums, finish = jt.metrics.balanced_accuracy
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, None)), 2.5 / 3, rtol=1e-6)
    ignored = jnp.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, ignored)), 1.0)
    tokens = sums(LOGITS[None], LABELS[None], ignored[None])
    np.testing.assert_allclose(finish(tokens), 1.0)
