"""Metrics of predicted classes and labels, from counts of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxtrain._arguments import axis_hint, check_arrays, check_finite, check_integer, describe
from jaxtrain._placement import has_values
from jaxtrain.dataset import has_weight
from jaxtrain.errors import InputError
from jaxtrain.metrics._metric import (
    AccumulatedMetric,
    AnyArray,
    label_weights,
)


def accuracy(
    predictions: Float[AnyArray, "*batch classes"], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "..."]:
    """Returns 1 where the largest logit is that of the label, else 0.

    Args:
      predictions: logits [batch, classes], or [batch, time, classes] for a label per token.
      targets: integer labels [batch] or [batch, time].

    Returns:
      One value per label.

    Raises:
      InputError: there is one logit per label, not one label per row of logits, or a label out of
        range, which gives NaN while it is traced.

    Example:
      >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0]])
      >>> jt.metrics.accuracy(logits, jnp.array([0, 1]))
      Array([1., 0.], dtype=float32)
      >>> metrics = jt.evaluate(state, test, loss_fn, {"accuracy": jt.metrics.accuracy})
    """
    hint = (
        ": for one logit per example, pass a metric such as "
        "lambda logits, targets: ((logits > 0) == targets).astype(float)"
    )
    check_classes("accuracy", predictions, targets, hint)
    check_labels("accuracy", predictions, targets, None)
    correct = (jnp.argmax(predictions, axis=-1) == targets).astype(jnp.float32)
    return jnp.where(_in_range(targets, predictions.shape[-1]), correct, jnp.nan)


def top_k_accuracy(k: int) -> Callable[[Any, Any], Array]:
    """Returns the metric that is 1 where the label is among the `k` largest logits, else 0.

    Args:
      k: how many classes count, at least 1.

    Raises:
      InputError: k is below 1.

    Example:
      >>> metric_fns = {"top_2": jt.metrics.top_k_accuracy(2)}
      >>> metric_fns["top_2"](jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([1, 2]))
      Array([1., 0.], dtype=float32)
    """
    check_integer(k, "k", minimum=1)
    return TopK(k)


@dataclasses.dataclass(frozen=True)
class TopK:
    k: int

    @property
    def __name__(self) -> str:
        return f"top_{self.k}_accuracy"

    def __call__(
        self,
        predictions: Float[AnyArray, "*batch classes"],
        targets: Shaped[AnyArray, "..."],
    ) -> Float[Array, "..."]:
        check_classes(self.__name__, predictions, targets)
        check_labels(self.__name__, predictions, targets, None)
        inside = _in_range(targets, predictions.shape[-1])
        labels = jnp.where(inside, targets, 0).astype(jnp.int32)[..., None]
        logits = jnp.asarray(predictions)
        # Not `>`, by which no logit would be larger than a NaN.
        larger = ~(logits <= jnp.take_along_axis(logits, labels, axis=-1))
        correct = (jnp.sum(larger, axis=-1) < self.k).astype(jnp.float32)
        return jnp.where(inside, correct, jnp.nan)


class _Labels(NamedTuple):
    """Predicted and true classes, [examples]; or with several labels each, [examples, labels].

    Attributes:
      predicted: the predicted class, or whether each label is predicted.
      true: the true class, or whether the example has each label.
      weights: the weight of each class or label.
      classes: the number of classes, or of labels per example.
      is_multi_label: whether an example may have several labels.
      invalid: whether any target is not a class, or any prediction is NaN.
    """

    predicted: Array
    true: Array
    weights: Array
    classes: int
    is_multi_label: bool
    invalid: Array

    def counts(self, is_counted: Array | float, index: Array) -> Float[Array, "classes"]:
        """Returns the total weight of each class or label where `is_counted` and `index` hold.

        `index` has the class of each example, or whether it has each label. NaN if any is invalid.
        """
        values = self.weights * is_counted
        if self.is_multi_label:
            found = jnp.sum(values * index, axis=0)
        else:
            found = jax.ops.segment_sum(values, index, self.classes)
        return jnp.where(self.invalid, jnp.nan, found)


def _labels(
    name: str, predictions: Array, targets: Array, weights: Array, threshold: float = 0.0
) -> _Labels:
    """Returns the classes or labels that scores predict; see `f1`."""
    weights = label_weights(name, predictions, targets, weights)
    scores, true, kind = by_kind(name, predictions, targets)
    classes = 2 if kind == "binary" else scores.shape[-1]
    if kind == "classes":
        predicted, is_valid = jnp.argmax(scores, axis=-1), _in_range(true, classes)
    else:
        predicted, is_valid = scores > threshold, (true == 0) | (true == 1)
    rows = (-1, classes) if kind == "labels" else (-1,)
    predicted, true = (x.reshape(rows).astype(jnp.int32) for x in (predicted, true))
    invalid = ~jnp.all(is_valid) | jnp.any(jnp.isnan(scores))
    return _Labels(predicted, true, weights.reshape(rows), classes, kind == "labels", invalid)


class _Counts(NamedTuple):
    """Total weights of examples per class or label, [classes].

    Attributes:
      labelled: the examples that have the class or label.
      predicted: the examples for which it is predicted.
      correct: the examples that have it and for which it is predicted.
      present: above 0 if it counts in a mean: each label does, and each class that occurs.
    """

    labelled: Array
    predicted: Array
    correct: Array
    present: Array


@dataclasses.dataclass(frozen=True)
class ClassScore(AccumulatedMetric):
    """What `precision`, `recall` and `f1` return, and `balanced_accuracy`."""

    kind: str
    average: str | None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_average(self.kind, self.average, ("binary", "macro", "micro", "weighted"))
        check_finite(threshold=self.threshold)

    @property
    def __name__(self) -> str:
        return self.kind

    def _check(self, predictions: Any, targets: Any, weights: Any) -> None:
        check_labels(self.kind, predictions, targets, weights)

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> _Counts:
        labels = _labels(self.kind, predictions, targets, weights, self.threshold)
        expected = None
        if self.kind == "balanced_accuracy" and labels.is_multi_label:
            expected = "one score per example, or logits of classes"
        elif self.average == "binary" and (labels.is_multi_label or labels.classes != 2):
            expected = "one score per example, or the average 'macro', 'micro', 'weighted' or None"
        if expected is not None:
            raise InputError(
                f"{self.kind} with the average {self.average!r} received predictions of shape "
                f"{predictions.shape}; expected {expected}"
            )
        labelled = labels.counts(1.0, labels.true)
        predicted = labels.counts(1.0, labels.predicted)
        correct = labels.counts(labels.predicted == labels.true, labels.true)
        present = labelled + predicted
        if self.kind == "balanced_accuracy":
            present = labelled
        elif labels.is_multi_label:
            present = labels.counts(1.0, jnp.ones_like(labels.true))
        counts = _Counts(labelled, predicted, correct, present)
        return counts if total is None else jax.tree.map(jnp.add, total, counts)

    def finish(self, total: _Counts) -> Float[Array, "..."]:
        if self.average == "micro":
            total = _Counts(*(jnp.sum(each, keepdims=True) for each in total))
        whole = {
            "precision": total.predicted,
            "recall": total.labelled,
            "f1": (total.labelled + total.predicted) / 2,
            "balanced_accuracy": total.labelled,
        }[self.kind]
        if self.average is None:
            return total.correct / whole  # 0 / 0 is NaN
        score = jnp.where(whole == 0, 0, total.correct / whole)
        present = jnp.where(total.present == 0, 0.0, 1.0)
        if self.average == "binary":
            return jnp.where(jnp.sum(present) == 0, jnp.nan, score[1])
        if self.average == "weighted":  # equally if no label is positive
            present = jnp.where(jnp.sum(total.labelled) == 0, present, total.labelled)
        return jnp.sum(present * score) / jnp.sum(present)


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(AccumulatedMetric):
    """The class of `confusion_matrix`."""

    @property
    def __name__(self) -> str:
        return "confusion_matrix"

    def _check(self, predictions: Any, targets: Any, weights: Any) -> None:
        check_labels(self.__name__, predictions, targets, weights)

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> Array:
        labels = _labels(self.__name__, predictions, targets, weights)
        if labels.is_multi_label:
            check_classes(self.__name__, predictions, targets)
        classes = labels.classes
        pairs = labels._replace(classes=classes * classes)
        counts = pairs.counts(1.0, labels.true * classes + labels.predicted)
        counts = counts.reshape(classes, classes)
        return counts if total is None else total + counts

    def finish(self, total: Any) -> Float[Array, "classes classes"]:
        return total


def check_average(name: str, average: Any, names: tuple[str, ...]) -> None:
    """Raises InputError unless the average is one of the names, or None."""
    if average is not None and not (isinstance(average, str) and average in names):
        raise InputError(
            f"the average of {name} is {describe(average)}; expected None, "
            f"{', '.join(map(repr, names))}: {name}(average) makes a metric",
            argument="average",
        )


def check_classes(name: str, predictions: AnyArray, targets: AnyArray, hint: str = "") -> None:
    """Raises InputError unless each label has logits of two or more classes."""
    check_arrays(predictions=predictions, targets=targets)
    rows = predictions.shape[:-1]
    extra_axis = axis_hint(rows, targets.shape)
    has_classes = predictions.ndim > 0 and predictions.shape[-1] != 1
    if not has_classes or (predictions.ndim <= targets.ndim and not extra_axis):
        raise InputError(
            f"{name} received predictions of shape {predictions.shape}; expected logits of two "
            f"or more classes along the last axis{hint}"
        )
    if rows != targets.shape:
        raise InputError(
            f"targets of {name} have the shape {targets.shape}; expected one label per row of the "
            f"logits, {rows}{extra_axis}"
        )
    if jnp.issubdtype(targets.dtype, jnp.floating):
        raise InputError(
            f"targets of {name} have the dtype {targets.dtype}; expected integer class labels"
        )


def check_labels(name: str, predictions: Any, targets: Any, weights: Any) -> None:
    """Raises InputError if targets with a weight, whose values are known, are not labels."""
    check_arrays(predictions=predictions, targets=targets)
    if not all(has_values(x) for x in (targets, weights) if hasattr(x, "size")):
        return
    kind, values = by_kind(name, predictions, targets)[2], np.asarray(targets)
    if weights is not None:
        values = values[np.broadcast_to(has_weight(np.asarray(weights), values), values.shape)]
    classes = predictions.shape[-1] if kind == "classes" else 2
    wrong = ~_in_range(values, classes) | (values != np.floor(values))
    if wrong.any():
        raise InputError(
            f"{name} received the label {values[wrong][0]}; expected labels from 0 to "
            f"{classes - 1}: give others the weight 0, or leave them out"
        )


def by_kind(name: str, predictions: Array, targets: Array) -> tuple[Array, Array, str]:
    """Returns scores and targets, and their kind.

    "binary" is one score and one target, 0 or 1, per example; "labels" is several of both, in the
    last axis; "classes" are logits of several classes with integer labels.

    Raises InputError if the shapes are none of these.
    """
    shape = predictions.shape
    if shape == targets.shape and len(shape) >= 2 and shape[-1] > 1:
        return predictions, targets, "labels"
    if len(shape) == targets.ndim + 1 and shape[-1] > 1:
        check_classes(name, predictions, targets)
        return predictions, targets, "classes"
    if shape == targets.shape or shape == (*targets.shape, 1):
        return predictions.ravel(), targets.ravel(), "binary"
    raise InputError(
        f"{name} received predictions of shape {shape} and targets of shape {targets.shape}; "
        "expected the same shape, or logits of classes along one more axis"
        + axis_hint(shape, targets.shape)
    )


def _in_range(targets: Shaped[AnyArray, "..."], classes: int) -> AnyArray:
    return (targets >= 0) & (targets < classes)
