"""Metrics: like losses, one value per example, whose mean over a data set is reported."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

Metric = Callable[[Array, Array], Array]


def accuracy(
    predictions: Float[Array, "batch classes"], targets: Integer[Array, "batch"]
) -> Float[Array, "batch"]:
    """1 where the largest logit is the label's, else 0."""
    return (jnp.argmax(predictions, axis=-1) == targets).astype(jnp.float32)


def confusion_matrix(
    predictions: Float[Array, "examples classes"], targets: Integer[Array, "examples"]
) -> Int[Array, "classes classes"]:
    """How often each label (row) was predicted as each class (column)."""
    classes = predictions.shape[-1]
    pairs = targets.astype(jnp.int32) * classes + jnp.argmax(predictions, axis=-1)
    return jnp.bincount(pairs, length=classes * classes).reshape(classes, classes)
