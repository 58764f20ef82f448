"""Metrics on cases solved by hand, and compared with scikit-learn's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    r2_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

import jaxtrain as jt

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 9.0]])
LABELS = jnp.array([0, 1, 2, 2])


def test_accuracy_is_1_where_the_largest_logit_is_that_of_the_label() -> None:
    np.testing.assert_array_equal(jt.metrics.accuracy(LOGITS, LABELS), [1, 1, 0, 1])


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_per_example_is_refused(shape: tuple[int, ...]) -> None:
    message = r"received predictions of shape .*; expected logits of two or more classes"
    with pytest.raises(jt.errors.InputError, match=f"accuracy {message}"):
        jt.metrics.accuracy(jnp.zeros(shape), jnp.zeros(4, int))
    with pytest.raises(jt.errors.InputError, match=f"confusion_matrix {message}"):
        on_arrays(jt.metrics.confusion_matrix, jnp.zeros(shape), jnp.zeros(4, int))


def test_accuracy_of_sequences_is_per_token() -> None:
    values = jt.metrics.accuracy(jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, 0 * LABELS]))
    np.testing.assert_array_equal(values, [[1, 1, 0, 1], [1, 0, 0, 0]])


def test_balanced_accuracy_equals_a_solution_by_hand() -> None:
    """The recalls are 1, 1 and 1/2; without weights, every example has weight 1."""
    sums, finish = jt.metrics.balanced_accuracy
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, None)), 2.5 / 3, rtol=1e-6)
    ignored = jnp.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, ignored)), 1.0)
    tokens = sums(LOGITS[None], LABELS[None], ignored[None])
    np.testing.assert_allclose(finish(tokens), 1.0)


def accumulated(metric, predictions, targets, weights) -> np.ndarray:
    """Returns a metric of two batches, with weights."""
    sums, finish = metric
    parts = [
        sums(*(jnp.asarray(array[part]) for array in (predictions, targets, weights)))
        for part in (slice(0, 7), slice(7, None))
    ]
    return np.asarray(finish(jax.tree.map(jnp.add, *parts)))


def test_macro_f1_equals_a_solution_by_hand() -> None:
    """F1 is 1, 2/3 (precision 1/2, recall 1) and 2/3 (precision 1, recall 1/2)."""
    sums, finish = jt.metrics.macro_f1
    np.testing.assert_allclose(finish(sums(LOGITS, LABELS, None)), (1 + 4 / 3) / 3, rtol=1e-6)


def random_classes(seed: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns logits, labels and weights of 12 examples; a class may have none."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(12, classes)).astype(np.float32)
    labels = random.integers(0, classes, 12).astype(np.uint8)
    return logits, labels, random.uniform(0.1, 2, 12).astype(np.float32)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_classes_match_scikit_learn(seed: int, classes: int) -> None:
    """On two batches, with weights."""
    logits, labels, weights = data = random_classes(seed, classes)
    predicted, metrics = logits.argmax(axis=1), jt.metrics
    weighted = {"sample_weight": weights}
    known = {"labels": range(classes), **weighted}
    expected = balanced_accuracy_score(labels, predicted, **weighted)
    assert accumulated(metrics.balanced_accuracy, *data) == pytest.approx(expected, rel=1e-5)
    expected = f1_score(labels, predicted, average="macro", **weighted)
    assert accumulated(metrics.macro_f1, *data) == pytest.approx(expected, rel=1e-5)
    expected = confusion_matrix(labels, predicted, **known)
    np.testing.assert_allclose(accumulated(metrics.confusion_matrix, *data), expected, rtol=1e-5)
    expected = recall_score(labels, predicted, average=None, zero_division=np.nan, **known)
    np.testing.assert_allclose(accumulated(metrics.per_class_accuracy, *data), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_roc_auc_matches_scikit_learn(scale: float) -> None:
    for seed in range(3):
        random = np.random.default_rng(seed)
        labels = np.arange(500) % 2
        scores = (scale * (random.normal(size=500) + labels)).astype(np.float32)
        weights = random.uniform(0.1, 2, 500).astype(np.float32)
        found = accumulated(jt.metrics.roc_auc, scores[:, None], labels, weights)
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert found == pytest.approx(expected, abs=1e-3)


def test_roc_auc_equals_solutions_by_hand() -> None:
    sums, finish = jt.metrics.roc_auc

    def auc(scores: list, labels: list) -> float:
        return float(finish(sums(jnp.array(scores), jnp.array(labels), None)))

    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1]) == 1
    assert auc([2.0, 1.0, -1.0, -2.0], [0, 0, 1, 1]) == 0
    assert auc([0.0, -0.0], [0, 1]) == 0.5
    assert np.isnan(auc([1.0, 2.0], [1, 1]))


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_r2_matches_scikit_learn(offset: float) -> None:
    for seed in range(3):
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


def test_top_k_accuracy_matches_scikit_learn() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 4)).astype(np.float32)
    labels = random.integers(0, 4, 50).astype(np.uint8)
    for k in (1, 2, 3):
        found = jt.metrics.top_k_accuracy(k)(jnp.asarray(logits), jnp.asarray(labels))
        assert found.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=k))
    with pytest.raises(jt.errors.InputError, match="k is 0; expected an integer of at least 1"):
        jt.metrics.top_k_accuracy(0)


def test_accumulated_metrics_are_computed_in_evaluation(small_state, small_classes) -> None:
    metrics = {"f1": jt.metrics.macro_f1, "top_2": jt.metrics.top_k_accuracy(2)}
    found = jt.evaluate(small_state, small_classes, jt.losses.cross_entropy, metrics, batch_size=16)
    logits = np.asarray(jt.predict(small_state, small_classes.inputs))
    labels = np.asarray(small_classes.targets)
    expected = f1_score(labels, logits.argmax(axis=1), average="macro")
    assert found["f1"] == pytest.approx(expected, rel=1e-5)
    assert found["top_2"] == pytest.approx(top_k_accuracy_score(labels, logits, k=2))


def on_arrays(metric, predictions, targets, weights=None) -> np.ndarray:
    sums, finish = metric
    return np.asarray(finish(sums(predictions, targets, weights)))


def test_confusion_matrix_counts_labels_in_rows() -> None:
    found = on_arrays(jt.metrics.confusion_matrix, LOGITS, LABELS)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 0], [0, 1, 1]])
    assert found.dtype == np.float32


def test_confusion_matrix_takes_uint8_labels() -> None:
    labels = jnp.arange(20, dtype=jnp.uint8)
    found = on_arrays(jt.metrics.confusion_matrix, jnp.eye(20), labels)
    np.testing.assert_array_equal(found, np.eye(20))


def test_weights_that_are_a_mask_are_counted() -> None:
    """Booleans are converted, since they cannot be added."""
    twice = jnp.concatenate([LOGITS, LOGITS]), jnp.concatenate([LABELS, LABELS])
    mask = jnp.arange(8) != 2
    found = on_arrays(jt.metrics.confusion_matrix, *twice, mask)
    np.testing.assert_array_equal(found, [[2, 0, 0], [0, 2, 0], [0, 1, 2]])
    recall = on_arrays(jt.metrics.per_class_accuracy, *twice, mask)
    np.testing.assert_allclose(recall, [1, 1, 2 / 3], rtol=1e-6)


def test_confusion_matrix_leaves_out_labels_outside_the_classes() -> None:
    """The index of the label −1, and of 3, would be in the table if it wrapped around."""
    found = on_arrays(jt.metrics.confusion_matrix, LOGITS, jnp.array([0, -1, 3, 2]))
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 0, 0], [0, 0, 1]])


def test_per_class_accuracy_equals_a_solution_by_hand() -> None:
    """One of two examples of class 2 is right; class 1 has no examples left."""
    found = on_arrays(jt.metrics.per_class_accuracy, LOGITS, LABELS)
    np.testing.assert_array_equal(found, [1, 1, 0.5])
    weights = jnp.array([1.0, 0.0, 1.0, 3.0])
    found = on_arrays(jt.metrics.per_class_accuracy, LOGITS, LABELS, weights)
    np.testing.assert_array_equal(found, [1, np.nan, 0.75])


@pytest.mark.parametrize("weights", [None, jnp.array([1.0, 0.5]), jnp.ones((2, 4)).at[1].set(0.5)])
def test_tokens_have_their_own_weights_or_those_of_their_sequence(weights) -> None:
    logits, labels = jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, 0 * LABELS])
    second = 1 if weights is None else 0.5
    counts = np.array([[1 + second, 2 * second, second], [0, 1, 0], [0, 1, 1]])
    found = on_arrays(jt.metrics.confusion_matrix, logits, labels, weights)
    np.testing.assert_array_equal(found, counts)
    recalls = (np.diag(counts) / counts.sum(axis=1)).astype(np.float32)
    found = on_arrays(jt.metrics.per_class_accuracy, logits, labels, weights)
    np.testing.assert_allclose(found, recalls, rtol=1e-6)
    found = on_arrays(jt.metrics.balanced_accuracy, logits, labels, weights)
    np.testing.assert_allclose(found, recalls.mean(), rtol=1e-6)
    f1 = 2 * np.diag(counts) / (counts.sum(axis=0) + counts.sum(axis=1))
    found = on_arrays(jt.metrics.macro_f1, logits, labels, weights)
    np.testing.assert_allclose(found, f1.mean(), rtol=1e-6)


TABLES = {"confusion": jt.metrics.confusion_matrix, "recall": jt.metrics.per_class_accuracy}


@pytest.mark.parametrize("batch_size", [16, 50])
def test_tables_of_batches_are_those_of_the_data_set(
    batch_size: int, small_state, small_classes
) -> None:
    """Weights that are multiples of 1/4 have the same sum in any order."""
    data = small_classes.replace(weights=(jnp.arange(50) % 5) / 4)
    for dataset in (data, [data[:20], data[20:30], data[30:]]):  # the list is a stream
        found = jt.evaluate(
            small_state, dataset, jt.losses.cross_entropy, TABLES, batch_size=batch_size
        )
        logits = np.asarray(jt.predict(small_state, data.inputs))
        expected = confusion_matrix(data.targets, logits.argmax(axis=1), sample_weight=data.weights)
        np.testing.assert_array_equal(found["confusion"], expected)
        recalls = np.diag(expected) / expected.sum(axis=1)
        np.testing.assert_allclose(found["recall"], recalls, rtol=1e-6)


def loss_per_sequence(logits, labels):
    return jt.losses.cross_entropy(logits, labels).mean(axis=-1)


@pytest.mark.parametrize("per_token", [False, True])
def test_tables_of_tokens_are_those_of_all_tokens(per_token: bool) -> None:
    """Without weights, `evaluate` passes those of the sequences, [batch]."""

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
            return nn.Dense(3)(nn.Embed(20, 8)(tokens))

    tokens = jax.random.randint(jax.random.key(0), (10, 4), 0, 20)
    mask = jnp.arange(4)[None] < 3 + jnp.arange(10)[:, None] % 2
    labels = jnp.where(mask, tokens % 3, -1) if per_token else tokens % 3
    data = jt.Dataset(tokens, labels, weights=mask if per_token else None)
    loss_fn = jt.losses.cross_entropy if per_token else loss_per_sequence
    state = jt.init_state(Tagger(), optax.sgd(0.1), tokens, key=jax.random.key(0))
    found = jt.evaluate(state, data, loss_fn, TABLES, batch_size=4)
    chosen, kept = np.argmax(jt.predict(state, tokens), axis=-1), np.asarray(labels) >= 0
    expected = confusion_matrix(np.asarray(labels)[kept], chosen[kept])
    assert expected.shape == (3, 3)
    np.testing.assert_array_equal(found["confusion"], expected)
    np.testing.assert_allclose(found["recall"], np.diag(expected) / expected.sum(axis=1), rtol=1e-6)


def test_tables_are_mapped_over_models(small_classes) -> None:
    """As `jax.vmap` over runs does; each has its own table."""
    logits = jax.random.normal(jax.random.key(0), (3, 50, 4))
    sums, finish = jt.metrics.confusion_matrix
    found = jax.vmap(lambda each: finish(sums(each, small_classes.targets)))(logits)
    for table, each in zip(found, np.asarray(logits), strict=True):
        expected = confusion_matrix(small_classes.targets, each.argmax(axis=1), labels=range(4))
        np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (np.float32(12), "12"), (0.25, "0.25")])
def test_the_picture_shows_counts_without_a_decimal_point(count: float, text: str) -> None:
    """The color is that of the fraction, 1 in the first row, also where the weights are small."""
    plots = pytest.importorskip("jaxtrain.cli.plots", exc_type=ImportError)
    figure = plots.confusion_matrix(np.array([[count, 0], [0, 0]]), "title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.texts] == [text]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0, 0]])
