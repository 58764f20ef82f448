"""The parameters that are evaluated, saved and exported, where they are not those of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxtrain._arguments import check_arguments
from jaxtrain.errors import InputError
from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._hoist import HoistedState
from jaxtrain.optimizers._records import find_nodes

_ScheduleFreeState = optax.contrib.ScheduleFreeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvaluationFunctions:
    """What `evaluate_with` is given, as a static part of the state."""

    eval_params: Callable[[PyTree, PyTree], PyTree] = dataclasses.field(metadata={"static": True})
    restart: Callable[[PyTree, PyTree], PyTree] | None = dataclasses.field(
        metadata={"static": True}
    )


class EvaluationState(NamedTuple):
    """State of `evaluate_with`.

    Attributes:
      inner: state of the wrapped optimizer.
      functions: those that compute and restart the parameters of evaluation.
    """

    inner: PyTree
    functions: EvaluationFunctions


def evaluate_with(
    optimizer: optax.GradientTransformation,
    eval_params_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    restart_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose state determines which parameters are evaluated and saved.

    They are used by `evaluate`, `predict`, the evaluations of `fit` and `train`, `save`,
    `to_module` and all exports in place of `state.params`, and returned by
    `state.evaluation_params`. Training does not change.

    `average_parameters` is a case of it. `optax.lookahead`, whose slow parameters are evaluated,
    and `optax.contrib.schedule_free` need no such wrapper.

    Args:
      optimizer: any optax transformation, for all of the parameters.
      eval_params_fn: `(opt_state, params) -> params`, of the state of `optimizer` and of the
        parameters of training.
      restart_fn: `(opt_state, params) -> opt_state`, called where other parameters are put into a
        state, by `state.replace(params=...)`, `load` and `load_torch`. None keeps the state.

    Raises:
      InputError: `init_state` raises it if `eval_params_fn` returns other shapes than those of the
        parameters.

    Example:
      >>> optimizer = optax.contrib.schedule_free_adamw(1e-3)
      >>> optimizer = jt.optimizers.evaluate_with(
      ...     optimizer, optax.contrib.schedule_free_eval_params
      ... )
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
      >>> metrics = jt.evaluate(state, test, loss_fn)  # of the averaged parameters
    """
    check_arguments(evaluate_with, locals())
    inner = accepting_extra_args(optimizer)

    def init(params: PyTree) -> EvaluationState:
        return EvaluationState(inner.init(params), EvaluationFunctions(eval_params_fn, restart_fn))

    def update(
        updates: PyTree, state: EvaluationState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, EvaluationState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters that evaluation uses.

    Args:
      opt_state: `state.opt_state`.
      params: `state.params`, returned if the optimizer determines no others.
    """
    for node in find_nodes(opt_state, EvaluationState, _ScheduleFreeState):
        if isinstance(node, EvaluationState):
            return node.functions.eval_params(node.inner, params)
        found = optax.contrib.schedule_free_eval_params(node, params)
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found, params)
    return params


def restart_evaluation(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns an optimizer state whose parameters of evaluation start anew, with `params`.

    Args:
      opt_state: `state.opt_state`; returned unchanged if it determines no such parameters.
      params: where they start.
    """

    def restart(node: Any) -> Any:
        if isinstance(node, EvaluationState):
            inner, function = restart_evaluation(node.inner, params), node.functions.restart
            return node._replace(inner=inner if function is None else function(inner, params))
        if isinstance(node, _ScheduleFreeState):
            z = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), params, node.z)
            return node._replace(z=z, weight_sum=jnp.zeros_like(node.weight_sum))
        return node

    def is_found(node: Any) -> bool:
        return isinstance(node, (EvaluationState, _ScheduleFreeState))

    return jax.tree.map(restart, opt_state, is_leaf=is_found)


def check_evaluation(opt_state: PyTree, params: PyTree) -> None:
    """Raises InputError if the parameters of evaluation do not have the shapes of the parameters.

    Args:
      opt_state: the initial state of the optimizer.
      params: the parameters.
    """
    structure: Any = jax.tree.structure(params)
    for node in find_nodes(opt_state, _ScheduleFreeState):
        if jax.tree.structure(node.z) != structure:
            raise InputError(
                "optax.contrib.schedule_free optimizes some of the parameters only; expected it "
                "around the complete optimizer: schedule_free(optax.partition(...), rate)",
                argument="optimizer",
            )
    for node in find_nodes(opt_state, EvaluationState):
        found = jax.eval_shape(node.functions.eval_params, node.inner, params)
        ours, theirs = (
            (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
            for tree in (params, found)
        )
        if ours != theirs:
            raise InputError(
                f"the function of evaluate_with returned {_describe(found)}; expected parameters "
                f"with the structure and the shapes of {_describe(params)}",
                argument="optimizer",
            )


class LookaheadState(NamedTuple):
    """State of `optax.lookahead` in a TrainState.

    Attributes:
      inner: state of optax.
      slow: the slow parameters, which are evaluated; `state.params` are the fast ones.
    """

    inner: PyTree
    slow: PyTree


# Compared by the optimizer, so that two states of one optimizer have the same structure.
@dataclasses.dataclass(frozen=True)
class _LookaheadInit:
    optimizer: optax.GradientTransformation

    def __call__(self, params: PyTree) -> EvaluationState:
        return _lookahead_state(self.optimizer.init(params), params)


@dataclasses.dataclass(frozen=True)
class _LookaheadUpdate:
    optimizer: optax.GradientTransformation

    def __call__(
        self, updates: PyTree, state: EvaluationState, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, EvaluationState]:
        pair = optax.LookaheadParams(params, state.inner.slow)
        updates, inner = self.optimizer.update(updates, state.inner.inner, pair)
        slow = optax.apply_updates(state.inner.slow, updates.slow)
        return updates.fast, _lookahead_state(inner, slow)


def _lookahead_state(inner: PyTree, slow: PyTree) -> EvaluationState:
    return EvaluationState(
        LookaheadState(inner, slow), EvaluationFunctions(_slow_params, _restart_slow)
    )


def _slow_params(state: LookaheadState, params: PyTree) -> PyTree:
    return state.slow


def _restart_slow(state: LookaheadState, params: PyTree) -> LookaheadState:
    return state._replace(slow=params)


def adapt_lookahead(
    optimizer: optax.GradientTransformation, opt_state: PyTree, params: PyTree
) -> tuple[optax.GradientTransformation, PyTree]:
    """Moves the slow parameters of `optax.lookahead` from the parameters into the state.

    Args:
      optimizer: any optax transformation.
      opt_state: its initial state, or one that this function returned.
      params: the parameters.

    Returns:
      The optimizer and its state, unchanged if they are not those of `optax.lookahead`.

    Raises:
      InputError: `optax.lookahead` is inside another transformation.
    """
    is_adapted = isinstance(getattr(opt_state, "inner", None), LookaheadState)
    node = opt_state.inner if isinstance(opt_state, HoistedState) else opt_state
    if not is_adapted:
        if not find_nodes(node, optax.LookaheadState) or isinstance(params, optax.LookaheadParams):
            return optimizer, opt_state
        if not isinstance(node, optax.LookaheadState):
            raise InputError(
                "optax.lookahead is inside another transformation; expected it around the complete "
                "optimizer: optax.lookahead(optax.chain(...), ...)",
                argument="optimizer",
            )
        opt_state = _lookahead_state(opt_state, params)
    if isinstance(optimizer.update, _LookaheadUpdate):
        return optimizer, opt_state
    adapted = optax.GradientTransformationExtraArgs(
        _LookaheadInit(optimizer), _LookaheadUpdate(optimizer)
    )
    return adapted, opt_state


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))
