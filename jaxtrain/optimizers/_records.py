"""Numbers that an optimizer records in its state, each of which is a column of the history."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._transforms import global_norm

INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_Plateau = optax.contrib.ReduceLROnPlateauState
LINE_SEARCHES = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """A number, or an array of numbers, that an optimizer's state reports under a name.

    A gradient transformation of your own can keep one anywhere in its state: it is found in
    chained, wrapped and nested states. A record never influences training: `skip_nonfinite` does
    not skip a step because a record becomes NaN.

    Attributes:
      name: name of the column; other columns, such as "train_loss", have other names.
      value: an array, whose shape and dtype are the same after each update.
      counts: whether it is a counter, of which a history reports the increase within each epoch.

    Example:
      >>> def record_largest_gradient():
      ...     def init(params):
      ...         return jt.optimizers.Record("largest_gradient", jnp.zeros(()))
      ...     def update(grads, state, params=None):
      ...         largest = optax.tree_utils.tree_norm(grads, ord=jnp.inf)
      ...         return grads, jt.optimizers.Record("largest_gradient", largest)
      ...     return optax.GradientTransformation(init, update)
      >>> optimizer = optax.chain(record_largest_gradient(), optax.adam(1e-3))
      >>> opt_state = optimizer.init(jnp.zeros(2))
      >>> updates, opt_state = optimizer.update(jnp.array([0.5, -2.0]), opt_state)
      >>> jt.optimizers.records(opt_state)["largest_gradient"].value
      Array(2., dtype=float32)
    """

    name: str = dataclasses.field(metadata={"static": True})
    value: Array
    counts: bool = dataclasses.field(default=False, metadata={"static": True})


def records(opt_state: PyTree) -> dict[str, Record]:
    """Returns what an optimizer's state records, by name.

    Args:
      opt_state: `state.opt_state`.

    Returns:
      `skipped_steps`, with `skip_nonfinite`; `learning_rate`, that of the latest update, if it is
      known; then each other `Record` in the order of the state. Of several records of one name, as
      those of `optax.multi_transform`, the value is the largest, or NaN if one is NaN.

      The optimizers of this package and `optax.inject_hyperparams` keep their learning rate, except
      Rprop, which has a step size per parameter, and L-BFGS, which searches along each direction. A
      scale that `optax.contrib.reduce_on_plateau` applies after the optimizer is included. The rate
      is unknown if there are several, or if another transformation follows that may scale updates.

    Example:
      >>> optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.sgd(0.5))
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> bad_batch = batch.replace(inputs=batch.inputs * jnp.nan)
      >>> state, metrics = jt.train_step(state, bad_batch, loss_fn)
      >>> for name, record in jt.optimizers.records(state.opt_state).items():
      ...     print(name, record.value)
      skipped_steps 1
      learning_rate 0.5
    """
    found: dict[str, Record] = {}
    for record in find_nodes(opt_state, Record):
        first = found.get(record.name)
        found[record.name] = record if first is None else _largest(first, record)
    explicit = "learning_rate" in found  # a Record of a user's own transformation
    rates = _rates(opt_state, explicit)
    found.pop("learning_rate", None)
    if len(rates) == 1 and rates[0] is not None:
        found["learning_rate"] = Record("learning_rate", rates[0])
    leading = [name for name in ("skipped_steps", "learning_rate") if name in found]
    return {name: found[name] for name in dict.fromkeys([*leading, *found])}


class GradientNormState(NamedTuple):
    """State of `record_gradient_norm`.

    Attributes:
      inner: state of the wrapped optimizer.
      gradient_norm: the norm of the latest gradient; 0 before the first.
    """

    inner: PyTree
    gradient_norm: Record


def record_gradient_norm(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that also records the Euclidean norm of each gradient.

    The norm is over all parameters together, as PyTorch's `clip_grad_norm_` returns it, and is
    recorded as "gradient_norm". It does not change the training.

    It is the norm of the gradient that this wrapper receives. As the outermost wrapper, it records
    the gradient of each batch before clipping, also if it is NaN and the step is skipped. Inside
    `accumulate_gradients`, it records the mean gradient of each update; inside `skip_nonfinite`,
    the gradient of the latest step that was not skipped.

    Args:
      optimizer: any optax transformation.

    Example:
      >>> optimizer = jt.optimizers.clip_gradients(jt.optimizers.sgd(0.1), 1.0)
      >>> optimizer = jt.optimizers.record_gradient_norm(optimizer)
      >>> params = jnp.zeros(2)
      >>> updates, opt_state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(params))
      >>> jt.optimizers.records(opt_state)["gradient_norm"].value
      Array(5., dtype=float32)
    """
    inner = accepting_extra_args(optimizer)

    def init(params: PyTree) -> GradientNormState:
        dtype = jax.eval_shape(global_norm, params).dtype
        norm = Record("gradient_norm", jnp.zeros((), dtype))
        return GradientNormState(inner.init(params), norm)

    def update(
        updates: PyTree, state: GradientNormState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, GradientNormState]:
        # Of the parameters' dtype even if the gradients are wider: the state of a loop keeps its.
        norm = global_norm(updates).astype(state.gradient_norm.value.dtype)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, GradientNormState(inner_state, Record("gradient_norm", norm))

    return optax.GradientTransformationExtraArgs(init, update)


def find_nodes(tree: PyTree, *kinds: type) -> list[Any]:
    """Returns the nodes of a pytree that are instances of `kinds`, without those inside others."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def children(node: PyTree) -> list[Any]:
    """Returns the nodes directly inside a node of a pytree; [] for a leaf."""
    found = jax.tree.leaves(node, is_leaf=lambda each: each is not node)
    return [each for each in found if each is not node]


def is_chain(node: Any) -> bool:
    """Returns whether a node is the state of `optax.chain` or `optax.named_chain`."""
    return type(node) in (tuple, collections.OrderedDict)


def is_transformation(node: Any) -> bool:
    """Returns whether a node is the state of a transformation of optax, rather than an array."""
    return isinstance(node, tuple)


def injected_rate(node: Any) -> Array | None:
    """Returns the learning rate in a state of `optax.inject_hyperparams`, or None."""
    return node.hyperparams.get("learning_rate") if isinstance(node, INJECTED) else None


def _largest(first: Record, second: Record) -> Record:
    value = jnp.maximum(first.value, second.value)
    return Record(first.name, value, first.counts or second.counts)


def _rates(node: Any, explicit: bool) -> list[Array | None]:
    """Returns each learning rate in a state, with None in place of one that is unknown.

    With `explicit`, a rate is a `Record` of that name; otherwise, that of `inject_hyperparams`.
    """
    if isinstance(node, Record):
        return [node.value] if explicit and node.name == "learning_rate" else []
    if not explicit and injected_rate(node) is not None:
        return [injected_rate(node)]
    if isinstance(node, (*LINE_SEARCHES, _Plateau)):
        return [None]  # the length of a step, or a scale of gradients
    found: list[Array | None] = []
    if isinstance(node, optax.transforms.PartitionState):
        parts = [part.inner_state for part in node.inner_states.values()]
        found = [rate for part in parts for rate in _rates(part, explicit)]
        moving = sum(part != optax.EmptyState() for part in parts)  # not optax.set_to_zero
        return [*found, None] if moving > len(found) else found
    for child in children(node):
        follows = bool(found) and is_chain(node)
        if follows and isinstance(child, _Plateau):
            found = [None if rate is None else rate * child.scale for rate in found]
        elif follows and is_transformation(child) and not explicit:
            found = [*found, None]  # it may scale the updates
        else:
            found += _rates(child, explicit)
    return found
