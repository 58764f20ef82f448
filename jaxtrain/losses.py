"""Losses: one value per example, `loss(predictions, targets) -> [batch]`.

A step takes the mean over the batch. Where PyTorch's loss has a `reduction`, the functions here
are its value for each example, averaged over all axes but the first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax
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


# The losses whose targets are class labels, which are checked against the model's outputs.
LABEL_LOSSES: frozenset[Loss] = frozenset({cross_entropy})


def _check_same_shape(predictions: Array, targets: Array) -> None:
    if predictions.shape != targets.shape:
        raise InputError(
            f"predictions have the shape {predictions.shape} and targets {targets.shape}; "
            "expected the same shape, since broadcasting would pair every example with every other"
        )


def _mean_over_example(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
