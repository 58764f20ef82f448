"""Queries and checks of optimizer states, also of chained and wrapped optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain.errors import InputError
from jaxtrain.optimizers._accumulation import AccumulationState
from jaxtrain.optimizers._averaging import AverageState
from jaxtrain.optimizers._evaluation import check_evaluation
from jaxtrain.optimizers._records import (
    INJECTED,
    LINE_SEARCHES,
    children,
    find_nodes,
    injected_rate,
    is_chain,
    is_transformation,
    records,
)
from jaxtrain.optimizers._safeguards import SkipNonfiniteState
from jaxtrain.optimizers._schedules import RateState
from jaxtrain.optimizers._transforms import ClippingState

# States of transformations that choose or limit the length of a step.
_STEP_LENGTHS = (*LINE_SEARCHES, ClippingState)


def current_learning_rate(opt_state: Any) -> Float[Array, "..."] | None:
    """Returns the learning rate of the latest update, or None if it is unknown; see `records`.

    Args:
      opt_state: `state.opt_state`.
    """
    record = records(opt_state).get("learning_rate")
    return None if record is None else record.value


def map_rates(function: Callable[[Array], Any], opt_state: Any, *, schedules: bool = False) -> Any:
    """Returns an optimizer state with a function applied to each learning rate that can change.

    Those are the rates of this package's optimizers and of `optax.inject_hyperparams`.

    Args:
      function: of a rate, a scalar.
      opt_state: `state.opt_state`.
      schedules: whether a rate that follows a schedule of this package's optimizers can change, and
        is a constant from then on; otherwise it stays.

    Raises:
      InputError: a rate is an integer.
    """

    def change(node: Any) -> Any:
        if not _is_settable(node, schedules):
            return node
        rate = node.hyperparams["learning_rate"]
        if not jnp.issubdtype(rate.dtype, jnp.inexact):
            raise InputError(
                f"the learning rate in the state of the optimizer is of {rate.dtype}; expected a "
                "float, such as 1.0 in place of 1, where the optimizer is built",
                argument="optimizer",
            )
        new = jnp.asarray(function(rate), rate.dtype)
        node = node._replace(hyperparams={**node.hyperparams, "learning_rate": new})
        schedule = _schedule_state(node)
        if schedule is None:
            return node
        fixed = RateState(schedule.count, jnp.ones_like(schedule.is_fixed), new)
        states = {**node.hyperparams_states, "learning_rate": fixed}
        return node._replace(hyperparams_states=states)

    return jax.tree.map(change, opt_state, is_leaf=lambda node: injected_rate(node) is not None)


def has_settable_rate(opt_state: Any, *, schedules: bool = False) -> bool:
    """Returns whether `map_rates` changes a rate, and of `optax.partition` that of each group."""
    groups = find_nodes(opt_state, optax.transforms.PartitionState)
    parts = [part.inner_state for group in groups for part in group.inner_states.values()]
    trained = [part for part in parts if part != optax.EmptyState()]  # not optax.set_to_zero
    if trained:
        return all(has_settable_rate(part, schedules=schedules) for part in trained)
    return any(_is_settable(node, schedules) for node in find_nodes(opt_state, *INJECTED))


def _is_settable(node: Any, schedules: bool) -> bool:
    if injected_rate(node) is None:
        return False
    schedule = _schedule_state(node)
    return schedule is None or (schedules and isinstance(schedule, RateState))


def _schedule_state(node: Any) -> Any:
    return getattr(node, "hyperparams_states", {}).get("learning_rate")


def has_line_search(opt_state: Any) -> bool:
    """Returns whether an optimizer has a line search, which needs the same batch in each step.

    Args:
      opt_state: `state.opt_state`.
    """
    return bool(find_nodes(opt_state, *LINE_SEARCHES))


def check_line_search(opt_state: Any, examples: int, batch_size: int) -> None:
    """Raises InputError if a line search (L-BFGS) is used with mini-batches or clipping."""
    found = {isinstance(x, LINE_SEARCHES) for x in find_nodes(opt_state, *_STEP_LENGTHS)}
    if True not in found:
        return
    if batch_size < examples:
        raise InputError(
            f"batch_size is {batch_size} of {examples} examples, but the optimizer has a line "
            "search (L-BFGS); expected all examples in one batch, since the search compares losses "
            "of the same function",
            argument="batch_size",
        )
    if False in found:
        raise InputError(
            "the optimizer clips gradients and has a line search (L-BFGS); expected one or the "
            "other, since the search chooses the length of each step"
        )


def has_accumulation(opt_state: Any) -> bool:
    """Returns whether an optimizer accumulates gradients by `accumulate_gradients`.

    Args:
      opt_state: `state.opt_state`.
    """
    return bool(find_nodes(opt_state, AccumulationState))


def skipped_steps(opt_state: Any) -> Int[Array, "..."] | None:
    """Returns the number of steps that `skip_nonfinite` skipped, or None without it.

    Args:
      opt_state: `state.opt_state`.
    """
    record = records(opt_state).get("skipped_steps")
    return None if record is None else record.value


def last_step_finite(opt_state: Any) -> Bool[Array, "..."] | None:
    """Returns whether `skip_nonfinite` took the last step, or None without it.

    Args:
      opt_state: `state.opt_state`.
    """
    states = find_nodes(opt_state, SkipNonfiniteState)
    return functools.reduce(jnp.logical_and, [state.finite for state in states]) if states else None


def averaged_params(opt_state: Any) -> PyTree | None:
    """Returns the average that `average_parameters` keeps, or None without it.

    Args:
      opt_state: `state.opt_state`.

    Example:
      >>> optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(1e-3), 0.99)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
      >>> params = jt.optimizers.averaged_params(state.opt_state)
      >>> jax.tree.structure(params) == jax.tree.structure(state.params)
      True
    """
    states = find_nodes(opt_state, AverageState)
    return states[0].average if states else None


def check_order(opt_state: Any, params: PyTree) -> None:
    """Raises InputError if wrappers of an optimizer are in an order in which they do not work.

    Args:
      opt_state: the initial state of the optimizer.
      params: the parameters.
    """
    structure: Any = jax.tree.structure(params)
    for state in find_nodes(opt_state, AverageState):
        if jax.tree.structure(state.average) != structure:
            raise InputError(
                "average_parameters averages some of the parameters only; expected it around the "
                "complete optimizer: average_parameters(optax.partition(...))",
                argument="optimizer",
            )
    check_evaluation(opt_state, params)
    _check_order(opt_state, skips=False, accumulates=False)


def _check_order(node: Any, skips: bool, accumulates: bool) -> None:
    inner, expected = "", ""
    if accumulates and isinstance(node, SkipNonfiniteState):
        inner = "skip_nonfinite is inside accumulated gradients, so a bad batch removes others"
        expected = "skip_nonfinite(accumulate_gradients(optimizer, steps))"
    elif accumulates and isinstance(node, AccumulationState):
        inner = "accumulate_gradients is inside accumulated gradients"
        expected = "one accumulate_gradients, with the product of the steps"
    elif accumulates and isinstance(node, LINE_SEARCHES):
        inner = "an optimizer with a line search (L-BFGS) is inside accumulated gradients"
        expected = "another optimizer, or all examples in one batch"
    elif is_chain(node):
        *before, _ = [each for each in children(node) if is_transformation(each)] or [None]
        if find_nodes(before, SkipNonfiniteState):
            inner = "another transformation of an optax.chain follows skip_nonfinite"
            expected = "skip_nonfinite(optax.chain(...))"
        elif find_nodes(before, AverageState):
            inner = "another transformation of an optax.chain follows average_parameters"
            expected = "average_parameters(optax.chain(...))"
        elif find_nodes(before, optax.contrib.ScheduleFreeState):
            inner = "another transformation of an optax.chain follows schedule_free"
            expected = "optax.contrib.schedule_free(optax.chain(...), learning_rate)"
        elif skips and find_nodes(before, AccumulationState):
            inner = (
                "another transformation of an optax.chain follows accumulate_gradients inside "
                "skip_nonfinite"
            )
            expected = "skip_nonfinite(accumulate_gradients(optax.chain(...), steps))"
    if inner:
        raise InputError(f"{inner}; expected {expected}", argument="optimizer")
    skips = skips or isinstance(node, SkipNonfiniteState)
    accumulates = accumulates or isinstance(node, (AccumulationState, optax.MultiStepsState))
    for child in children(node):
        _check_order(child, skips, accumulates)
