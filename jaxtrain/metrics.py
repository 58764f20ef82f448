"""Metrics that describe a data set, from values per example or from sums over batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, PyTree, Shaped

from jaxtrain._arguments import check_integer
from jaxtrain.errors import InputError

AnyArray: TypeAlias = Array | np.ndarray
PerExampleMetric: TypeAlias = Callable[[Any, Any], Array]
"""A function `metric(predictions, targets) -> [batch]`, whose weighted mean is reported."""


class AccumulatedMetric(NamedTuple):
    """A metric that is not a mean over examples, computed from sums over all batches.

    A plain pair (sums, finish) works as well.

    Attributes:
      sums: `sums(predictions, targets, weights)` returns a pytree of arrays, summed over a batch.
        `weights` are those of the examples, 1 where the data set has none.
      finish: `finish(sums)` returns the metric, an array of any shape, from these summed over all
        batches.

    Example:
      >>> def sums(predictions, targets, weights):
      ...     errors = jnp.mean((predictions - targets) ** 2, axis=-1)
      ...     return jnp.sum(weights), jnp.sum(weights * errors)
      >>> rmse = jt.metrics.AccumulatedMetric(sums, lambda s: jnp.sqrt(s[1] / s[0]))
      >>> train, test = jt.data.line()
      >>> state = jt.init_state(jt.models.LinearRegression(), optimizer, test.inputs[:1], key=key)
      >>> metrics = jt.evaluate(state, test, jt.losses.mean_squared_error, {"rmse": rmse})
    """

    sums: Callable[..., PyTree]
    finish: Callable[[Any], Array]


Metric: TypeAlias = (
    PerExampleMetric | tuple[Callable[[Any, Any, Any], PyTree], Callable[[Any], Array]]
)
"""What `evaluate` takes as a metric, a `PerExampleMetric` or an `AccumulatedMetric`."""


def accuracy(
    predictions: Float[AnyArray, "*batch classes"], targets: Integer[AnyArray, "..."]
) -> Float[Array, "..."]:
    """Returns 1 where the largest logit is that of the label, else 0.

    Args:
      predictions: logits [batch, classes], or [batch, time, classes] for a label per token.
      targets: integer labels [batch] or [batch, time].

    Returns:
      One value per label.

    Raises:
      InputError: there is one logit per label, or only one class.

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
    _check_classes(predictions, targets, "accuracy", hint)
    return (jnp.argmax(predictions, axis=-1) == targets).astype(jnp.float32)


def _check_classes(predictions: AnyArray, targets: AnyArray, name: str, hint: str = "") -> None:
    """Raises InputError unless each label has logits of two or more classes."""
    if predictions.ndim <= jnp.ndim(targets) or predictions.shape[-1] == 1:
        raise InputError(
            f"{name} received predictions of shape {predictions.shape}; expected logits of two "
            f"or more classes along the last axis{hint}"
        )


def _label_weights(
    targets: Integer[AnyArray, "*batch"], weights: Shaped[AnyArray, "..."] | None
) -> Float[Array, "labels"]:
    """Returns one weight per label: 1 without weights, and that of the example for its tokens."""
    if weights is None:
        return jnp.ones(targets.size)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    axes = range(weights.ndim, targets.ndim)
    return jnp.broadcast_to(jnp.expand_dims(weights, tuple(axes)), targets.shape).ravel()


def _recall_sums(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Integer[AnyArray, "*batch"],
    weights: Shaped[AnyArray, "..."] | None = None,
) -> tuple[Float[Array, "classes"], Float[Array, "classes"]]:
    """Returns the weight of each class's examples: all, and those predicted correctly."""
    labels = targets.ravel().astype(jnp.int32)
    all_weights = _label_weights(targets, weights)
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

Example:
  >>> metric_fns = {"balanced_accuracy": jt.metrics.balanced_accuracy}
  >>> metrics = jt.evaluate(state, test, loss_fn, metric_fns)
  >>> sums, finish = jt.metrics.balanced_accuracy  # on arrays, without a model
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> finish(sums(logits, jnp.array([0, 0, 1, 1])))  # (1 + 1/2) / 2
  Array(0.75, dtype=float32)
"""


def _recall(sums: tuple[Array, Array]) -> Float[Array, "classes"]:
    total, correct = sums
    present = total > 0
    return jnp.where(present, correct / jnp.where(present, total, 1), jnp.nan)


per_class_accuracy = AccumulatedMetric(_recall_sums, _recall)
"""The recall of each class, the fraction of its examples that is predicted correctly: [classes].

Same as `sklearn.metrics.recall_score(average=None)`, but NaN for a class without examples. Targets
are labels [batch], or [batch, time] for a label per token. The last axis of the logits is the
number of classes.

Example:
  >>> metric_fns = {"recall": jt.metrics.per_class_accuracy}
  >>> metrics = jt.evaluate(state, test, loss_fn, metric_fns)
  >>> metrics["recall"].shape
  (10,)
  >>> sums, finish = jt.metrics.per_class_accuracy  # on arrays, without a model
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> finish(sums(logits, jnp.array([0, 0, 1, 1])))
  Array([1. , 0.5], dtype=float32)
"""


def top_k_accuracy(k: int) -> PerExampleMetric:
    """Returns the metric that is 1 where the label is among the `k` largest logits, else 0.

    Create it once: a new one triggers a recompilation.

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
    return functools.partial(_is_in_top, k=k)


def _is_in_top(
    predictions: Float[AnyArray, "*batch classes"], targets: Integer[AnyArray, "*batch"], *, k: int
) -> Float[Array, "*batch"]:
    labels = targets.astype(jnp.int32)[..., None]
    larger = predictions > jnp.take_along_axis(jnp.asarray(predictions), labels, axis=-1)
    return (jnp.sum(larger, axis=-1) < k).astype(jnp.float32)


def _f1_sums(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Integer[AnyArray, "*batch"],
    weights: Shaped[AnyArray, "..."] | None = None,
) -> tuple[Float[Array, "classes"], Float[Array, "classes"], Float[Array, "classes"]]:
    """Returns the weight of each class's examples: labelled, predicted, and both."""
    total, correct = _recall_sums(predictions, targets, weights)
    chosen = jnp.argmax(predictions, axis=-1).ravel()
    predicted = jax.ops.segment_sum(_label_weights(targets, weights), chosen, predictions.shape[-1])
    return total, predicted, correct


def _macro_f1(sums: tuple[Array, Array, Array]) -> Float[Array, ""]:
    """Returns the mean over the classes that are labelled or predicted."""
    labelled, predicted, correct = sums
    either = labelled + predicted
    present = either > 0
    f1 = jnp.where(present, 2 * correct / jnp.where(present, either, 1), 0)
    return jnp.sum(f1) / jnp.sum(present)


macro_f1 = AccumulatedMetric(_f1_sums, _macro_f1)
"""The mean over classes of F1, the harmonic mean of precision and recall.

Same as `sklearn.metrics.f1_score(average="macro")`. Classes that are neither labelled nor predicted
are left out. The last axis of the logits is the number of classes.

Example:
  >>> metrics = jt.evaluate(state, test, loss_fn, {"macro_f1": jt.metrics.macro_f1})
  >>> sums, finish = jt.metrics.macro_f1  # on arrays, without a model
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> finish(sums(logits, jnp.array([0, 0, 1, 1])))  # (4/5 + 2/3) / 2
  Array(0.733..., dtype=float32)
"""

# The scores are counted by the first bits of their float32: the sign, 8 of the exponent and 5 of
# the mantissa, so that a bin is 3 % wide at any magnitude.
_AUC_BITS = 14


def _auc_sums(
    predictions: Float[AnyArray, "batch ..."],
    targets: Shaped[AnyArray, "batch ..."],
    weights: Float[Array, "batch ..."] | None = None,
) -> Float[Array, "2 bins"]:
    """Returns the weight of the negative and the positive examples in each bin of scores."""
    scores = jnp.ravel(predictions).astype(jnp.float32)
    bits = lax.bitcast_convert_type(scores + 0.0, jnp.uint32)  # + 0.0: −0 counts as 0
    negative = bits >> 31 == 1
    ordered = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
    bins = (ordered >> (32 - _AUC_BITS)).astype(jnp.int32)
    is_positive = (jnp.ravel(targets) > 0).astype(jnp.int32)
    all_weights = jnp.ones(scores.shape) if weights is None else jnp.ravel(weights)
    count = 2**_AUC_BITS
    sums = jax.ops.segment_sum(all_weights, is_positive * count + bins, 2 * count)
    return sums.reshape(2, count)


def _auc(sums: Float[Array, "2 bins"]) -> Float[Array, ""]:
    """Returns the part of the pairs in the right order; a pair in one bin counts as half."""
    negatives, positives = sums
    below = jnp.cumsum(negatives) - negatives
    ordered = jnp.sum(positives * (below + negatives / 2))
    pairs = jnp.sum(positives) * jnp.sum(negatives)
    return jnp.where(pairs > 0, ordered / jnp.where(pairs > 0, pairs, 1), jnp.nan)


roc_auc = AccumulatedMetric(_auc_sums, _auc)
"""The probability that a positive example has a larger score than a negative one.

The area under the ROC curve (`sklearn.metrics.roc_auc_score`), for one logit or probability per
example, [batch] or [batch, 1], and targets 0 or 1. Scores that differ by less than 3 % may count as
equal, which changes the area by about 1e-3 at most in practice. NaN without positive or negative
examples.

Example:
  >>> metric_fns = {"roc_auc": jt.metrics.roc_auc}
  >>> sums, finish = jt.metrics.roc_auc  # on arrays, without a model
  >>> scores, targets = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
  >>> finish(sums(scores, targets))  # 3 of the 4 pairs are in the right order
  Array(0.75, dtype=float32)
"""


def _r2_sums(
    predictions: Float[AnyArray, "batch ..."],
    targets: Shaped[AnyArray, "batch ..."],
    weights: Float[Array, "batch"] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Returns the sums of weights, targets, squared targets and squared errors, per output."""
    columns = targets.reshape(len(targets), -1).astype(jnp.float32)
    errors = predictions.reshape(columns.shape) - columns
    each = jnp.ones((len(columns), 1)) if weights is None else jnp.reshape(weights, (-1, 1))
    return (
        jnp.sum(each),
        jnp.sum(each * columns, axis=0),
        jnp.sum(each * jnp.square(columns), axis=0),
        jnp.sum(each * jnp.square(errors), axis=0),
    )


def _r2(sums: tuple[Array, Array, Array, Array]) -> Float[Array, ""]:
    """Returns 1 − squared errors / squared deviations from the mean, averaged over outputs."""
    count, total, squares, errors = sums
    deviations = squares - jnp.square(total) / count
    varies = deviations > 0
    score = 1 - errors / jnp.where(varies, deviations, 1)
    # As in scikit-learn: constant targets are predicted either exactly or not at all.
    return jnp.mean(jnp.where(varies, score, jnp.where(errors == 0, 1.0, 0.0)))


r2 = AccumulatedMetric(_r2_sums, _r2)
"""The coefficient of determination, averaged over outputs (`sklearn.metrics.r2_score`).

Computed from sums in float32: subtract the mean from targets whose mean is more than a hundred
times their standard deviation.

Example:
  >>> metric_fns = {"r2": jt.metrics.r2}
  >>> sums, finish = jt.metrics.r2  # on arrays, without a model
  >>> predictions, targets = jnp.array([[1.0], [2.0], [4.0]]), jnp.array([[1.0], [2.0], [3.0]])
  >>> finish(sums(predictions, targets))  # 1 − 1/2
  Array(0.5, dtype=float32)
"""


def _confusion_sums(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Integer[AnyArray, "*batch"],
    weights: Shaped[AnyArray, "..."] | None = None,
) -> Float[Array, "classes classes"]:
    """Returns the weight of the examples of each pair of label and predicted class."""
    _check_classes(predictions, targets, "confusion_matrix")
    classes = predictions.shape[-1]
    chosen = jnp.argmax(predictions, axis=-1).ravel()
    pairs = targets.ravel().astype(jnp.int32) * classes + chosen
    sums = jax.ops.segment_sum(_label_weights(targets, weights), pairs, classes * classes)
    return sums.reshape(classes, classes)


def _identity(sums: Any) -> Any:
    return sums


confusion_matrix = AccumulatedMetric(_confusion_sums, _identity)
"""How often each label (row) is predicted as each class (column): [classes, classes].

The sums of weights, or without weights the counts (`sklearn.metrics.confusion_matrix`), in float32:
exact up to 2**24. Targets are labels [batch], or [batch, time] for a label per token. Labels
outside the classes, such as −1 for padding, are left out. The last axis of the logits is the number
of classes.

Example:
  >>> metric_fns = {"confusion": jt.metrics.confusion_matrix}
  >>> metrics = jt.evaluate(state, test, loss_fn, metric_fns)
  >>> metrics["confusion"].shape
  (10, 10)
  >>> sums, finish = jt.metrics.confusion_matrix  # on arrays, without a model
  >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
  >>> finish(sums(logits, jnp.array([0, 0, 1, 1])))
  Array([[2., 0.],
         [1., 1.]], dtype=float32)
"""
