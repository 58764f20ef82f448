"""Losses: one value per example, `loss(predictions, targets) -> [batch]`.

A step takes the mean over the batch. Where PyTorch's loss has a `reduction`, the functions here
are its value for each example, averaged over all axes but the first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxtrain.errors import InputError

Loss = Callable[[Array, Array], Array]


def mean_absolute_error(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """|prediction − target|, averaged over all axes but the first (`torch.nn.L1Loss`).

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    error = predictions - targets
    # Not jnp.abs: its gradient at 0 is 1 in JAX, 0 in PyTorch.
    return _mean_over_example(error * jnp.sign(error))


def mean_squared_error(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """(prediction − target)², averaged over all axes but the first (`torch.nn.MSELoss`).

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    return _mean_over_example(jnp.square(predictions - targets))


def squared_error_sum(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """(prediction − target)², summed over all axes but the first.

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    return _sum_over_example(jnp.square(predictions - targets))


def euclidean_distance(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """‖prediction − target‖₂, each example as one vector (`torch.linalg.vector_norm`).

    Its gradient at distance 0 is 0, where the formula alone gives NaN.

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    return _norm(_as_vectors(predictions - targets))


def cosine_distance(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """1 − cos of the angle between prediction and target (1 − `torch.cosine_similarity`).

    0 for the same direction, 1 for a right angle, 2 for opposite ones. As in PyTorch, a norm below
    1e-8 counts as 1e-8.

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    pair = _as_vectors(predictions), _as_vectors(targets).astype(predictions.dtype)
    directions = [vector / _at_least(_norm(vector), 1e-8)[:, None] for vector in pair]
    return 1 - jnp.sum(directions[0] * directions[1], axis=-1)


def cross_entropy(
    predictions: Float[Array, "batch classes"], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """−log softmax(logits)[label] (`torch.nn.CrossEntropyLoss`).

    Args:
      predictions: logits [batch, classes].
      targets: integer labels [batch] in 0 … classes − 1. A label outside gives NaN, where JAX's
        indexing alone would take a neighbouring class.

    Raises:
      InputError: labels that are not integers, or not one an example.
    """
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise InputError(
            f"targets of cross_entropy have the type {targets.dtype}; expected integer class labels"
        )
    if targets.shape != predictions.shape[:1]:
        raise InputError(
            f"targets of cross_entropy have the shape {targets.shape}; expected one label for each "
            f"row of the logits, {predictions.shape[:1]}"
        )
    # Narrow labels would wrap in the comparison: 256 is 0 as uint8.
    targets = targets.astype(jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(predictions, targets)
    return jnp.where((targets >= 0) & (targets < predictions.shape[-1]), loss, jnp.nan)


def soft_cross_entropy(
    predictions: Float[Array, "batch classes"], targets: Float[Array, "..."]
) -> Float[Array, "batch"]:
    """−Σ p log softmax(logits), of the target distribution p (`torch.nn.CrossEntropyLoss`).

    Args:
      predictions: logits [batch, classes].
      targets: probabilities [batch, classes], each row summing to 1 (not checked).

    Raises:
      InputError: the shapes differ.
    """
    _check_same_shape(predictions, targets)
    return optax.softmax_cross_entropy(predictions, targets)


def binary_cross_entropy(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """−(t log p + (1 − t) log(1 − p)), averaged over all axes but the first (`torch.nn.BCELoss`).

    As in PyTorch, a logarithm is at least −100, and the gradient (p − t) / (p (1 − p)) divides by
    at least 1e-12: both stay finite at p = 0 and p = 1.

    Args:
      predictions: probabilities [batch, ...]; for logits take `sigmoid_binary_cross_entropy`.
      targets: 0 or 1, or probabilities, of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    return _mean_over_example(_clamped_bce(predictions, targets.astype(predictions.dtype)))


def sigmoid_binary_cross_entropy(
    predictions: Float[Array, "batch ..."], targets: Shaped[Array, "..."]
) -> Float[Array, "batch"]:
    """Binary cross entropy of logits, averaged like the others (`torch.nn.BCEWithLogitsLoss`).

    The log loss of logistic regression.

    Args:
      predictions: logits [batch, ...].
      targets: 0 or 1, or probabilities, of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).
    """
    _check_same_shape(predictions, targets)
    targets = targets.astype(predictions.dtype)
    return _mean_over_example(optax.sigmoid_binary_cross_entropy(predictions, targets))


@dataclasses.dataclass(frozen=True, eq=False)  # compared as functions are, by identity
class WeightedSum:
    """What `weighted_sum` gives, a loss like any other.

    Attributes:
      terms: its (weight, loss) pairs.
    """

    terms: tuple[tuple[float, Loss], ...]

    @property
    def __name__(self) -> str:
        return f"({' + '.join(f'{weight} * {name_of(term)}' for weight, term in self.terms)})"

    def __call__(self, predictions: Array, targets: Array) -> Array:
        """Σ weight · loss of each example, [batch]."""
        return jnp.sum(
            jnp.stack([weight * term(predictions, targets) for weight, term in self.terms]), axis=0
        )


def weighted_sum(*terms: tuple[float, Loss]) -> Loss:
    """The loss Σ weight · loss, L1 + λ L2 for instance: `weighted_sum((1.0, l1), (0.1, l2))`.

    Build it once and pass the same object to every step: a new one compiles anew.

    Args:
      terms: (weight, loss) pairs; a weight may be negative.

    Raises:
      InputError: there are no terms, or a weight is not finite.
    """
    if not terms:
        raise InputError("weighted_sum has no terms; expected (weight, loss) pairs")
    for weight, _ in terms:
        if not isinstance(weight, jax.core.Tracer) and not math.isfinite(weight):
            raise InputError(f"a weight of weighted_sum is {weight}; expected a finite number")
    return WeightedSum(terms)


def name_of(function: Any) -> str:
    """The name of a loss or metric, to be told in a message."""
    return getattr(function, "__name__", "a function")


def single_losses(loss_fn: Loss) -> set[Loss]:
    """The losses that a loss is a weighted sum of, or itself."""
    if not isinstance(loss_fn, WeightedSum):
        return {loss_fn}
    return set().union(*(single_losses(term) for _, term in loss_fn.terms))


# What the values of the targets are checked by before training: the losses that take class labels,
# and those that take probabilities.
LABEL_LOSSES: frozenset[Loss] = frozenset({cross_entropy})
PROBABILITY_LOSSES: frozenset[Loss] = frozenset(
    {soft_cross_entropy, binary_cross_entropy, sigmoid_binary_cross_entropy}
)


def _check_same_shape(predictions: Array, targets: Array) -> None:
    if predictions.shape != targets.shape:
        raise InputError(
            f"predictions have the shape {predictions.shape} and targets {targets.shape}; "
            "expected the same shape, since broadcasting would pair every example with every other"
        )


def _mean_over_example(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _as_vectors(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def _sum_over_example(values: Array) -> Array:
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _norm(vectors: Array) -> Array:
    """Length of each row, with gradient 0 at length 0."""
    squares = jnp.sum(jnp.square(vectors), axis=-1)
    positive = squares > 0
    # Twice where: the branch not taken must be differentiable, too, or its NaN leaks through.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _at_least(values: Array, least: float) -> Array:
    """The larger of both; the gradient is that of `values` throughout, as in PyTorch."""
    return values + lax.stop_gradient(jnp.maximum(values, least) - values)


@jax.custom_jvp
def _clamped_bce(probabilities: Array, targets: Array) -> Array:
    log_p = jnp.maximum(jnp.log(probabilities), -100)
    log_not_p = jnp.maximum(jnp.log1p(-probabilities), -100)
    return -(targets * log_p + (1 - targets) * log_not_p)


@_clamped_bce.defjvp
def _clamped_bce_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    p, t = primals
    by_p = (p - t) / jnp.maximum((1 - p) * p, 1e-12)
    by_t = jnp.maximum(jnp.log1p(-p), -100) - jnp.maximum(jnp.log(p), -100)
    return _clamped_bce(p, t), by_p * tangents[0] + by_t * tangents[1]
