"""Arguments checked once, on the host, before anything compiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxtrain.data.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import LABEL_LOSSES, PROBABILITY_LOSSES, Loss, single_losses
from jaxtrain.optimizers import has_clipping, has_line_search
from jaxtrain.state import TrainState
from jaxtrain.steps import predict_batch


def check_whole(value: Any, name: str, least: int, most: int | None = None) -> None:
    """Raise unless `value` is a whole number from `least` to `most`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}{upper}")


def check_key(key: Any, name: str) -> None:
    """Raise unless `key` is a PRNG key."""
    if not isinstance(key, jax.Array):
        raise InputError(f"{name} is {key!r}; expected a PRNG key, jax.random.key(0) for instance")


def check_inputs(inputs: Array, name: str) -> None:
    """Raise unless there is at least one example."""
    if jnp.ndim(inputs) == 0 or len(inputs) == 0:
        raise InputError(
            f"{name} has the shape {jnp.shape(inputs)}; expected at least one example along the "
            "first axis"
        )


def check_values(dataset: Dataset, name: str) -> None:
    """Raise unless inputs and targets are real numbers, finite also in the types JAX gives them.

    (It makes 32 bits of 64, unless told otherwise: 1e300 would become infinite, the label 2³² + 1
    the label 1.) Skipped where there is no value to look at: while they are traced, or spread over
    several hosts.
    """
    for field, array in zip(dataset._fields, dataset, strict=True):
        dtype = array.dtype
        real = (jnp.bool_, jnp.integer, jnp.floating)
        if not any(jnp.issubdtype(dtype, kind) for kind in real):
            raise InputError(f"{name}.{field} has the element type {dtype}; expected real numbers")
        to_come = jax.dtypes.canonicalize_dtype(dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
        if (
            isinstance(array, jax.core.Tracer)
            or not (floating or to_come != dtype)
            or not getattr(array, "is_fully_addressable", True)
            or not array.size
        ):
            continue
        # By NumPy: nothing is to compile, and on a CPU nothing is copied.
        values = np.asarray(array)
        limits = jnp.finfo(to_come) if floating else jnp.iinfo(to_come)
        with np.errstate(invalid="ignore"):  # NaN is what is looked for
            # Where there is a NaN it is both; two passes without a copy of the data's size.
            low, high = values.min(), values.max()
            if limits.min <= low and high <= limits.max:
                continue
            wrong = ~((values >= limits.min) & (values <= limits.max))
        position = np.unravel_index(int(np.argmax(wrong)), values.shape)
        place = ", ".join(map(str, position))
        kind = "finite numbers" if floating else "whole numbers"
        raise InputError(
            f"{name}.{field} holds {values[position]} at [{place}]; expected {kind} that {to_come} "
            "can hold: mend or leave out such examples"
        )


def check_state(state: TrainState) -> None:
    """Raise if a parameter or another of the model's variables is NaN.

    It would stay one, whatever the training does.
    """
    variables = {"params": state.params, **state.model_state}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if getattr(leaf, "is_fully_addressable", True) and np.isnan(np.asarray(leaf)).any():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(
                f"state holds NaN in {name}; expected numbers: take another start, init_state's or "
                "an earlier one"
            )


def check_targets(state: TrainState, dataset: Dataset, loss_fn: Loss, name: str) -> None:
    """Raise if the loss, or a term of it, takes class labels or probabilities and some are none.

    JAX clamps an index out of range, so a wrong label would train silently. Skipped where the
    targets have no value to look at: while they are traced, or spread over several hosts.
    """
    targets = dataset.targets
    losses = single_losses(loss_fn)
    integers = jnp.issubdtype(targets.dtype, jnp.integer)  # other labels the loss itself refuses
    labels = bool(losses & LABEL_LOSSES) and integers
    if (
        not (labels or losses & PROBABILITY_LOSSES)
        or isinstance(targets, jax.core.Tracer)
        or not getattr(targets, "is_fully_addressable", True)
        or not targets.size
    ):
        return
    values = np.asarray(targets)
    low, high = values.min(), values.max()
    if labels:
        inputs = dataset.inputs
        one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
        classes = jax.eval_shape(predict_batch, state, one).shape[-1]
        if low < 0 or high >= classes:
            raise InputError(
                f"{name}.targets holds the label {low if low < 0 else high}; expected labels from "
                f"0 to {classes - 1}, since the model has {classes} outputs"
            )
    elif low < 0 or high > 1:
        raise InputError(
            f"{name}.targets holds the probability {low if low < 0 else high}; expected values "
            "from 0 to 1, since the loss is a cross entropy"
        )


def check_line_search(state: TrainState, examples: int, batch_size: int) -> None:
    """Raise if an optimizer with a line search, L-BFGS for one, meets mini-batches or clipping."""
    if not has_line_search(state.opt_state):
        return
    if batch_size < examples:
        raise InputError(
            f"batch_size is {batch_size} of {examples} examples, but the optimizer has a line "
            "search (L-BFGS); expected all examples in one batch, since it compares losses, which "
            "a change of batch would change, too"
        )
    if has_clipping(state.opt_state):
        raise InputError(
            "max_gradient_norm is given, but the optimizer has a line search (L-BFGS); expected "
            "none, since the search finds the length of each step"
        )
