"""Metrics of a data set, computed from all batches: means over examples, counts, ranks, R².

Each agrees with scikit-learn's function of the same name, where there is one. To compute a metric
of arrays, without a model, call it: `jt.metrics.r2(predictions, targets, weights=None)`.

Weights have the shape [batch], or that of the targets. Values of weight 0 are ignored, also if they
are NaN. A metric is NaN if a prediction is NaN (`accuracy` counts it like any other), if a label is
not one of the classes, or if all weights are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, PyTree

from jaxtrain.metrics._classes import ClassScore, ConfusionMatrix, TopK, accuracy, top_k_accuracy
from jaxtrain.metrics._metric import AccumulatedMetric, Mean
from jaxtrain.metrics._r2 import R2
from jaxtrain.metrics._roc_auc import RocAuc

__all__ = [
    "AccumulatedMetric",
    "Metric",
    "PerExampleMetric",
    "accuracy",
    "balanced_accuracy",
    "confusion_matrix",
    "f1",
    "precision",
    "r2",
    "recall",
    "roc_auc",
    "top_k_accuracy",
]

PerExampleMetric: TypeAlias = Callable[..., Array]
"""A function `metric(predictions, targets) -> [batch]`, whose weighted mean is reported.

It may have further axes and parameters, as a `jt.losses.Loss`.
"""

Metric: TypeAlias = (
    PerExampleMetric
    | tuple[Callable[[Any, Any, Any], PyTree], Callable[[Any], Array]]
    | AccumulatedMetric
)
"""What `evaluate` takes as a metric.

A `PerExampleMetric`; a pair (sums, finish) of functions, `sums(predictions, targets, weights)` of a
batch and `finish(sums)` of their sums over all batches; or an `AccumulatedMetric`.
"""


def f1(average: str | None, *, threshold: float = 0.0) -> AccumulatedMetric:
    """Returns the metric F1, the harmonic mean of precision and recall.

    `sklearn.metrics.f1_score`. The metric takes predictions of three kinds:

    - logits of two or more classes [batch, classes] or [batch, time, classes], with integer labels
      [batch] or [batch, time];
    - one score per example [batch] or [batch, 1], with targets 0 or 1;
    - scores of several labels per example [batch, labels], with targets 0 or 1 of that shape.

    Args:
      average: "macro", the mean over the labels, or over the classes that occur in the targets or
        the predictions; "weighted", the same weighted by how many examples have the class or label;
        "micro", from the counts of all classes or labels together; "binary", the value of class 1
        of two; None, an array with one value per class or label, NaN where it is 0 / 0. Averages
        count 0 / 0 as 0.
      threshold: a score above it is a positive prediction: 0 for logits, 0.5 for probabilities.

    Raises:
      InputError: `average` is none of these. When the metric is computed: the shapes do not fit, or
        "binary" is asked of more than two classes.

    Example:
      >>> metrics = jt.evaluate(state, test, loss_fn, {"f1": jt.metrics.f1("macro")})
      >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
      >>> labels = jnp.array([0, 0, 1, 1])
      >>> jt.metrics.f1("macro")(logits, labels)  # (4/5 + 2/3) / 2
      Array(0.733..., dtype=float32)
      >>> jt.metrics.f1(None)(logits, labels)
      Array([0.8..., 0.666...], dtype=float32)
    """
    return ClassScore("f1", average, threshold)


def precision(average: str | None, *, threshold: float = 0.0) -> AccumulatedMetric:
    """Returns the metric precision: of the examples predicted as a class, the fraction that has it.

    `sklearn.metrics.precision_score`.

    Args:
      average: as in `f1`.
      threshold: as in `f1`.

    Raises:
      InputError: as in `f1`.

    Example:
      >>> scores, targets = jnp.array([2.0, 0.5, -1.0, 1.0]), jnp.array([1, 0, 1, 1])
      >>> jt.metrics.precision("binary")(scores, targets)  # 2 of the 3 that are predicted
      Array(0.666..., dtype=float32)
    """
    return ClassScore("precision", average, threshold)


def recall(average: str | None, *, threshold: float = 0.0) -> AccumulatedMetric:
    """Returns the metric recall: of the examples that have a class, the fraction predicted as it.

    `sklearn.metrics.recall_score`. With `average=None`, it is the accuracy of each class.

    Args:
      average: as in `f1`.
      threshold: as in `f1`.

    Raises:
      InputError: as in `f1`.

    Example:
      >>> metrics = jt.evaluate(state, test, loss_fn, {"recall": jt.metrics.recall(None)})
      >>> metrics["recall"].shape
      (10,)
      >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
      >>> jt.metrics.recall(None)(logits, jnp.array([0, 0, 1, 1]))
      Array([1. , 0.5], dtype=float32)
    """
    return ClassScore("recall", average, threshold)


balanced_accuracy = ClassScore("balanced_accuracy", "macro")
"""The mean over classes of the fraction of their examples that is predicted correctly.

Each class counts equally, however many examples it has; classes without examples are left out
(`sklearn.metrics.balanced_accuracy_score`). Takes logits of classes or one score per example, as
`f1` does.

Example:
  >>> metric_fns = {"balanced_accuracy": jt.metrics.balanced_accuracy}
  >>> metrics = jt.evaluate(state, test, loss_fn, metric_fns)
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> jt.metrics.balanced_accuracy(logits, jnp.array([0, 0, 1, 1]))  # (1 + 1/2) / 2
  Array(0.75, dtype=float32)
"""

confusion_matrix = ConfusionMatrix()
"""How often each label (row) is predicted as each class (column): [classes, classes].

The sums of weights, or without weights the counts (`sklearn.metrics.confusion_matrix`), in float32:
exact up to 2**24. Takes logits of classes or one score per example, as `f1` does. Labels that are
not classes are refused by `fit` and `evaluate`, and make all entries NaN elsewhere: give padding
the weight 0.

Example:
  >>> metric_fns = {"confusion": jt.metrics.confusion_matrix}
  >>> metrics = jt.evaluate(state, test, loss_fn, metric_fns)
  >>> metrics["confusion"].shape
  (10, 10)
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> jt.metrics.confusion_matrix(logits, jnp.array([0, 0, 1, 1]))
  Array([[2., 0.],
         [1., 1.]], dtype=float32)
"""


def roc_auc(average: str | None = "macro") -> AccumulatedMetric:
    """Returns the metric area under the ROC curve.

    The probability that a positive example has a larger score than a negative one
    (`sklearn.metrics.roc_auc_score`), for predictions of the three kinds of `f1`. Each of several
    classes is ranked by its softmax probability against the others (`multi_class="ovr"`).

    The area is exact up to 65,536 examples with at most 16 classes or labels, and up to 2**20
    scores in total with more. Beyond that, neighboring scores are merged into half as many groups
    of about equal weight: the area of a million examples changed by less than 1e-6 in random order
    and sorted by label, and by less than 3e-5 in the worst order that was found. On arrays it is
    always exact.

    Args:
      average: "macro", the mean over classes or labels; "weighted", the same weighted by how many
        examples have them; "micro", the area over all pairs of example and label; None, an array
        with one area per class or label. A single score per example has one area.

    Returns:
      A metric, NaN without positive or without negative examples.

    Raises:
      InputError: `average` is none of these.

    Example:
      >>> scores, targets = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
      >>> jt.metrics.roc_auc()(scores, targets)  # 3 of the 4 pairs are in the right order
      Array(0.75, dtype=float32)
      >>> metrics = jt.evaluate(state, test, loss_fn, {"auc": jt.metrics.roc_auc()})
    """
    return RocAuc(average)


r2 = R2()
"""The coefficient of determination, averaged over outputs (`sklearn.metrics.r2_score`).

1 − squared errors / squared deviations from the mean. NaN for a single example. Weights are one per
example, or one per output.

Example:
  >>> metric_fns = {"r2": jt.metrics.r2}
  >>> predictions, targets = jnp.array([[1.0], [2.0], [4.0]]), jnp.array([[1.0], [2.0], [3.0]])
  >>> jt.metrics.r2(predictions, targets)  # 1 − 1/2
  Array(0.5, dtype=float32)
"""


def takes_labels(metric: AccumulatedMetric) -> bool:
    """Returns whether integer targets are labels for a metric, which must be in range."""
    if isinstance(metric, Mean):
        return metric.function is accuracy or isinstance(metric.function, TopK)
    return isinstance(metric, ClassScore | ConfusionMatrix | RocAuc)
