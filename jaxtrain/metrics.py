"""Metrics that describe a data set, from values per example or from sums over batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PyTree

AnyArray: TypeAlias = Array | np.ndarray
PerExampleMetric: TypeAlias = Callable[[Any, Any], Array]


class AccumulatedMetric(NamedTuple):
    """A metric that is not a mean over examples, computed from sums over all batches.

    A plain pair (sums, finish) works as well.

    Attributes:
      sums: `sums(predictions, targets, weights)` returns a pytree of arrays, summed over a batch.
        `weights` are those of the examples, 1 where the data set has none.
      finish: `finish(sums)` returns the metric, a scalar, from these summed over all batches.

    Example:
      >>> def sums(predictions, targets, weights):
      ...     return jnp.sum(weights), jnp.sum(weights * (predictions - targets) ** 2)
      >>> rmse = jt.metrics.AccumulatedMetric(sums, lambda s: jnp.sqrt(s[1] / s[0]))
      >>> jt.evaluate(state, data, loss_fn, {"rmse": rmse})
    """

    sums: Callable[[Any, Any, Any], PyTree]
    finish: Callable[[Any], Array]


# A function (predictions, targets) -> [batch], whose weighted mean is reported, or a pair
# (sums, finish).
Metric: TypeAlias = (
    PerExampleMetric | tuple[Callable[[Any, Any, Any], PyTree], Callable[[Any], Array]]
)


def accuracy(
    predictions: Float[AnyArray, "*batch classes"], targets: Integer[AnyArray, "..."]
) -> Float[Array, "..."]:
    """Returns 1 where the largest logit is that of the label, else 0.

    Args:
      predictions: logits [batch, classes], or [batch, time, classes] for a label per token.
      targets: integer labels [batch] or [batch, time].

    Returns:
      One value per label.
    """
    return (jnp.argmax(predictions, axis=-1) == targets).astype(jnp.float32)


def _recall_sums(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Integer[AnyArray, "*batch"],
    weights: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "classes"], Float[Array, "classes"]]:
    """Returns the weight of each class's examples: all, and those predicted correctly."""
    labels = targets.ravel().astype(jnp.int32)
    all_weights = jnp.ones(labels.shape) if weights is None else jnp.ravel(weights)
    correct = accuracy(predictions, targets).ravel()

    def per_class(values: Array) -> Array:
        return jax.ops.segment_sum(values, labels, predictions.shape[-1])

    return per_class(all_weights), per_class(all_weights * correct)


def _mean_recall(sums: tuple[Array, Array]) -> Float[Array, ""]:
    """Returns the mean over classes that have examples."""
    total, correct = sums
    present = total > 0
    recall = jnp.where(present, correct / jnp.where(present, total, 1), 0)
    return jnp.sum(recall) / jnp.sum(present)


balanced_accuracy = AccumulatedMetric(_recall_sums, _mean_recall)
"""The mean over classes of the fraction of their examples that is predicted correctly.

Each class counts equally, however many examples it has; classes without examples are left out
(`sklearn.metrics.balanced_accuracy_score`). The last axis of the logits is the number of classes.
"""


def confusion_matrix(
    predictions: Float[AnyArray, "examples classes"], targets: Integer[AnyArray, "examples"]
) -> Int[Array, "classes classes"]:
    """Returns how often each label (row) was predicted as each class (column).

    Args:
      predictions: logits [examples, classes].
      targets: integer labels [examples].
    """
    classes = predictions.shape[-1]
    pairs = targets.astype(jnp.int32) * classes + jnp.argmax(predictions, axis=-1)
    return jnp.bincount(pairs, length=classes * classes).reshape(classes, classes)
