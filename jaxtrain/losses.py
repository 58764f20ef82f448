"""Losses: one value per example, `loss(predictions, targets) -> [batch]`.

A step minimizes the (weighted) mean over the batch. Where a loss of PyTorch has a `reduction`,
the functions here return its value for each example, averaged over all axes but the first. A loss
that weights the examples itself, such as one with class weights, returns a `WeightedMean`. A loss
with further parameters named `params`, `model_state`, `inputs` or `key` receives these by name; see
`Loss`.

Half-precision predictions are promoted, so that values and reductions are float32.

Before training, labels are checked to be in range and probabilities to be in 0 … 1. A loss of
your own keeps these checks if it is a `weighted_sum` or a `functools.partial` of a loss in this
module, or a wrapper made with `functools.wraps` that passes the targets on unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias, no_type_check, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxtrain._arguments import axis_hint, check_arrays, check_number, describe
from jaxtrain.errors import InputError

AnyArray: TypeAlias = Array | np.ndarray


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WeightedMean:
    """A loss, returned in place of an array [batch], whose mean is Σ values / Σ weights.

    `cross_entropy` with class weights and `ignore_nan` return it. It may be added to other losses
    and multiplied by numbers, as arrays may. The mean of a sum is the sum of the means, as in
    PyTorch.

    Attributes:
      values: for each example the loss times its weight, [batch] or [batch, time].
      weights: the weight of each example, of the same shape.
      added: the losses that were added.

    Example:
      >>> def loss_fn(predictions, targets):  # the mean over the examples with positive targets
      ...     errors = jt.losses.mean_absolute_error(predictions, targets)
      ...     is_positive = targets[:, 0] > 0
      ...     return jt.losses.WeightedMean(jnp.where(is_positive, errors, 0), is_positive)
      >>> data = jt.data.points_on_line()
      >>> state = jt.init_state(nn.Dense(1), optimizer, data.inputs, key=key)
      >>> state, losses = jt.train_epoch(state, data, loss_fn)
    """

    values: Array
    weights: Array
    added: tuple[Any, ...] = ()

    __array_ufunc__ = None  # so that NumPy's numbers leave the operation to this class

    def __add__(self, other: Any) -> WeightedMean:
        return dataclasses.replace(self, added=(*self.added, other))

    def __radd__(self, other: Any) -> WeightedMean:
        is_zero = isinstance(other, int) and other == 0  # where `sum` starts
        return self if is_zero else self + other

    def __mul__(self, factor: Any) -> WeightedMean:
        added = tuple(factor * each for each in self.added)
        return WeightedMean(factor * self.values, self.weights, added)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> WeightedMean:
        return self * (1 / divisor)

    def __neg__(self) -> WeightedMean:
        return self * -1.0

    def __sub__(self, other: Any) -> WeightedMean:
        return self + -1.0 * other

    def __rsub__(self, other: Any) -> WeightedMean:
        return -self + other


def mean_terms(loss: Any) -> list[tuple[Any, Any]]:
    """Returns the pairs (values, weights) whose means a loss adds up.

    The weights are None for an array, whose entries count once each.
    """
    if not isinstance(loss, WeightedMean):
        return [(loss, None)]
    return [(loss.values, loss.weights), *(pair for x in loss.added for pair in mean_terms(x))]


Loss: TypeAlias = Callable[..., Any]
"""A function `loss(predictions, targets) -> [batch]`, with one value per example.

More values per example, such as one per token, [batch, time], count once each: the mean is over
all of them. A `WeightedMean` is also accepted. Predictions and targets may be pytrees.

Wherever a loss is used, it receives these further parameters by name, if it has them:

- `params`: the parameters, in evaluation those that are evaluated. The gradient includes them.
- `model_state`: the model state after the batch.
- `inputs`: those of the batch, as the model sees them.
- `key`: a PRNG key of the batch; `evaluate` then needs one.

A metric that is a function of each example receives them as well.
"""

_CONTEXT = ("params", "model_state", "inputs", "key")


def context_parameters(loss_fn: Loss) -> tuple[str, ...]:
    """Returns which further parameters of a `Loss` a function has, from its signature.

    Raises:
      InputError: it requires yet another one, or does not take predictions and targets.
    """
    inner = inspect.unwrap(loss_fn)  # of functools.wraps and jax.jit
    if isinstance(inner, WeightedSum):
        found = {name for _, term in inner.terms for name in context_parameters(term)}
        return tuple(name for name in _CONTEXT if name in found)
    try:
        parameters = list(inspect.signature(inner).parameters.values())
    except ValueError:  # such as a function in C
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first_two = [x.name for x in parameters if x.kind in positional][:2]
    if len(first_two) < 2 and not any(x.kind is x.VAR_POSITIONAL for x in parameters):
        raise InputError(
            f"{name_of(loss_fn)} takes {len(first_two)} positional arguments; expected "
            "loss(predictions, targets), whose targets are None where the data have none",
            argument="loss_fn",
        )
    given = inner.keywords if isinstance(inner, functools.partial) else ()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = {
        x.name: x.default is inspect.Parameter.empty
        for x in parameters
        if x.kind not in variable and x.name not in (*first_two, *given)
    }
    for name, is_required in others.items():
        if is_required and name not in _CONTEXT:
            raise InputError(
                f"{name_of(loss_fn)} requires the argument {name!r} besides predictions and "
                f"targets; expected any of {', '.join(_CONTEXT)}, which it receives by "
                "name: set others by functools.partial",
                argument="loss_fn",
            )
    names = tuple(name for name in _CONTEXT if name in others)
    if inner is not loss_fn and not _passes_on(loss_fn, names):
        raise InputError(
            f"{name_of(loss_fn)} wraps a function that receives {', '.join(names)}, and does not "
            "take them; expected **context among its own parameters, which it passes on",
            argument="loss_fn",
        )
    return names


def _passes_on(wrapper: Any, names: tuple[str, ...]) -> bool:
    """Returns whether a wrapper of functools.wraps takes arguments of these names."""
    try:
        parameters = inspect.signature(wrapper, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # a jitted function may have none
        return True
    takes_all = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    return takes_all or set(names) <= set(parameters)


def mean_absolute_error(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns |prediction − target|, averaged over all axes but the first (`torch.nn.L1Loss`).

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
      >>> jt.losses.mean_absolute_error(predictions, targets)  # (1 + 2) / 2
      Array([1.5], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    error = predictions - targets
    # Not jnp.abs: its gradient at 0 is 1 in JAX, 0 in PyTorch.
    return _mean_over_example(error * jnp.sign(error))


def mean_squared_error(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns (prediction − target)², averaged over all axes but the first (`torch.nn.MSELoss`).

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
      >>> jt.losses.mean_squared_error(predictions, targets)  # (1 + 4) / 2
      Array([2.5], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    return _mean_over_example(jnp.square(predictions - targets))


def squared_error_sum(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns (prediction − target)², summed over all axes but the first.

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
      >>> jt.losses.squared_error_sum(predictions, targets)  # 1 + 4
      Array([5.], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    return _sum_over_example(jnp.square(predictions - targets))


def euclidean_distance(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns ‖prediction − target‖₂, each example as one vector (`torch.linalg.vector_norm`).

    The gradient at distance 0 is 0; differentiating the formula gives NaN there.

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> jt.losses.euclidean_distance(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0]]))
      Array([5.], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    return _norm(_as_vectors(predictions - targets))


def huber(
    predictions: Float[AnyArray, "batch ..."],
    targets: Shaped[AnyArray, "..."],
    *,
    delta: float = 1.0,
) -> Float[Array, "batch"]:
    """Returns the Huber loss, averaged over all axes but the first (`torch.nn.HuberLoss`).

    error² / 2 where |error| ≤ delta, and delta (|error| − delta / 2) beyond (Huber, 1964,
    https://doi.org/10.1214/aoms/1177703732).

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.
      delta: the error at which the parabola becomes a line, above 0.

    Raises:
      InputError: the shapes differ (they would broadcast), or delta is not positive.

    Example:
      >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
      >>> jt.losses.huber(predictions, targets)  # (0.5 + 1.5) / 2
      Array([1.], dtype=float32)
      >>> loss_fn = functools.partial(jt.losses.huber, delta=0.5)
    """
    check_number("delta", delta, lambda number: number > 0, "a number above 0")
    predictions, targets = _check_and_promote(predictions, targets)
    error = predictions - targets
    size = error * jnp.sign(error)
    is_small = size <= delta
    return _mean_over_example(
        jnp.where(is_small, 0.5 * jnp.square(error), delta * (size - 0.5 * delta))
    )


def smooth_l1(
    predictions: Float[AnyArray, "batch ..."],
    targets: Shaped[AnyArray, "..."],
    *,
    beta: float = 1.0,
) -> Float[Array, "batch"]:
    """Returns the Huber loss divided by beta, averaged over all axes but the first.

    Same as `torch.nn.SmoothL1Loss`: error² / (2 beta) where |error| < beta, and |error| − beta / 2
    beyond. With beta = 0 it is the mean absolute error.

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.
      beta: the error at which the parabola becomes a line, at least 0.

    Raises:
      InputError: the shapes differ (they would broadcast), or beta is negative.

    Example:
      >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])
      >>> jt.losses.smooth_l1(predictions, targets, beta=0.5)  # (0.75 + 1.75) / 2
      Array([1.25], dtype=float32)
      >>> loss_fn = functools.partial(jt.losses.smooth_l1, beta=0.5)
    """
    check_number("beta", beta, lambda number: number >= 0, "a number of at least 0")
    if beta == 0:
        return mean_absolute_error(predictions, targets)
    return huber(predictions, targets, delta=beta) / beta


def cosine_distance(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns 1 − cos of the angle between prediction and target (1 − `torch.cosine_similarity`).

    0 for the same direction, 1 for a right angle, 2 for opposite directions. As in PyTorch, norms
    below 1e-8 are replaced by 1e-8.

    Args:
      predictions: [batch, ...].
      targets: an array of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> predictions = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> jt.losses.cosine_distance(predictions, jnp.array([[0.0, 2.0], [-1.0, 0.0]]))
      Array([1., 2.], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    pair = _as_vectors(predictions), _as_vectors(targets).astype(predictions.dtype)
    directions = [vector / _at_least(_norm(vector), 1e-8)[..., None] for vector in pair]
    return 1 - jnp.sum(directions[0] * directions[1], axis=-1)


@overload
def cross_entropy(
    predictions: AnyArray, targets: AnyArray, *, label_smoothing: float = 0.0, weight: None = None
) -> Array: ...


@overload
def cross_entropy(
    predictions: AnyArray, targets: AnyArray, *, label_smoothing: float = 0.0, weight: AnyArray
) -> WeightedMean: ...


def cross_entropy(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Shaped[AnyArray, "..."],
    *,
    label_smoothing: float = 0.0,
    weight: Float[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"] | WeightedMean:
    """Returns −log softmax(logits)[label] (`torch.nn.CrossEntropyLoss`).

    Args:
      predictions: logits [batch, classes], or [batch, time, classes] for a label per token.
      targets: integer labels in 0 … classes − 1, [batch] or [batch, time]. A label out of range
        gives NaN; JAX's indexing would clamp it to the nearest class.
      label_smoothing: the fraction of each target that is spread evenly over all classes, 0 … 1
        (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567).
      weight: a weight for each class, by which the terms of the loss are multiplied, those of the
        smoothing by the weights of their own classes. As in PyTorch, the mean over a batch is the
        sum of the losses divided by the sum of the labels' weights.

    Returns:
      One loss per label; with `weight`, a `WeightedMean`.

    Raises:
      InputError: labels are not integers, there is not one label per row of logits, or an option
        is out of range.

    Example:
      >>> jt.losses.cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # log 2
      Array([0.693...], dtype=float32)
      >>> loss_fn = functools.partial(
      ...     jt.losses.cross_entropy, label_smoothing=0.1, weight=jnp.linspace(1.0, 3.0, 10)
      ... )
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
    """
    check_arrays(predictions=predictions, targets=targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise InputError(
            f"targets of cross_entropy have the dtype {targets.dtype}; expected integer class "
            "labels: "
            + (
                "soft_cross_entropy takes a probability for each class"
                if targets.shape == predictions.shape
                else "convert them with targets.astype(int)"
            )
        )
    if not predictions.ndim or targets.shape != predictions.shape[:-1]:
        raise InputError(
            f"targets of cross_entropy have the shape {targets.shape}; expected one label per row "
            f"of the logits, {predictions.shape[:-1]}"
            + axis_hint(predictions.shape[:-1], targets.shape)
        )
    classes = predictions.shape[-1]
    _check_options(label_smoothing, weight, classes)
    # Narrow labels would wrap in the comparison: 256 is 0 as uint8.
    targets = targets.astype(jnp.int32)
    logits = at_least_float32(predictions)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if weight is not None:
        weight = jnp.asarray(weight, logits.dtype)
        loss = loss * weight[targets]
    if label_smoothing:
        smooth = jnp.mean(_weighted_by_class(-jax.nn.log_softmax(logits), weight), axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    loss = jnp.where((targets >= 0) & (targets < classes), loss, jnp.nan)
    return loss if weight is None else WeightedMean(loss, weight[targets])


def soft_cross_entropy(
    predictions: Float[AnyArray, "*batch classes"],
    targets: Float[AnyArray, "..."],
    *,
    label_smoothing: float = 0.0,
    weight: Float[AnyArray, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Returns −Σ p log softmax(logits) for a target distribution p (`torch.nn.CrossEntropyLoss`).

    Args:
      predictions: logits [batch, classes], or [batch, time, classes].
      targets: probabilities of the same shape; each row sums to 1 (not checked).
      label_smoothing: as in `cross_entropy`.
      weight: a weight for each class, by which its term is multiplied. As in PyTorch, the mean over
        a batch still divides by the number of examples, unlike that of `cross_entropy`.

    Raises:
      InputError: the shapes differ, or an option is out of range.

    Example:
      >>> jt.losses.soft_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[0.1, 0.9]]))  # log 2
      Array([0.693...], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    if not predictions.ndim:
        raise InputError("predictions is a scalar; expected logits of classes along the last axis")
    classes = predictions.shape[-1]
    _check_options(label_smoothing, weight, classes)
    if label_smoothing:
        targets = (1 - label_smoothing) * targets + label_smoothing / classes
    return optax.softmax_cross_entropy(predictions, _weighted_by_class(targets, weight))


def _check_options(label_smoothing: float, weight: AnyArray | None, classes: int) -> None:
    check_number("label_smoothing", label_smoothing, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    if weight is not None:
        check_arrays(weight=weight)
        if weight.shape != (classes,):
            raise InputError(
                f"weight has the shape {weight.shape}; expected one number per class, ({classes},)",
                argument="weight",
            )


def _weighted_by_class(values: Array, weight: AnyArray | None) -> Array:
    """Returns values [..., classes] times the weights of their classes."""
    if weight is None:
        return values
    return values * jnp.broadcast_to(jnp.asarray(weight, values.dtype), values.shape)


def binary_cross_entropy(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns −(t log p + (1 − t) log(1 − p)), averaged over all axes but the first.

    As in `torch.nn.BCELoss`, logarithms are clamped to at least −100, and the denominator of the
    gradient (p − t) / (p (1 − p)) to at least 1e-12, so that both stay finite at p = 0 and p = 1.

    Args:
      predictions: probabilities [batch, ...]; for logits use `sigmoid_binary_cross_entropy`.
      targets: 0 or 1, or probabilities, of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> jt.losses.binary_cross_entropy(jnp.array([[0.5]]), jnp.array([[1]]))  # log 2
      Array([0.693...], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    return _mean_over_example(_clamped_bce(predictions, targets.astype(predictions.dtype)))


def sigmoid_binary_cross_entropy(
    predictions: Float[AnyArray, "batch ..."], targets: Shaped[AnyArray, "..."]
) -> Float[Array, "batch"]:
    """Returns the binary cross entropy of logits, averaged over all axes but the first.

    Same as `torch.nn.BCEWithLogitsLoss`.

    Args:
      predictions: logits [batch, ...].
      targets: 0 or 1, or probabilities, of the same shape.

    Raises:
      InputError: the shapes differ (they would broadcast).

    Example:
      >>> jt.losses.sigmoid_binary_cross_entropy(jnp.array([[0.0]]), jnp.array([[1]]))  # log 2
      Array([0.693...], dtype=float32)
    """
    predictions, targets = _check_and_promote(predictions, targets)
    targets = targets.astype(predictions.dtype)
    return _mean_over_example(optax.sigmoid_binary_cross_entropy(predictions, targets))


@dataclasses.dataclass(frozen=True, eq=False)  # compared as functions are, by identity
class WeightedSum:
    """The loss that `weighted_sum` returns.

    Attributes:
      terms: its (weight, loss) pairs.
    """

    terms: tuple[tuple[float, Loss], ...]

    @property
    def __name__(self) -> str:
        return f"({' + '.join(f'{weight} * {name_of(term)}' for weight, term in self.terms)})"

    def __call__(
        self, predictions: AnyArray, targets: AnyArray, **further: Any
    ) -> Array | WeightedMean:
        """Returns Σ weight · loss for each example, [batch], or a `WeightedMean`."""
        terms = []
        for weight, term in self.terms:
            own = {name: further[name] for name in context_parameters(term) if name in further}
            terms.append(weight * term(predictions, targets, **own))
        if any(isinstance(term, WeightedMean) for term in terms):
            return functools.reduce(operator.add, terms)
        return jnp.sum(jnp.stack(terms), axis=0)


def weighted_sum(*terms: tuple[float, Loss]) -> Loss:
    """Returns the loss Σ weight · loss, such as `weighted_sum((1.0, l1), (0.1, l2))`.

    Build it once and pass the same object to every step: a new one triggers a recompilation.

    Args:
      terms: (weight, loss) pairs; a weight may be negative.

    Raises:
      InputError: there are no terms, or a weight is not finite.

    Example:
      >>> loss_fn = jt.losses.weighted_sum(
      ...     (1.0, jt.losses.mean_squared_error), (0.1, jt.losses.mean_absolute_error)
      ... )
      >>> loss_fn(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]]))  # 2.5 + 0.1 · 1.5
      Array([2.65], dtype=float32)
    """
    if not terms:
        raise InputError("weighted_sum has no terms; expected (weight, loss) pairs")
    for term in terms:
        if not isinstance(term, tuple) or len(term) != 2 or not callable(term[1]):
            raise InputError(
                f"a term of weighted_sum is {describe(term)}; expected a pair (weight, loss)"
            )
        if not isinstance(term[0], jax.core.Tracer):
            check_number("a weight of weighted_sum", term[0], math.isfinite, "a finite number")
    return WeightedSum(terms)


def ignore_nan(loss_fn: Loss) -> Loss:
    """Returns a loss that leaves out the outputs whose target is NaN, that is, missing.

    The loss is applied to each output on its own, and averaged over the outputs of a batch that
    have a target: `loss(prediction[mask], target[mask]).mean()` in PyTorch. An example without any
    target does not count. As a metric, it is the mean over the outputs that have a target. Build it
    once and pass the same object to every step.

    Args:
      loss_fn: a loss that is averaged over the outputs, such as `mean_squared_error`,
        `sigmoid_binary_cross_entropy`, or a `weighted_sum` of them.

    Raises:
      InputError: the loss is one of those that compare examples as a whole.

    Example:
      >>> loss_fn = jt.losses.ignore_nan(jt.losses.mean_absolute_error)
      >>> targets = jnp.array([[0.0, jnp.nan], [6.0, 6.0]])
      >>> loss = loss_fn(jnp.array([[1.0, 2.0], [3.0, 4.0]]), targets)
      >>> loss.values.sum() / loss.weights.sum()  # (1 + 3 + 2) / 3
      Array(2., dtype=float32)
    """
    if not callable(loss_fn):
        raise InputError(f"loss_fn is {describe(loss_fn)}; expected a loss", argument="loss_fn")
    if whole := single_losses(loss_fn) & WHOLE_EXAMPLE_LOSSES:
        raise InputError(
            f"loss_fn is {name_of(min(whole, key=name_of))}, which compares examples as a whole; "
            "expected a loss that is averaged over the outputs, such as mean_squared_error",
            argument="loss_fn",
        )

    @functools.wraps(loss_fn)
    def masked(predictions: AnyArray, targets: AnyArray, **further: Any) -> WeightedMean:
        predictions, targets = _check_and_promote(predictions, targets)
        is_present = ~jnp.isnan(targets)
        # 1 is a valid target of every loss, so that the gradients of both branches are finite.
        filled = jnp.where(is_present, targets, 1)
        values: Any = loss_fn(predictions.reshape(-1, 1), filled.reshape(-1, 1), **further)
        if jnp.shape(values) != (targets.size,):
            raise InputError(
                f"{name_of(loss_fn)} returned the shape {jnp.shape(values)} for {targets.size} "
                f"outputs, each as an example of its own; expected {(targets.size,)}",
                argument="loss_fn",
            )
        values = values.reshape(targets.shape)
        return WeightedMean(
            _sum_over_example(jnp.where(is_present, values, 0)),
            _sum_over_example(is_present.astype(values.dtype)),
        )

    return masked


def name_of(function: Any) -> str:
    """Returns the name of a loss or metric for messages."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", "a function")


def single_losses(loss_fn: Loss) -> set[Loss]:
    """Returns a loss, the losses that it wraps, and the terms of weighted sums."""
    if isinstance(loss_fn, WeightedSum):
        return set().union(*(single_losses(term) for _, term in loss_fn.terms))
    if isinstance(loss_fn, functools.partial):
        return {loss_fn} | single_losses(loss_fn.func)
    wrapped = getattr(loss_fn, "__wrapped__", None)  # of functools.wraps and jax.jit
    return {loss_fn} if wrapped is None else {loss_fn} | single_losses(wrapped)


# Losses whose targets are checked before training: class labels, and probabilities.
LABEL_LOSSES: frozenset[Loss] = frozenset({cross_entropy})
PROBABILITY_LOSSES: frozenset[Loss] = frozenset(
    {soft_cross_entropy, binary_cross_entropy, sigmoid_binary_cross_entropy}
)

# Losses that are not the mean of a loss of each output.
WHOLE_EXAMPLE_LOSSES: frozenset[Loss] = frozenset(
    {cross_entropy, soft_cross_entropy, cosine_distance, euclidean_distance, squared_error_sum}
)


def _check_and_promote(predictions: AnyArray, targets: AnyArray) -> tuple[Array, Array]:
    """Checks that the shapes are equal, and promotes half precision."""
    check_arrays(predictions=predictions, targets=targets)
    if predictions.shape != targets.shape:
        raise InputError(
            f"predictions have the shape {predictions.shape} and targets {targets.shape}; "
            "expected the same shape, since broadcasting would pair each example with all others"
            + axis_hint(predictions.shape, targets.shape)
        )
    return at_least_float32(predictions), at_least_float32(targets)


def at_least_float32(values: AnyArray) -> Array:
    """Promotes narrower floating dtypes, such as bfloat16 and float8, to float32."""
    narrow = jnp.issubdtype(values.dtype, jnp.floating) and jnp.finfo(values.dtype).bits < 32
    return jnp.asarray(values, jnp.float32 if narrow else values.dtype)


def _mean_over_example(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _as_vectors(values: Array) -> Array:
    return values.reshape(*values.shape[:1], -1)


def _sum_over_example(values: Array) -> Array:
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def _norm(vectors: Array) -> Array:
    """Returns the length of each row, with gradient 0 at length 0; NaN stays NaN."""
    squares = jnp.sum(jnp.square(vectors), axis=-1)
    is_zero = squares == 0
    # Two wheres: the branch not taken must be differentiable as well, or its NaN leaks through.
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))


def _at_least(values: Array, least: float) -> Array:
    """Returns the elementwise maximum; the gradient is always that of `values`, as in PyTorch."""
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
