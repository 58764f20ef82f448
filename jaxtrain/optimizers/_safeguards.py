"""Wrappers that protect an optimizer from large, NaN or infinite gradients."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from jaxtrain.optimizers._accumulation import AccumulationState, without_batches
from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._numbers import Number, check_number
from jaxtrain.optimizers._records import Record, find_nodes
from jaxtrain.optimizers._transforms import clip_by_global_norm


def clip_gradients(
    optimizer: optax.GradientTransformation, max_gradient_norm: Number | None
) -> optax.GradientTransformation:
    """Returns an optimizer that scales gradients down to a global norm before each update.

    Same as `torch.nn.utils.clip_grad_norm_` before each step (Pascanu, Mikolov & Bengio, 2013,
    https://arxiv.org/abs/1211.5063).

    Args:
      optimizer: any optimizer without a line search; L-BFGS compares losses along the true
        gradient.
      max_gradient_norm: Euclidean norm over all parameters above which gradients are scaled; None
        returns the optimizer itself.

    Raises:
      InputError: the norm is not positive.

    Example:
      >>> optimizer = jt.optimizers.clip_gradients(jt.optimizers.adam(1e-3), 1.0)
    """
    if max_gradient_norm is None:
        return optimizer
    check_number(
        "max_gradient_norm",
        max_gradient_norm,
        lambda number: 0 < number < math.inf,
        "finite and positive",
    )
    return optax.chain(clip_by_global_norm(max_gradient_norm), accepting_extra_args(optimizer))


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      inner: state of the wrapped optimizer.
      skipped: steps skipped so far, int32; recorded as "skipped_steps".
      finite: whether the last step was taken.
    """

    inner: PyTree
    skipped: Record
    finite: Bool[Array, ""]


def skip_nonfinite(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that skips steps with NaN or infinite values.

    A step is skipped if a value of the gradients, the updates or the loss is not finite, or if a
    finite value of the optimizer state or the model state would become non-finite. (Values that
    are infinite from the start are allowed.) The updates of a skipped step are 0, the optimizer
    state does not change, and the step is counted.

    Around `accumulate_gradients`, a bad batch counts as one of the batches of its update, and adds
    nothing to it. If the update itself is not finite, all of its batches are left out.

    Unlike `optax.apply_if_finite`, it has no limit on consecutive steps, and it covers the model
    state: `apply_gradients` passes it as `model_states`, and keeps the old one if the step is
    skipped.

    Args:
      optimizer: any optax transformation.

    Returns:
      A transformation whose update also takes `value`, the loss, and `model_states`, the model
      state before and after the step; all extra arguments except `model_states` are passed to the
      optimizer.

    Raises:
      InputError: the optimizer is not an optax transformation.

    Example:
      >>> optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.adam(1e-3))
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, epochs=3)
      >>> history["skipped_steps"]
      array([0, 0, 0])
    """
    inner = accepting_extra_args(optimizer)

    def init(params: PyTree) -> SkipNonfiniteState:
        skipped = Record("skipped_steps", jnp.zeros((), jnp.int32), counts=True)
        return SkipNonfiniteState(inner.init(params), skipped, jnp.ones((), bool))

    def update(
        updates: PyTree,
        state: SkipNonfiniteState,
        params: PyTree | None = None,
        *,
        value: Array | None = None,
        model_states: tuple[PyTree, PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SkipNonfiniteState]:
        # Updates alone are not enough: optax.zero_nans and Rprop hide a NaN gradient.
        usable = all_finite((updates, value))
        if model_states is not None:
            usable &= stays_finite(*model_states)
        if value is not None:
            extra_args["value"] = value
        old = state.inner
        if find_nodes(old, AccumulationState):
            # Only the batch is left out: the epoch's last update is made with the others.
            extra_args["skip"] = ~usable
            updates = jax.tree.map(functools.partial(_zero_unless, usable), updates)
            if value is not None:
                extra_args["value"] = _zero_unless(usable, value)
            updates, new = inner.update(updates, old, params, **extra_args)
            taken = all_finite(updates) & stays_finite(old, new)
            new, old = _without_batch(new, old, usable), _without_batches(old)
            finite = usable & taken
        else:
            updates, new = inner.update(updates, old, params, **extra_args)
            taken = finite = usable & all_finite(updates) & stays_finite(old, new)
        return (
            jax.tree.map(functools.partial(_zero_unless, taken), updates),
            SkipNonfiniteState(
                jax.tree.map(functools.partial(jnp.where, taken), new, old),
                dataclasses.replace(state.skipped, value=state.skipped.value + ~finite),
                finite,
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _zero_unless(condition: Array, leaf: Any) -> Array:
    return jnp.where(condition, leaf, jnp.zeros_like(leaf))


def _without_batch(new: PyTree, old: PyTree, usable: Array) -> PyTree:
    """Returns the state after a batch, which is left out unless it is usable.

    If it is left out, records stay, and other states around `accumulate_gradients` change only if
    the batch completes an update from earlier ones.
    """
    states = find_nodes(new, AccumulationState)
    updated = functools.reduce(jnp.logical_or, [state.updated for state in states])

    def choose(new: Any, old: Any) -> Any:
        if isinstance(new, AccumulationState):
            return new
        keep = usable if isinstance(new, Record) else usable | updated
        return jax.tree.map(functools.partial(jnp.where, keep), new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_accumulation_or_record)


def _without_batches(tree: PyTree) -> PyTree:
    """Drops the batches that have accumulated, since their update is not finite."""

    def drop(node: Any) -> Any:
        return without_batches(node) if isinstance(node, AccumulationState) else node

    return jax.tree.map(drop, tree, is_leaf=_is_accumulation_or_record)


def _is_accumulation_or_record(node: Any) -> bool:
    return isinstance(node, (AccumulationState, Record))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether all numbers of a pytree are finite; integers always are."""
    return _all(jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree) if _is_inexact(leaf))


def stays_finite(before: PyTree, after: PyTree) -> Bool[Array, ""]:
    """Returns whether all numbers that are finite in `before` are finite in `after`.

    Each `Record` is ignored, because training does not depend on it.

    Args:
      before: pytree of arrays.
      after: pytree of the same structure.
    """
    leaves = (jax.tree.leaves(without_records(tree)) for tree in (before, after))
    pairs = zip(*leaves, strict=True)
    return _all(jnp.isfinite(new) | ~jnp.isfinite(old) for old, new in pairs if _is_inexact(new))


def without_records(tree: PyTree) -> PyTree:
    """Returns a pytree with None in place of each `Record`."""

    def is_record(node: Any) -> bool:
        return isinstance(node, Record)

    return jax.tree.map(lambda node: None if is_record(node) else node, tree, is_leaf=is_record)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _all(flags: Any) -> Array:
    # The first axis first, as in `global_norm`: a full reduction would be slow on a CPU.
    per_leaf = [
        jnp.all(jnp.all(flag, axis=0)) if flag.ndim > 1 else jnp.all(flag) for flag in flags
    ]
    return jnp.all(jnp.stack(per_leaf)) if per_leaf else jnp.ones((), bool)
