"""Arguments checked once, on the host, before anything compiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxtrain.data.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.state import TrainState
from jaxtrain.steps import predict_batch


def check_batch_size(value: Any, name: str) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    _check_whole(value, name, least=1)


def check_epochs(value: Any, name: str) -> None:
    """Raise unless `value` is a whole number of at least 0."""
    _check_whole(value, name, least=0)


def check_inputs(inputs: Array, name: str) -> None:
    """Raise unless there is at least one example."""
    if jnp.ndim(inputs) == 0 or len(inputs) == 0:
        raise InputError(
            f"{name} has the shape {jnp.shape(inputs)}; expected at least one example along the "
            "first axis"
        )


def check_labels(state: TrainState, dataset: Dataset, name: str) -> None:
    """Raise if integer targets are labels outside the model's classes.

    JAX clamps an index out of range, so a wrong label would train silently. Skipped where the
    targets are being traced: there is no value to look at.
    """
    targets = dataset.targets
    if isinstance(targets, jax.core.Tracer) or not jnp.issubdtype(targets.dtype, jnp.integer):
        return
    predictions = jax.eval_shape(predict_batch, state, dataset.inputs[:1])
    if predictions.ndim != targets.ndim + 1:
        return
    classes, labels = predictions.shape[-1], np.asarray(targets)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"{name}.targets holds the label {low if low < 0 else high}; expected labels from 0 to "
            f"{classes - 1}, since the model has {classes} outputs"
        )


def _check_whole(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}")
