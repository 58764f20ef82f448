"""Metrics on cases solved by hand, on arrays, in evaluation, and in training."""

from __future__ import annotations

import dataclasses
import functools
import math

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
    roc_auc_score,
    top_k_accuracy_score,
)

import jaxtrain as jt

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 9.0]])
LABELS = jnp.array([0, 1, 2, 2])
# Its predictions are its inputs.
IDENTITY = jt.Model(
    lambda key, inputs: ({"w": jnp.zeros(())}, {}),
    lambda params, state, inputs, *, train, key: (inputs, state),
)
# What takes the logits of classes, with a value by hand for LOGITS and LABELS: the recalls are 1, 1
# and 1/2, the precisions 1, 1/2 and 1, and F1 1, 2/3 and 2/3.
BY_HAND = {
    jt.metrics.balanced_accuracy: 2.5 / 3,
    jt.metrics.recall(None): [1, 1, 0.5],
    jt.metrics.recall("macro"): 2.5 / 3,
    jt.metrics.precision(None): [1, 0.5, 1],
    jt.metrics.precision("weighted"): (1 + 0.5 + 2 * 1) / 4,
    jt.metrics.f1(None): [1, 2 / 3, 2 / 3],
    jt.metrics.f1("macro"): 7 / 9,
    jt.metrics.f1("micro"): 3 / 4,
    jt.metrics.f1("weighted"): (1 + 3 * 2 / 3) / 4,
    jt.metrics.confusion_matrix: [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
}


def evaluated(metric, predictions, targets, weights=None, batch_size=1000):
    """Returns a metric as `evaluate` computes it."""
    predictions = jnp.asarray(predictions)
    state = jt.init_state(IDENTITY, optax.sgd(0.1), predictions[:1], key=jax.random.key(0))

    def no_loss(predictions, targets):
        return jnp.zeros(len(predictions) if weights is None else predictions.shape[: weights.ndim])

    data = jt.Dataset(predictions, jnp.asarray(targets), weights)
    found = jt.evaluate(state, data, no_loss, {"metric": metric}, batch_size=batch_size)
    return np.asarray(found["metric"])


# Classes and labels.


def test_accuracy_is_1_where_the_largest_logit_is_that_of_the_label() -> None:
    np.testing.assert_array_equal(jt.metrics.accuracy(LOGITS, LABELS), [1, 1, 0, 1])


def test_accuracy_of_sequences_is_per_token() -> None:
    values = jt.metrics.accuracy(jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, 0 * LABELS]))
    np.testing.assert_array_equal(values, [[1, 1, 0, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("metric", BY_HAND, ids=lambda each: f"{each.__name__}")
def test_metrics_of_classes_equal_solutions_by_hand(metric) -> None:
    np.testing.assert_allclose(metric(LOGITS, LABELS), BY_HAND[metric], rtol=1e-6)
    ignored = jnp.array([1.0, 1.0, 0.0, 1.0])  # the only wrong prediction
    perfect = np.eye(3) if metric is jt.metrics.confusion_matrix else np.ones_like(BY_HAND[metric])
    np.testing.assert_allclose(metric(LOGITS, LABELS, ignored), perfect, rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "targets", "threshold"),
    [
        ([2.0, 0.5, -1.0, 1.0, -3.0], [1, 0, 1, 1, 0], 0.0),
        ([[0.9], [0.6], [0.2], [0.8], [0.4]], [[True], [False], [True], [True], [False]], 0.5),
        ([[0.0, 2.0], [1.0, 1.5], [3.0, 2.0], [0.0, 1.0], [1.0, 0.0]], [1, 0, 1, 1, 0], 0.0),
    ],
)
def test_binary_scores_are_those_of_class_1(scores, targets, threshold) -> None:
    """Of three predicted positives two are right, of three positives two are found."""
    scores, targets = jnp.array(scores), jnp.array(targets)
    for name, micro in (("precision", 3 / 5), ("recall", 3 / 5), ("f1", 3 / 5)):
        make = functools.partial(getattr(jt.metrics, name), threshold=threshold)
        assert make("binary")(scores, targets) == pytest.approx(2 / 3)
        assert make("micro")(scores, targets) == pytest.approx(micro)
        np.testing.assert_allclose(make(None)(scores, targets), [1 / 2, 2 / 3], rtol=1e-6)


def test_labels_are_averaged_as_scikit_learn_does() -> None:
    """The second label is never positive, and counts as 0 in a mean; it is NaN by itself."""
    scores = jnp.array([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0]])
    targets = jnp.array([[1, 0], [0, 0], [1, 0]])
    assert jt.metrics.f1("macro")(scores, targets) == pytest.approx(0.25)
    assert jt.metrics.f1("weighted")(scores, targets) == pytest.approx(0.5)
    np.testing.assert_array_equal(jt.metrics.f1(None)(scores, targets), [0.5, np.nan])


def test_absent_classes_are_nan_alone_and_left_out_of_a_mean() -> None:
    labels = jnp.array([0, 1, 1, 1])
    found = jt.metrics.recall(None)(LOGITS, labels)
    np.testing.assert_allclose(found, [1, 2 / 3, np.nan], rtol=1e-6)
    assert jt.metrics.balanced_accuracy(LOGITS, labels) == pytest.approx(5 / 6)
    assert jt.metrics.recall("macro")(LOGITS, labels) == pytest.approx(5 / 9)  # it is predicted


def test_top_k_accuracy_matches_scikit_learn() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 4)).astype(np.float32)
    labels = random.integers(0, 4, 50).astype(np.uint8)
    for k in (1, 2, 3):
        found = jt.metrics.top_k_accuracy(k)(jnp.asarray(logits), jnp.asarray(labels))
        assert found.mean() == pytest.approx(top_k_accuracy_score(labels, logits, k=k))
    with pytest.raises(jt.errors.InputError, match="k is 0; expected an integer of at least 1"):
        jt.metrics.top_k_accuracy(0)


def test_confusion_matrix_takes_uint8_labels() -> None:
    labels = jnp.arange(20, dtype=jnp.uint8)
    found = jt.metrics.confusion_matrix(jnp.eye(20), labels)
    np.testing.assert_array_equal(found, np.eye(20))
    assert found.dtype == np.float32


def test_weights_that_are_a_mask_are_counted() -> None:
    """Booleans are converted, since they cannot be added."""
    twice = jnp.concatenate([LOGITS, LOGITS]), jnp.concatenate([LABELS, LABELS])
    found = jt.metrics.confusion_matrix(*twice, jnp.arange(8) != 2)
    np.testing.assert_array_equal(found, [[2, 0, 0], [0, 2, 0], [0, 1, 2]])


@pytest.mark.parametrize("weights", [None, jnp.array([1.0, 0.5]), jnp.ones((2, 4)).at[1].set(0.5)])
def test_tokens_have_their_own_weights_or_those_of_their_sequence(weights) -> None:
    logits, labels = jnp.stack([LOGITS, LOGITS]), jnp.stack([LABELS, 0 * LABELS])
    second = 1 if weights is None else 0.5
    counts = np.array([[1 + second, 2 * second, second], [0, 1, 0], [0, 1, 1]])
    found = jt.metrics.confusion_matrix(logits, labels, weights)
    np.testing.assert_array_equal(found, counts)
    f1 = 2 * np.diag(counts) / (counts.sum(axis=0) + counts.sum(axis=1))
    found = jt.metrics.f1("macro")(logits, labels, weights)
    np.testing.assert_allclose(found, f1.mean(), rtol=1e-6)


# The area under the ROC curve.


def auc(scores: list, labels: list) -> float:
    return float(jt.metrics.roc_auc()(jnp.array(scores), jnp.array(labels)))


def test_roc_auc_equals_solutions_by_hand() -> None:
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1]) == 1
    assert auc([2.0, 1.0, -1.0, -2.0], [0, 0, 1, 1]) == 0
    assert auc([0.0, -0.0], [0, 1]) == 0.5
    assert auc([-np.inf, np.inf, np.inf], [0, 0, 1]) == 0.75
    assert np.isnan(auc([1.0, 2.0], [1, 1]))


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.05, 3.0), (1e-3, 1.0), (1e3, 1e5)])
@pytest.mark.parametrize("batch_size", [77, 4000])
def test_roc_auc_is_exact_wherever_the_scores_lie(scale, offset, batch_size) -> None:
    """Scores that share an offset, as probabilities near 1 do, differ in their last bits only."""
    random = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    scores = (offset + scale * (random.normal(size=4000) + 1.5 * labels)).astype(np.float32)
    found = evaluated(jt.metrics.roc_auc(), scores, labels, batch_size=batch_size)
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_classes_are_ranked_where_their_probability_rounds_to_1() -> None:
    """By log odds, which order probabilities that are equal in float32."""
    margins = np.linspace(20, 40, 60, dtype=np.float32)
    logits, labels = np.stack([margins, 0 * margins], axis=1), (np.arange(60) < 30).astype(int)
    found = jt.metrics.roc_auc(None)(logits, labels)
    np.testing.assert_allclose(found, [roc_auc_score(1 - labels, margins)] * 2)


SMALL_AUC = dataclasses.replace(jt.metrics.roc_auc(), capacity=(512, 1024))


@pytest.mark.parametrize("order", ["random", "by score", "by label"])
def test_more_scores_than_are_kept_change_the_area_little(order: str) -> None:
    """With 512 of 20,000 scores, with weights; the error falls with the number that is kept."""
    random = np.random.default_rng(0)
    labels = (random.uniform(size=20_000) < 0.3).astype(int)
    scores = (100 + random.normal(size=20_000) + labels).astype(np.float32)
    weights = random.uniform(0, 2, 20_000).astype(np.float32)
    at = {"random": slice(None), "by score": np.argsort(scores), "by label": np.argsort(labels)}
    data = [values[at[order]] for values in (scores, labels, weights)]
    found = evaluated(SMALL_AUC, *data, batch_size=300)
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert found == pytest.approx(expected, abs=2e-4)
    with_nan = [np.where(np.arange(20_000) == 7, np.nan, data[0]), *data[1:]]
    assert np.isnan(evaluated(SMALL_AUC, *with_nan, batch_size=300))


def test_runs_that_are_mapped_merge_their_own_scores() -> None:
    """Under `vmap`, as in a sweep."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 2000)
    scores = jnp.asarray(random.normal(size=(3, 2000)) + labels[None], jnp.float32)

    def area(scores):
        total = jax.tree.map(jnp.zeros_like, SMALL_AUC.update(None, scores, labels, jnp.ones(2000)))
        for part in jnp.split(jnp.arange(2000), 10):
            total = SMALL_AUC.update(total, scores[part], jnp.asarray(labels)[part], jnp.ones(200))
        return SMALL_AUC.finish(total)

    expected = [roc_auc_score(labels, each) for each in scores]
    np.testing.assert_allclose(jax.jit(jax.vmap(area))(scores), expected, atol=1e-3)


# R².


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("case", ["almost constant", "far from 0"])
def test_r2_does_not_cancel(case: str, batch_size: int) -> None:
    random = np.random.default_rng(0)
    targets = np.array([-5.1608, -5.1609, *[-5.1608] * 4], np.float32)
    predictions = targets + 1
    if case == "far from 0":
        targets = (-311_030 + 6 * random.normal(size=200)).astype(np.float32)
        predictions = targets + 3 * random.normal(size=200).astype(np.float32)
    expected = r2_score(targets.astype(float), predictions.astype(float))
    assert expected < -7e8 if case == "almost constant" else 0.6 < expected < 0.8
    found = evaluated(jt.metrics.r2, predictions, targets, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-6)


def test_r2_of_constant_targets_is_1_only_for_exact_predictions() -> None:
    targets = jnp.full((3, 1), 0.1)
    assert jt.metrics.r2(targets, targets) == 1
    assert jt.metrics.r2(targets + 1, targets) == 0
    assert evaluated(jt.metrics.r2, targets + 1, targets, batch_size=2) == 0


def test_r2_of_one_example_is_nan() -> None:
    one = jnp.ones((1, 1))
    assert np.isnan(jt.metrics.r2(one, one))
    assert np.isnan(jt.metrics.r2(jnp.ones(3), jnp.arange(3.0), jnp.array([0.0, 2.0, 0.0])))


def test_r2_with_weights_per_output_is_the_mean_of_the_outputs() -> None:
    random = np.random.default_rng(0)
    predictions, targets, weights = random.uniform(size=(3, 9, 2)).astype(np.float32)
    expected = np.mean(
        [r2_score(targets[:, i], predictions[:, i], sample_weight=weights[:, i]) for i in (0, 1)]
    )
    found = evaluated(jt.metrics.r2, predictions, targets, weights, batch_size=4)
    assert found == pytest.approx(expected, rel=1e-5)


# What has weight 0, what is out of range, and shapes.


NAN = float("nan")


def test_a_weight_of_zero_hides_everything_from_every_metric() -> None:
    """R² is that of the first three examples. The second batch of logits has no weight at all."""
    weights = jnp.array([1, 1, 1, 0])
    predictions, targets = jnp.array([1.0, 2, 4, NAN]), jnp.array([1.0, 2, 3, NAN])
    assert jt.metrics.r2(predictions, targets, weights) == 0.5
    assert evaluated(jt.metrics.r2, predictions, targets, weights) == 0.5
    scores, labels = jnp.array([1.0, 2.0, 1.5, NAN]), jnp.array([0, 1, 1, -7])
    for metric in (jt.metrics.roc_auc(), jt.metrics.recall("binary")):
        assert metric(scores, labels, weights) == 1
        assert evaluated(metric, scores, labels, weights, batch_size=3) == 1
    for metric, expected in BY_HAND.items():
        padded = jnp.concatenate([LOGITS, LOGITS.at[:2].set(NAN)])
        labels = jnp.concatenate([LABELS, jnp.array([0, -1, -1, 100])])
        found = evaluated(metric, padded, labels, jnp.arange(8) < 4, batch_size=4)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 1000])
@pytest.mark.parametrize(
    "metric",
    [*BY_HAND, jt.metrics.roc_auc(), jt.metrics.accuracy, jt.metrics.top_k_accuracy(2)],
)
def test_a_label_that_is_no_class_is_refused_and_gives_nan_under_jit(metric, label) -> None:
    """JAX's indexing would clamp it, wrap around, or leave it out."""
    labels = LABELS.at[1].set(label)
    with pytest.raises(jt.errors.InputError, match=f"received the label {label}; expected labels"):
        metric(LOGITS, labels)
    found = np.asarray(jax.jit(metric)(LOGITS, labels))
    assert np.isnan(found[1] if isinstance(metric, type(jt.metrics.accuracy)) else found).any()
    with pytest.raises(jt.errors.InputError, match=f"the label {label}; expected labels from 0 to"):
        evaluated(metric, LOGITS, labels)


def test_a_binary_target_other_than_0_and_1_is_refused_and_gives_nan_under_jit() -> None:
    scores, targets = jnp.array([1.0, -1.0, 0.5]), jnp.array([1, 0, 2])
    for metric in (jt.metrics.roc_auc(), jt.metrics.f1("binary"), jt.metrics.confusion_matrix):
        for wrong in (targets, targets / 2):
            with pytest.raises(jt.errors.InputError, match=r"label (2|0\.5); expected .* 0 to 1"):
                metric(scores, wrong)
            assert np.isnan(jax.jit(metric)(scores, wrong)).all()
        assert np.isfinite(metric(scores, targets, jnp.array([1.0, 1.0, 0.0]))).all()
        with pytest.raises(jt.errors.InputError, match="the label 2; expected labels from 0 to 1"):
            evaluated(metric, scores, targets)


def test_a_nan_prediction_gives_nan_or_is_wrong() -> None:
    """It ranks neither highest, nor among the top."""
    assert np.isnan(auc([1.0, NAN, 2.0], [0, 1, 1]))
    assert np.isnan(jt.metrics.r2(jnp.array([1.0, NAN]), jnp.array([1.0, 2.0])))
    logits = LOGITS.at[1, 1].set(NAN)
    assert np.isnan(jt.metrics.f1("macro")(logits, LABELS))
    np.testing.assert_array_equal(jt.metrics.top_k_accuracy(2)(logits, LABELS), [1, 0, 1, 1])


def test_metrics_of_no_weight_are_nan() -> None:
    nothing = jnp.zeros(4)
    for metric in (*BY_HAND, jt.metrics.roc_auc()):
        found = metric(LOGITS, LABELS, nothing)
        expected = np.zeros((3, 3)) if metric is jt.metrics.confusion_matrix else np.nan
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))
    assert np.isnan(jt.metrics.r2(jnp.ones(4), jnp.arange(4.0), nothing))
    with pytest.raises(jt.errors.InputError, match=r"dataset\.weights is 0 everywhere; expected"):
        evaluated(jt.metrics.r2, jnp.ones(4), jnp.arange(4.0), nothing)


@pytest.mark.parametrize(
    ("metric", "predictions", "targets", "message"),
    [
        (jt.metrics.accuracy, (4,), (4,), r"accuracy received .*logits of two or more classes"),
        (jt.metrics.accuracy, (4, 1), (4, 1), "accuracy received .*logits of two or more classes"),
        (jt.metrics.accuracy, (4, 1), (4,), r"accuracy received .*logits of two or more classes"),
        (
            jt.metrics.accuracy,
            (4, 3),
            (4, 1),
            r"targets of accuracy .*: give targets\[:, 0\]",
        ),
        (jt.metrics.accuracy, (4, 2, 3), (4,), r"targets of accuracy .*\(4,\); .*logits, \(4, 2\)"),
        (jt.metrics.top_k_accuracy(2), (4, 2, 3), (4,), "targets of top_2_accuracy have the shape"),
        (jt.metrics.confusion_matrix, (4, 3), (4, 3), "confusion_matrix received predictions"),
        (jt.metrics.balanced_accuracy, (4, 3), (4, 3), "balanced_accuracy with the average 'macro"),
        (jt.metrics.f1("binary"), (4, 3), (4,), "f1 with the average 'binary' .*one score per exa"),
        (jt.metrics.f1("macro"), (9, 7, 3), (9,), r"f1 received .*\(9, 7, 3\) and .*\(9,\)"),
        (jt.metrics.roc_auc(), (4,), (4, 1), r"roc_auc received .*\(4,\) and .*targets\[:, 0\]"),
        (jt.metrics.r2, (4, 1), (4,), r"r2 received .*\(4, 1\) .*same shape: give .*, None\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_name_of_the_metric(
    metric, predictions, targets, message
) -> None:
    arrays = jnp.zeros(predictions), jnp.zeros(targets, int)
    with pytest.raises(jt.errors.InputError, match=message):
        metric(*arrays)
    with pytest.raises(jt.errors.InputError, match=message):
        evaluated(metric, *arrays)


def test_weights_and_labels_of_another_kind_are_refused() -> None:
    with pytest.raises(jt.errors.InputError, match=r"the weights of r2 have the shape \(4, 2\)"):
        jt.metrics.r2(jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.ones((4, 2)))
    with pytest.raises(jt.errors.InputError, match=r"weights has the shape \(3,\) for 4 examples"):
        jt.metrics.r2(jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.ones(3))
    with pytest.raises(jt.errors.InputError, match="targets of accuracy have the dtype float32"):
        jt.metrics.accuracy(LOGITS, LABELS.astype(float))
    with pytest.raises(jt.errors.InputError, match=r"average of f1 is 'mean'; expected None, 'bin"):
        jt.metrics.f1("mean")
    with pytest.raises(jt.errors.InputError, match=r"average of roc_auc is 'binary'; expected"):
        jt.metrics.roc_auc("binary")


# In evaluation and training.


@dataclasses.dataclass(frozen=True)
class Constant(jt.metrics.AccumulatedMetric):
    """A metric, and a loss, of a value that is known only while its program is traced."""

    value: Any

    def update(self, total, predictions, targets, weights):
        return jnp.sum(weights)

    def finish(self, total):
        return jnp.float32([repr(x) for x in VALUES].index(repr(self.value)))

    def per_example(self, predictions, targets):
        return jnp.full(len(predictions), self.finish(None))


class AlwaysEqual:
    """A function that claims to equal all others of its class."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1

    def __call__(self, predictions, targets):
        return jnp.full(len(predictions), float(self.number))


VALUES = [0, False, 0.0, -0.0, math.nan, (0,), (0.0,)]


def test_values_that_only_compare_equal_have_programs_of_their_own(small_state) -> None:
    """0, False, 0.0 and -0.0 are equal, and so may be any two objects by their own account."""
    found = [float(Constant(value)(jnp.ones(2), jnp.ones(2))) for value in VALUES]
    assert found == list(range(len(VALUES)))
    batch = (jnp.ones((2, 6)), jnp.zeros(2, jnp.int32))
    for make in (lambda at: Constant(VALUES[at]).per_example, AlwaysEqual):
        for at in (0, 1):
            assert jt.eval_step(small_state, batch, make(at))["loss"] == at
            assert jt.train_step(small_state, batch, make(at))[1]["loss"] == at


def test_equal_metrics_share_their_program(small_state, small_classes) -> None:
    traced = []

    def loss_fn(predictions, targets):
        traced.append(1)
        return jt.losses.cross_entropy(predictions, targets)

    for _ in range(2):
        metrics = {"f1": jt.metrics.f1("macro"), "top_2": jt.metrics.top_k_accuracy(2)}
        found = jt.evaluate(small_state, small_classes, loss_fn, metrics, batch_size=50)
        traced.append(2)
    assert traced.index(2) == traced.count(1)
    logits = np.asarray(jt.predict(small_state, small_classes.inputs))
    labels = np.asarray(small_classes.targets)
    expected = f1_score(labels, logits.argmax(axis=1), average="macro")
    assert found["f1"] == pytest.approx(expected, rel=1e-5)
    assert found["top_2"] == pytest.approx(top_k_accuracy_score(labels, logits, k=2))


ALL = {
    "confusion": jt.metrics.confusion_matrix,
    "recall": jt.metrics.recall(None),
    "balanced": jt.metrics.balanced_accuracy,
    "auc": jt.metrics.roc_auc(),
    "accuracy": jt.metrics.accuracy,
}


@pytest.mark.parametrize("batch_size", [16, 50])
def test_metrics_of_batches_are_those_of_the_data_set(
    batch_size: int, small_state, small_classes
) -> None:
    """Weights that are multiples of 1/4 have the same sum in any order."""
    data = small_classes.replace(weights=(jnp.arange(50) % 5) / 4)
    logits = np.asarray(jt.predict(small_state, data.inputs), float)
    labels, weights = np.asarray(data.targets), np.asarray(data.weights)
    table = confusion_matrix(labels, logits.argmax(axis=1), sample_weight=weights)
    recalls = np.diag(table) / table.sum(axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    areas = [
        roc_auc_score(labels == each, probabilities[:, each], sample_weight=weights)
        for each in range(3)
    ]
    for dataset in (data, [data[:20], data[20:30], data[30:]]):  # the list is a stream
        found = jt.evaluate(
            small_state, dataset, jt.losses.cross_entropy, ALL, batch_size=batch_size
        )
        np.testing.assert_array_equal(found["confusion"], table)
        np.testing.assert_allclose(found["recall"], recalls, rtol=1e-6)
        assert found["balanced"] == pytest.approx(recalls.mean(), rel=1e-6)
        assert found["accuracy"] == pytest.approx(np.trace(table) / table.sum(), rel=1e-6)
        assert found["auc"] == pytest.approx(np.mean(areas), rel=1e-6)


def test_metrics_are_mapped_over_models(small_classes) -> None:
    """As `jax.vmap` over runs does; each has its own table."""
    logits = jax.random.normal(jax.random.key(0), (3, 50, 4))
    table = jt.metrics.confusion_matrix
    found = jax.vmap(lambda each: table(each, small_classes.targets))(logits)
    for ours, each in zip(found, np.asarray(logits), strict=True):
        expected = confusion_matrix(small_classes.targets, each.argmax(axis=1), labels=range(4))
        np.testing.assert_array_equal(ours, expected)


def test_training_reports_metrics_and_skipped_steps_leave_them_as_they_are(small_classes) -> None:
    """The predictions of the second of four batches overflow. Runs under vmap do the same."""
    data = small_classes.replace(inputs=small_classes.inputs.at[20].set(3e38))[:48]
    metrics = {"auc": dataclasses.replace(ALL["auc"], capacity=(32, 96)), "f1": jt.metrics.f1(None)}
    model = jt.models.FeedForward((3,), mean=0.0, std=1.0)
    optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.sgd(0.0))

    def steep(predictions, targets):
        return jt.losses.cross_entropy(1e3 * predictions, targets)

    def run(seed):
        state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(seed))
        return jt.train(state, data, loss_fn=steep, metric_fns=metrics, epochs=1, batch_size=12)

    state, history = run(0)
    kept = np.r_[0:12, 24:48]
    logits, labels = jt.predict(state, data.inputs[kept]), data.targets[kept]
    np.testing.assert_allclose(history["train_f1"][0], metrics["f1"](logits, labels), rtol=1e-6)
    np.testing.assert_allclose(history["train_auc"][0], ALL["auc"](logits, labels), atol=0.05)
    mapped = jax.jit(jax.vmap(run))(jnp.arange(2))[1]
    for name in ("train_f1", "train_auc"):
        np.testing.assert_allclose(mapped[name][0], history[name], rtol=1e-6)


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
    found = jt.evaluate(state, data, loss_fn, ALL | {"accuracy": loss_fn}, batch_size=4)
    chosen, kept = np.argmax(jt.predict(state, tokens), axis=-1), np.asarray(labels) >= 0
    expected = confusion_matrix(np.asarray(labels)[kept], chosen[kept])
    assert expected.shape == (3, 3)
    np.testing.assert_array_equal(found["confusion"], expected)
    expected = balanced_accuracy_score(np.asarray(labels)[kept], chosen[kept])
    assert found["balanced"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (np.float32(12), "12"), (0.25, "0.25")])
def test_the_picture_shows_counts_without_a_decimal_point(count: float, text: str) -> None:
    """The color is that of the fraction, 1 in the first row, also where the weights are small."""
    plots = pytest.importorskip("jaxtrain.cli.plots", exc_type=ImportError)
    figure = plots.confusion_matrix(np.array([[count, 0], [0, 0]]), "title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.texts] == [text]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0, 0]])
