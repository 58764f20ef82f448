"""Checks of data and state against model and loss, on the host, before anything compiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxtrain import parallel
from jaxtrain.dataset import Dataset, check_dataset, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.losses import LABEL_LOSSES, PROBABILITY_LOSSES, Loss, single_losses
from jaxtrain.optimizers import has_clipping, has_line_search
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import predict_batch


def checked_data(data: Dataset, name: str, state: TrainState, loss_fn: Loss) -> Dataset:
    """Returns a checked data set on the device, so that it is transferred once, not per epoch."""
    check_dataset(data, name)
    check_values(data, name)
    if data.weights is not None and _has_values(data.weights):
        lowest, highest = np.min(data.weights), np.max(data.weights)
        if lowest < 0 or highest == 0:
            raise InputError(
                f"{name}.weights ranges from {lowest} to {highest}; expected weights of at least "
                "0, and some above 0"
            )
    data = placed(data)
    check_model_inputs(state, data, name)
    check_targets(state, data, loss_fn, name)
    return data


def placed(tree: PyTree) -> PyTree:
    """Returns arrays on the devices: on those of the current mesh, or on JAX's default device."""
    mesh = parallel.current_mesh()
    if mesh is None or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(jnp.asarray, tree)
    return parallel.replicate(tree, mesh)


def check_type(value: Any, name: str, expected: type) -> None:
    """Raises InputError unless an optional argument is None or of a type."""
    if value is not None and not isinstance(value, expected):
        raise InputError(
            f"{name} is {value!r}; expected None or jaxtrain.{expected.__name__}(...)",
            argument=name,
        )


def check_not_traced(*arguments: Any) -> None:
    """Raises InputError if `fit` is called where its arguments have no values."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        raise InputError(
            "fit is called inside a function that JAX traces, such as one under jit or in sweep; "
            "expected arrays with values: call jaxtrain.train, which computes the same"
        )


def check_values(dataset: Dataset, name: str) -> None:
    """Raises InputError unless all values are finite in the dtypes that JAX gives them.

    By default JAX converts 64-bit values to 32 bits: 1e300 would become infinite, and the label
    2³² + 1 would become 1. Arrays whose values are not available are skipped: those that are
    traced or spread over several hosts.
    """
    for path, array in named_arrays(dataset, name):
        dtype = array.dtype
        target = jax.dtypes.canonicalize_dtype(dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
        if not _has_values(array) or not (floating or target != dtype):
            continue
        # With NumPy nothing is compiled, and on a CPU nothing is copied.
        values = np.asarray(array)
        limits = jnp.finfo(target) if floating else jnp.iinfo(target)
        with np.errstate(invalid="ignore"):  # comparing NaN may warn
            # NaN propagates to both. Two passes, but no temporary copy of the data.
            low, high = values.min(), values.max()
            if limits.min <= low and high <= limits.max:
                continue
            wrong = ~((values >= limits.min) & (values <= limits.max))
        position = np.unravel_index(int(np.argmax(wrong)), values.shape)
        index = ", ".join(map(str, position))
        kind = "finite numbers" if floating else "integers"
        raise InputError(
            f"{path} holds {values[position]} at [{index}]; expected {kind} that {target} can "
            "hold: fix or drop such examples"
        )


def checked_state(state: TrainState) -> TrainState:
    """Returns the state without weak types, which would trigger a recompilation in the second step.

    Raises:
      InputError: it is not a TrainState, or a variable of the model is NaN and would stay NaN.
    """
    check_state_type(state)
    # The model state keeps weak types: an `eqx.nn.State` refuses values of another type.
    state = jax.tree.map(_strongly_typed, state).replace(
        model_state=jax.tree.map(jnp.asarray, state.model_state)
    )
    state = placed(state)
    variables = {"params": state.params, "model_state": state.model_state}
    for path, leaf in named_arrays(variables, ""):
        is_float = jnp.issubdtype(leaf.dtype, jnp.inexact)
        if is_float and _has_values(leaf) and np.isnan(np.asarray(leaf)).any():
            raise InputError(
                f"state holds NaN in {path}; expected numbers: start from init_state or from an "
                "earlier state"
            )
    return state


def checked_callback(on_event: Any) -> Any:
    """Returns the callback of `fit`; None becomes one that does nothing."""
    if on_event is None:
        return lambda event: None
    if hasattr(on_event, "__enter__") or not callable(on_event):
        kind = "a context manager" if hasattr(on_event, "__enter__") else repr(on_event)
        raise InputError(
            f"on_event is {kind}; expected a function of one event, such as what "
            "`with jaxtrain.progress() as on_event` yields"
        )
    return on_event


def check_model_inputs(state: TrainState, data: Dataset, name: str) -> None:
    """Raises InputError if the model does not accept the shapes and dtypes of the inputs."""
    try:
        _predictions_shape(state, data)
    except InputError:
        raise
    except Exception as error:  # networks raise different types for a wrong shape
        if str(error).startswith("DataLoader worker"):  # PyTorch raises it from a signal handler
            raise
        shapes = ", ".join(
            f"{path} has {leaf.dtype}{[1, *leaf.shape[1:]]} per example"
            for path, leaf in named_arrays(data.inputs, f"{name}.inputs")
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model does not take the inputs of {name} ({shapes}): {reason}; expected the "
            "shapes and dtypes that init_state was given"
        ) from error


class TargetLimits(NamedTuple):
    """The values that a loss takes as targets.

    Attributes:
      low: the smallest.
      high: the largest.
      is_label: whether they are class labels, else probabilities.
    """

    low: int
    high: int
    is_label: bool


def target_limits(state: TrainState, dataset: Dataset, loss_fn: Loss) -> TargetLimits | None:
    """Returns the targets that the loss takes if it takes labels or probabilities, else None."""
    targets, losses = dataset.targets, single_losses(loss_fn)
    if not isinstance(targets, (np.ndarray, jax.Array)):
        return None
    # Targets of another dtype are refused by the loss itself.
    if losses & LABEL_LOSSES and jnp.issubdtype(targets.dtype, jnp.integer):
        outputs = _predictions_shape(state, dataset)
        if not hasattr(outputs, "shape"):
            return None
        return TargetLimits(0, outputs.shape[-1] - 1, is_label=True)
    return TargetLimits(0, 1, is_label=False) if losses & PROBABILITY_LOSSES else None


def check_targets(state: TrainState, dataset: Dataset, loss_fn: Loss, name: str) -> None:
    """Raises InputError if the loss takes class labels or probabilities and some are not valid.

    JAX clamps an index out of range, so a wrong label would train silently. Examples of weight 0
    may have any label.
    """
    if all(map(_has_values, jax.tree.leaves((dataset.targets, dataset.weights)))):
        check_limits(dataset, target_limits(state, dataset, loss_fn), name)


def check_limits(dataset: Dataset, limits: TargetLimits | None, name: str) -> None:
    """Raises InputError if a target is not within the limits; see `check_targets`."""
    if limits is None:
        return
    values = np.asarray(dataset.targets)
    if dataset.weights is not None and np.shape(dataset.weights) == values.shape:
        values = values[np.asarray(dataset.weights) != 0]
        if not values.size:
            return
    low, high = values.min(), values.max()
    if limits.low <= low and high <= limits.high:
        return
    if limits.is_label:
        raise InputError(
            f"{name}.targets holds the label {low if low < 0 else high}; expected labels from 0 to "
            f"{limits.high}, since the model has {limits.high + 1} outputs"
        )
    if low < 0 or high > 1:  # a NaN is found elsewhere
        raise InputError(
            f"{name}.targets holds the probability {low if low < 0 else high}; expected values "
            "from 0 to 1, since the loss is a cross entropy"
        )


def check_line_search(state: TrainState, examples: int, batch_size: int) -> None:
    """Raises InputError if a line search (L-BFGS) is used with mini-batches or clipping."""
    if not has_line_search(state.opt_state):
        return
    if batch_size < examples:
        raise InputError(
            f"batch_size is {batch_size} of {examples} examples, but the optimizer has a line "
            "search (L-BFGS); expected all examples in one batch, since the search compares losses "
            "of the same function",
            argument="batch_size",
        )
    if has_clipping(state.opt_state):
        raise InputError(
            "the optimizer clips gradients and has a line search (L-BFGS); expected one or the "
            "other, since the search chooses the length of each step"
        )


def _strongly_typed(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) or not array.weak_type:
        return array
    return jax.lax.convert_element_type(array, array.dtype)


def _predictions_shape(state: TrainState, data: Dataset) -> Any:
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), jnp.result_type(leaf)), data.inputs
    )
    return jax.eval_shape(predict_batch, state, one)


def _has_values(array: Any) -> bool:
    if isinstance(array, jax.core.Tracer):  # under jax.jit, `is_fully_addressable` raises
        return False
    return getattr(array, "is_fully_addressable", True) and array.size > 0
