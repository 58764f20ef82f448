"""The area under the ROC curve, from the ranks of all scores."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxtrain.metrics._classes import by_kind, check_average, check_labels
from jaxtrain.metrics._metric import AccumulatedMetric, label_weights


class _Scores(NamedTuple):
    """The scores of each label, in any order, [labels, scores].

    Attributes:
      used: number of scores in use; the others have weight 0.
      scores: the scores.
      negatives: the weight of the negative examples with a score; NaN if the score is NaN.
      positives: the weight of the positive ones.
    """

    used: Integer[Array, ""]
    scores: Array
    negatives: Array
    positives: Array


@dataclasses.dataclass(frozen=True)
class RocAuc(AccumulatedMetric):
    """What `roc_auc` returns.

    Attributes:
      average: how the areas of several labels are averaged.
      capacity: the largest numbers of scores kept per label, and of all labels together.
    """

    average: str | None
    capacity: tuple[int, int] = (2**16, 2**20)

    def __post_init__(self) -> None:
        check_average("roc_auc", self.average, ("macro", "micro", "weighted"))

    @property
    def __name__(self) -> str:
        return "roc_auc"

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> _Scores:
        batch = _scores(predictions, targets, weights)
        labels, examples = batch.scores.shape
        per_label, in_total = self.capacity
        capacity = max(2, min(per_label, in_total // labels) // 2 * 2)
        if total is None:
            buffers = [jnp.zeros((labels, capacity), each.dtype) for each in batch[1:]]
            total = _Scores(jnp.zeros((), jnp.int32), *buffers)
        for start in range(0, examples, capacity // 2):
            part = [each[:, start : start + capacity // 2] for each in batch[1:]]
            total = _append(total, part)
        return total

    def _check(self, predictions: Any, targets: Any, weights: Any) -> None:
        check_labels("roc_auc", predictions, targets, weights)

    def _total_of(self, predictions: Any, targets: Any, weights: Array) -> _Scores:
        return _scores(predictions, targets, weights)  # all of them, so that the area is exact

    def finish(self, total: _Scores) -> Float[Array, "..."]:
        _, *buffers = total
        if self.average == "micro":
            buffers = [each.reshape(1, -1) for each in buffers]
        areas = _area(*buffers)
        if len(areas) == 1:
            return areas[0]
        if self.average == "weighted":
            support = jnp.sum(total.positives, axis=1)
            areas = jnp.where(support == 0, 0, areas)
            return jnp.sum(support * areas) / jnp.sum(support)
        return areas if self.average is None else jnp.mean(areas)


def _scores(predictions: Array, targets: Array, weights: Array) -> _Scores:
    """Returns the scores of a batch, [labels, examples]."""
    weights = label_weights("roc_auc", predictions, targets, weights)
    scores, true, kind = by_kind("roc_auc", predictions, targets)
    labels = 1 if kind == "binary" else scores.shape[-1]
    scores = scores.reshape(-1, labels).astype(jnp.promote_types(scores.dtype, jnp.float32))
    if kind == "classes":
        true, weights = true.reshape(-1, 1).astype(jnp.int32), weights.reshape(-1, 1)
        is_valid = (true >= 0) & (true < labels)
        true, scores = true == jnp.arange(labels)[None], _log_odds(scores)
    else:
        true, weights = true.reshape(-1, labels), weights.reshape(-1, labels)
        is_valid = (true == 0) | (true == 1)
    weights = jnp.broadcast_to(jnp.where(is_valid, weights, jnp.nan), true.shape)
    weights = jnp.where(jnp.isnan(scores), jnp.nan, weights).astype(scores.dtype)
    is_known = ~jnp.isnan(weights)
    negatives = jnp.where(is_known & (true > 0), 0, weights)
    positives = jnp.where(is_known & (true <= 0), 0, weights)
    count = jnp.asarray(len(true), jnp.int32)
    return _Scores(count, scores.T, negatives.T, positives.T)


def _log_odds(logits: Array) -> Array:
    """Returns log(p / (1 − p)) of the softmax, plus a constant, [examples, classes].

    It orders examples as p does, also where p rounds to 1, and where all p are almost equal.
    """
    classes = logits.shape[-1]
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    is_largest = jnp.arange(classes)[None] == jnp.argmax(logits, axis=-1, keepdims=True)
    others = jax.nn.logsumexp(jnp.where(is_largest, -jnp.inf, logits), axis=-1, keepdims=True)
    log_p = jax.nn.log_softmax(logits)
    odds = jnp.where(is_largest, logits - others, log_p - jnp.log1p(-jnp.exp(log_p)))
    # log(p / (1 − p)) = logit − log(sum of the exponentials of the others)
    powers = jnp.expm1(logits)
    mean = (jnp.sum(powers, axis=-1, keepdims=True) - powers) / (classes - 1)
    are_close = jnp.min(logits, axis=-1, keepdims=True) > -1
    return jnp.where(are_close, logits - jnp.log1p(mean), odds + jnp.log(classes - 1.0))


def _append(total: _Scores, part: list[Array]) -> _Scores:
    """Returns the scores with those of a batch, after merging the earlier ones if they are many."""
    used, *buffers = total
    capacity, size = buffers[0].shape[1], part[0].shape[1]
    is_full = used + size > capacity
    # The number does not depend on the data, so that this remains a branch under `vmap`.
    buffers = lax.cond(is_full, _merged, list, buffers)
    used = jnp.where(is_full, capacity // 2, used)
    first = jnp.zeros((), used.dtype)
    buffers = [
        lax.dynamic_update_slice(old, new, (first, used))
        for old, new in zip(buffers, part, strict=True)
    ]
    return _Scores(used + size, *buffers)


def _merged(buffers: list[Array]) -> list[Array]:
    """Returns half as many scores, in which neighbors are merged into groups of similar weight."""

    def of_label(scores: Array, negatives: Array, positives: Array) -> list[Array]:
        weights = negatives + positives
        scores = jnp.where(weights == 0, jnp.inf, scores)
        scores, negatives, positives = lax.sort((scores, negatives, positives), num_keys=1)
        groups = len(scores) // 2
        # Half of the weight is that of all negatives, and half that of all positives.
        mass = _fraction(negatives) + _fraction(positives)
        middle = jnp.cumsum(mass) - mass / 2
        group = jnp.floor(middle / jnp.maximum(jnp.sum(mass), 1) * groups).astype(jnp.int32)
        group = jnp.where(mass == 0, groups, jnp.clip(group, 0, groups - 1))  # no group

        def add(values: Array) -> Array:
            return jax.ops.segment_sum(values, group, groups)

        # A group has the mean score of its members, or the smallest one if others are infinite.
        members = add(jnp.ones(len(scores), jnp.int32))
        last = jnp.cumsum(members) - 1
        smallest, largest = scores[last - members + 1], scores[last]
        above = add(mass * (scores - smallest[group])) / jnp.where(members == 0, 1, add(mass))
        mean = jnp.where(jnp.isfinite(above), jnp.minimum(smallest + above, largest), smallest)
        rest = (0, len(scores) - groups)
        return [jnp.pad(each, rest) for each in (mean, add(negatives), add(positives))]

    return list(jax.vmap(of_label)(*buffers))


def _fraction(weights: Array) -> Array:
    total = jnp.sum(weights)
    return weights / jnp.where(total == 0, 1, total)


def _area(scores: Array, negatives: Array, positives: Array) -> Float[Array, "labels"]:
    """Returns the fraction of pairs in the right order; a pair of equal scores counts as half."""
    scores, negatives, positives = lax.sort((scores, negatives, positives), num_keys=1)
    changes = scores[:, 1:] != scores[:, :-1]
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    # Cumulative sums on a CPU and a GPU add in pairs, so that rounding errors do not add up.
    through = jnp.cumsum(negatives, axis=1)
    before = jnp.pad(through[:, :-1], ((0, 0), (1, 0)))
    below = lax.cummax(jnp.where(is_first, before, 0), axis=1)
    up_to = lax.cummin(jnp.where(is_last, through, jnp.inf), axis=1, reverse=True)
    fraction = (below + up_to) / 2 / through[:, -1:]
    ordered, total = (jnp.cumsum(x, axis=1)[:, -1] for x in (positives * fraction, positives))
    return ordered / total
