"""The coefficient of determination, from means and squared deviations merged over batches."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain._arguments import axis_hint
from jaxtrain.errors import InputError
from jaxtrain.losses import at_least_float32
from jaxtrain.metrics._metric import AccumulatedMetric, label_weights


class _Moments(NamedTuple):
    """Moments of the targets of each output, [1, outputs].

    Attributes:
      examples: the number of examples with a weight other than 0.
      weight: the sum of their weights.
      mean: the weighted mean of the targets, rounded.
      rest: the rounding error of the mean: mean + rest has twice the digits.
      deviations: the weighted sum of the targets' squared deviations from their mean.
      errors: the weighted sum of squared errors.
    """

    examples: Array
    weight: Array
    mean: Array
    rest: Array
    deviations: Array
    errors: Array


@dataclasses.dataclass(frozen=True)
class R2(AccumulatedMetric):
    """The class of `r2`."""

    @property
    def __name__(self) -> str:
        return "r2"

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> _Moments:
        weights = label_weights("r2", predictions, targets, weights)
        if predictions.shape != targets.shape:
            raise InputError(
                f"r2 received predictions of shape {predictions.shape} and targets of shape "
                f"{targets.shape}; expected the same shape"
                + axis_hint(predictions.shape, targets.shape)
            )
        each = predictions, targets, weights
        predictions, targets, weights = (
            at_least_float32(x + 0.0).reshape(len(targets), -1) for x in each
        )
        moments = _moments(targets, predictions - targets, weights)
        return moments if total is None else _merge(total, moments)

    def finish(self, total: _Moments) -> Float[Array, ""]:
        varies = total.deviations != 0
        score = 1 - total.errors / jnp.where(varies, total.deviations, 1)
        # As in scikit-learn: constant targets are predicted either exactly or not at all.
        score = jnp.where(varies, score, jnp.where(total.errors == 0, 1.0, 0.0))
        score = jnp.where(jnp.isnan(total.errors), jnp.nan, score)
        return jnp.mean(jnp.where(total.examples < 2, jnp.nan, score))


def _moments(targets: Array, errors: Array, weights: Array) -> _Moments:
    def total(values: Array) -> Array:
        return jnp.sum(weights * values, axis=0, keepdims=True)

    has_weight = weights != 0
    weight = total(jnp.ones_like(weights))
    divisor = jnp.where(weight == 0, 1, weight)
    # Subtracting a target first makes the deviations of equal targets 0, and small numbers of
    # targets that are large and close together.
    first = jnp.take_along_axis(targets, jnp.argmax(has_weight, axis=0, keepdims=True), axis=0)
    mean = first + total(targets - first) / divisor
    deviations = jnp.where(has_weight, targets - mean, 0)
    rest = total(deviations) / divisor
    return _Moments(
        jnp.sum(has_weight, axis=0, keepdims=True, dtype=weights.dtype),
        weight,
        mean,
        rest,
        total(jnp.square(deviations - rest)),
        total(jnp.square(errors)),
    )


def _merge(one: _Moments, other: _Moments) -> _Moments:
    """Returns the moments of both sets of examples.

    By the formula of Chan, Golub & LeVeque, 1983, https://doi.org/10.1080/00031305.1983.10483115.
    The mean has twice the digits of float32, since otherwise the roundings of many batches would
    add up to more than the targets deviate.
    """
    weight = one.weight + other.weight
    fraction = other.weight / jnp.where(weight == 0, 1, weight)
    difference = (other.mean - one.mean) + (other.rest - one.rest)
    step = one.rest + difference * fraction
    mean = one.mean + step
    part = mean - one.mean  # Knuth's exact sum: mean + rest = one.mean + step
    rest = (one.mean - (mean - part)) + (step - part)
    is_first = one.weight == 0
    return _Moments(
        one.examples + other.examples,
        weight,
        jnp.where(is_first, other.mean, mean),
        jnp.where(is_first, other.rest, rest),
        one.deviations + other.deviations + jnp.square(difference) * one.weight * fraction,
        one.errors + other.errors,
    )
