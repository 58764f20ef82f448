"""Metrics on cases solved by hand, and compared with scikit-learn's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    balanced_accuracy_score,
    f1_score,
    r2_score,
    roc_auc_score,
    top_k_accuracy_score,
)

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


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_accuracy_of_one_logit_per_example_is_refused(shape: tuple[int, ...]) -> None:
    message = r"accuracy received predictions of shape .*; expected logits of two or more classes"
    with pytest.raises(jt.InputError, match=message):
        jt.metrics.accuracy(jnp.zeros(shape), jnp.zeros(4, int))


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


def accumulated(metric, predictions, targets, weights) -> float:
    """Returns a metric of two batches, with weights."""
    sums, finish = metric
    parts = [
        sums(*(jnp.asarray(array[part]) for array in (predictions, targets, weights)))
        for part in (slice(0, 7), slice(7, None))
    ]
    return float(finish(jax.tree.map(jnp.add, *parts)))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@settings(max_examples=25)
@given(seed=st.integers(0, 1000), examples=st.integers(8, 40), classes=st.integers(2, 6))
def test_macro_f1_matches_scikit_learn(seed: int, examples: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(examples, classes)).astype(np.float32)
    labels = random.integers(0, classes, examples).astype(np.uint8)
    weights = random.uniform(0.1, 2, examples).astype(np.float32)
    found = accumulated(jt.metrics.macro_f1, logits, labels, weights)
    expected = f1_score(labels, logits.argmax(axis=1), average="macro", sample_weight=weights)
    assert found == pytest.approx(expected, rel=1e-5)


def test_macro_f1_equals_a_solution_by_hand() -> None:
    """F1 is 1, 2/3 (precision 1/2, recall 1) and 2/3 (precision 1, recall 1/2)."""
    sums, finish = jt.metrics.macro_f1
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, None)), (1 + 4 / 3) / 3, rtol=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_roc_auc_matches_scikit_learn(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    labels = np.arange(500) % 2
    scores = (scale * (random.normal(size=500) + labels)).astype(np.float32)
    weights = random.uniform(0.1, 2, 500).astype(np.float32)
    found = accumulated(jt.metrics.roc_auc, scores[:, None], labels, weights)
    assert found == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights), abs=1e-3)


def test_roc_auc_equals_solutions_by_hand() -> None:
    sums, finish = jt.metrics.roc_auc

    def auc(scores: list, labels: list) -> float:
        return float(finish(sums(jnp.array(scores), jnp.array(labels), None)))

    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1]) == 1
    assert auc([2.0, 1.0, -1.0, -2.0], [0, 0, 1, 1]) == 0
    assert auc([0.0, -0.0], [0, 1]) == 0.5
    assert np.isnan(auc([1.0, 2.0], [1, 1]))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 3.0, 30.0]))
def test_r2_matches_scikit_learn(seed: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    targets = (random.normal(size=(40, 2)) + offset).astype(np.float32)
    predictions = (targets + random.normal(size=(40, 2))).astype(np.float32)
    weights = random.uniform(0.1, 2, 40).astype(np.float32)
    found = accumulated(jt.metrics.r2, predictions, targets, weights)
    expected = r2_score(targets, predictions, sample_weight=weights)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_r2_of_constant_targets_is_1_only_for_exact_predictions() -> None:
    sums, finish = jt.metrics.r2
    targets = jnp.ones((3, 1))
    assert finish(sums(targets, targets, None)) == 1
    assert finish(sums(targets + 1, targets, None)) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_accuracy_matches_scikit_learn(k: int) -> None:
    random = np.random.default_rng(k)
    logits = random.normal(size=(50, 4)).astype(np.float32)
    labels = random.integers(0, 4, 50).astype(np.uint8)
    found = jt.metrics.top_k_accuracy(k)(jnp.asarray(logits), jnp.asarray(labels))
    assert found.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=k))


def test_accumulated_metrics_are_computed_in_evaluation(small_state, small_classes) -> None:
    metrics = {"f1": jt.metrics.macro_f1, "top_2": jt.metrics.top_k_accuracy(2)}
    found = jt.evaluate(small_state, small_classes, jt.losses.cross_entropy, metrics, batch_size=16)
    logits = np.asarray(jt.predict(small_state, small_classes.inputs))
    labels = np.asarray(small_classes.targets)
    expected = f1_score(labels, logits.argmax(axis=1), average="macro")
    assert found["f1"] == pytest.approx(expected, rel=1e-5)
    assert found["top_2"] == pytest.approx(top_k_accuracy_score(labels, logits, k=2))


def test_top_k_refuses_a_k_below_1() -> None:
    with pytest.raises(jt.InputError, match="k is 0; expected an integer of at least 1"):
        jt.metrics.top_k_accuracy(0)
