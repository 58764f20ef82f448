"""The interface of all metrics: each batch updates a total, from which the metric is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxtrain._arguments import axis_hint, check_arrays
from jaxtrain._static_key import ByKey
from jaxtrain.dataset import has_weight, shared_inputs
from jaxtrain.errors import InputError
from jaxtrain.losses import WeightedMean, at_least_float32, mean_terms, name_of

AnyArray: TypeAlias = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class AccumulatedMetric:
    """Base class of metrics that are not means over examples, such as R² and the area under ROC.

    Where sums over the batches are enough, a pair of functions (sums, finish) is shorter. For
    anything else, derive a frozen dataclass: equal objects share their compiled programs.

    To compute a metric of arrays, call it: `metric(predictions, targets, weights=None)`.

    Example:
      >>> import dataclasses
      >>> @dataclasses.dataclass(frozen=True)
      ... class LargestError(jt.metrics.AccumulatedMetric):
      ...     def update(self, total, predictions, targets, weights):
      ...         errors = jnp.where(weights > 0, jnp.abs(predictions - targets)[:, 0], 0)
      ...         return jnp.maximum(0 if total is None else total, jnp.max(errors))
      ...
      ...     def finish(self, total):
      ...         return total
      >>> LargestError()(jnp.array([[1.0], [5.0]]), jnp.array([[1.5], [3.0]]))
      Array(2., dtype=float32)
    """

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> PyTree:
        """Returns the total after one more batch.

        Args:
          total: the total of the batches before, a pytree of arrays. For the first batch it is
            None or a total of zeros, and the result must be the same for both.
          predictions: the model's outputs, in float32 at least, and 0 where the weight is 0.
          targets: the targets of the batch, and 0 where the weight is 0.
          weights: floating-point weights, [batch] or [batch, time]: 1 where the data have none.
        """
        raise NotImplementedError

    def finish(self, total: Any) -> Array:
        """Returns the metric, an array of any shape, from the total of all batches."""
        raise NotImplementedError

    def __call__(self, predictions: Any, targets: Any, weights: AnyArray | None = None) -> Array:
        """Returns the metric of arrays.

        Args:
          predictions: the model's outputs, [examples, ...].
          targets: the targets, [examples, ...].
          weights: one per example or per target; None weights all equally.

        Raises:
          InputError: the shapes do not fit, or a target with a weight is not a label, for a metric
            of labels. Under `jax.jit`, where the values are not known, the metric is then NaN.
        """
        self._check(predictions, targets, weights)
        return _value(ByKey(self), predictions, targets, weights)

    def _check(self, predictions: Any, targets: Any, weights: Any) -> None:
        """Raises InputError for targets that the metric does not take, if they have values."""

    def _total_of(self, predictions: Any, targets: Any, weights: Array) -> PyTree:
        """Returns the total of all examples at once."""
        return self.update(None, predictions, targets, weights)

    @property
    def __name__(self) -> str:
        return type(self).__qualname__


@dataclasses.dataclass(frozen=True)
class Mean(AccumulatedMetric):
    """The weighted mean of a function of each example; a loss is one too."""

    function: Callable[..., Array]

    @property
    def __name__(self) -> str:
        return name_of(self.function)

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> PyTree:
        result = per_example(self.function, predictions, targets, jnp.shape(weights))
        sums = mean_totals(result, weights)
        return sums if total is None else jax.tree.map(jnp.add, total, sums)

    def finish(self, total: Any) -> Array:
        return sum_of_means(total)


@dataclasses.dataclass(frozen=True)
class Sums(AccumulatedMetric):
    """A pair of functions (sums, finish)."""

    sums: Callable[[Any, Any, Any], PyTree]
    result: Callable[[Any], Array]

    @property
    def __name__(self) -> str:
        return f"{name_of(self.sums)}+{name_of(self.result)}"

    def update(self, total: Any, predictions: Any, targets: Any, weights: Array) -> PyTree:
        sums = self.sums(predictions, targets, weights)
        return sums if total is None else jax.tree.map(jnp.add, total, sums)

    def finish(self, total: Any) -> Array:
        return self.result(total)


def as_accumulated(metric: Any) -> AccumulatedMetric:
    """Returns a function, a pair of functions or a metric as an `AccumulatedMetric`."""
    if isinstance(metric, AccumulatedMetric):
        return metric
    return Sums(*metric) if isinstance(metric, tuple) else Mean(metric)


@functools.partial(jax.jit, static_argnums=0)
def _value(static: ByKey, predictions: Any, targets: Any, weights: Array | None) -> Array:
    metric: AccumulatedMetric = static.value
    predictions = jax.tree.map(at_least_float32, predictions)
    leaves = jax.tree.leaves((targets, predictions))
    if not leaves or any(not jnp.ndim(leaf) for leaf in leaves):
        raise InputError(
            f"{name_of(metric)} received targets or predictions without an axis of examples; "
            "expected arrays [examples, ...]"
        )
    length = leaves[0].shape[0]
    if weights is None:
        return metric.finish(metric._total_of(predictions, targets, jnp.ones(length)))
    weights = as_weights(weights)
    if weights.shape[:1] != (length,):
        raise InputError(
            f"weights has the shape {weights.shape} for {length} examples; expected one per "
            "example, or one per target"
        )
    predictions, targets = without_ignored((predictions, targets), weights)
    return metric.finish(metric._total_of(predictions, targets, weights))


def as_weights(weights: ArrayLike) -> Array:
    """Returns weights as floating-point numbers; a mask is converted."""
    array = jnp.asarray(weights)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def without_ignored(tree: PyTree, weights: Array) -> PyTree:
    """Returns arrays with 0 in place of values of weight 0, which may be NaN or no label."""

    def hide(leaf: Array) -> Array:
        return jnp.where(has_weight(weights, leaf), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(hide, tree)


def per_example(
    function: Any, predictions: Any, targets: Any, expected: tuple[int, ...]
) -> Array | WeightedMean:
    """Returns `function(predictions, targets)`, checked to have values per example or weight.

    `expected` is the shape of the weights, [batch] without any; the values may have further axes.
    """
    try:
        result = function(predictions, targets)
    except (AttributeError, TypeError, InputError) as error:
        if hasattr(predictions, "shape"):
            raise
        raise InputError(
            f"{name_of(function)} fails on the model's outputs, a {_describe(predictions)} "
            f"({error}); expected a loss or a metric that takes them, or init_state(..., call=) "
            "that returns the array it takes, such as "
            "call=lambda module, inputs, *, train, rngs: module(inputs)[0] of a PyTorch module"
        ) from error
    if not isinstance(result, WeightedMean) and not hasattr(result, "shape"):
        raise InputError(
            f"{name_of(function)} returned a {_describe(result)}; expected an array {expected}, or "
            "jaxtrain.losses.WeightedMean(values, weights)"
        )
    for array in (each for pair in mean_terms(result) for each in pair if each is not None):
        shape = jnp.shape(array)
        if shape[: len(expected)] != expected:
            per = "example" if len(expected) == 1 else "weight"
            hint = "leave the mean over the batch to the step"
            if shape == expected[:1]:
                hint = "one weight per example has the shape [examples], such as weights[:, 0]"
            raise InputError(
                f"{name_of(function)} returned the shape {shape} for a batch of {expected[0]}; "
                f"expected one value per {per}, {expected}: {hint}"
            )
        if len(shape) > len(expected) and shape[1] == shape[0] > 1:
            _check_pairs(function, predictions, targets, shape)
    for values, own in mean_terms(result):
        if own is not None and jnp.shape(own) != jnp.shape(values):
            raise InputError(
                f"{name_of(function)} returned a WeightedMean with values of shape "
                f"{jnp.shape(values)} and weights of shape {jnp.shape(own)}; expected the same"
            )
    return result


def _describe(tree: Any) -> str:
    """Returns the type of a container, and how many arrays it has."""
    return f"{type(tree).__name__} of {len(jax.tree.leaves(tree))} arrays"


def _check_pairs(function: Any, predictions: Any, targets: Any, shape: tuple[int, ...]) -> None:
    """Raises InputError if the second axis is the batch once more, as [n, 1] - [n] has."""

    def first(tree: PyTree) -> PyTree:
        shared = shared_inputs(tree)
        cut = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree)
        return (*cut[: len(cut) - len(shared)], *shared) if shared else cut

    further = getattr(function, "keywords", {})
    inputs = {"inputs": first(further["inputs"])} if "inputs" in further else {}
    try:
        alone = jax.eval_shape(function, first(predictions), first(targets), **inputs)
        is_right = any(jnp.shape(x)[1:] == shape[1:] for x in jax.tree.leaves(alone))
    except Exception:  # whatever a loss raises that is written for one size of the batch
        is_right = False
    if not is_right:
        raise InputError(
            f"{name_of(function)} returned the shape {shape} for a batch of {shape[0]}, and its "
            "second axis is the batch once more; expected values of each example, which may "
            "have further axes: compare predictions and targets of the same shape"
            + axis_hint(*(tuple(getattr(x, "shape", ())) for x in (predictions, targets)))
        )


def mean_totals(result: Array | WeightedMean, weights: Array | None) -> list[tuple[Array, Array]]:
    """Returns (Σ values, Σ weights) for each mean that the result of a loss or metric adds up.

    Args:
      result: what `per_example` returned.
      weights: along the leading axes of the values; None weights all equally.
    """

    def total(values: Array, own: Array | None) -> tuple[Array, Array]:
        # In float32 at least: half precision overflows within a few hundred examples.
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        values = values.astype(dtype)
        if weights is None:
            weight = values.size if own is None else jnp.sum(own, dtype=dtype)
            return vector_sum(values), jnp.asarray(weight, dtype)
        # A weight of 0 also hides a NaN, such as that of a padded label.
        each = _along(weights.astype(dtype), values.shape)
        weight = each if own is None else jnp.where(each == 0, 0, own.astype(dtype)) * each
        return vector_sum(jnp.where(each == 0, 0, values), each), jnp.sum(weight)

    return [total(*pair) for pair in mean_terms(result)]


def sum_of_means(totals: list[tuple[Array, Array]]) -> Array:
    """Returns the sum of the means of `mean_totals`: NaN where nothing has weight."""
    return functools.reduce(jnp.add, [values / weight for values, weight in totals])


def vector_sum(values: Array, weights: Array | None = None) -> Array:
    """Returns the sum of values, or of values times weights, as a dot product.

    XLA:CPU fuses `jnp.sum` with the reshaping of predictions [batch, 1] before it, and then takes
    several times as long under `vmap`.
    """
    weights = jnp.ones_like(values) if weights is None else weights
    return jnp.dot(values.ravel(), weights.ravel(), precision=jax.lax.Precision.HIGHEST)


def label_weights(name: str, predictions: Any, targets: Any, weights: Array) -> Float[Array, "..."]:
    """Returns weights broadcast to the shape of the targets: each label has that of its example.

    Raises InputError unless predictions and targets are arrays, and the weights are along the
    leading axes of the targets.
    """
    check_arrays(predictions=predictions, targets=targets)
    shape = targets.shape
    if weights.shape != shape[: weights.ndim]:
        raise InputError(
            f"the weights of {name} have the shape {weights.shape}; expected one per example or "
            f"per target, along the leading axes of {shape}"
        )
    return _along(weights, shape)


def _along(weights: Array, shape: tuple[int, ...]) -> Array:
    """Returns weights that are along the leading axes of a shape, broadcast to it."""
    if weights.shape == shape:
        return weights
    return jnp.broadcast_to(
        weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)), shape
    )
