"""An exponential moving average of the parameters, kept in the state of the optimizer."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from jaxtrain._arguments import check_arguments
from jaxtrain.optimizers._accumulation import AccumulationState
from jaxtrain.optimizers._evaluation import evaluate_with, evaluation_params
from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._numbers import Number, check_number
from jaxtrain.optimizers._records import find_nodes
from jaxtrain.optimizers._safeguards import SkipNonfiniteState


class AverageState(NamedTuple):
    """State of `average_parameters`, inside that of `evaluate_with`.

    Attributes:
      inner: state of the wrapped optimizer.
      average: the average, with the structure of the parameters.
      count: updates of the parameters so far.
    """

    inner: PyTree
    average: PyTree
    count: Int[Array, ""]  # type: ignore[assignment]  # the name of a method of tuple


def average_parameters(
    optimizer: optax.GradientTransformation, decay: Number = 0.999, *, evaluate: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that also keeps an exponential moving average of the parameters.

    Same as `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, updated after
    each update of the parameters: the average starts as the parameters after the first one, and
    then moves towards the parameters by 1 − decay of the difference. It does not change the
    training. Steps that `skip_nonfinite` leaves out, and those that only accumulate gradients, do
    not move it, whatever the order of these wrappers.

    `state.replace(params=...)`, `load` and `load_torch` start the average anew with their
    parameters. Batch statistics remain those of training; `jt.update_batch_stats` recomputes them
    for the average.

    `averaged_params(state.opt_state)` returns the average.

    Args:
      optimizer: any optax transformation.
      decay: the fraction of the average that remains in each step, 0 … 1.
      evaluate: whether `evaluate`, `predict`, the evaluations of `fit` and `train`, `save`,
        `to_module` and all exports use the average in place of the parameters.

    Raises:
      InputError: the decay is not in 0 … 1.

    Example:
      >>> optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(1e-3), 0.99)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
      >>> metrics = jt.evaluate(state, test, loss_fn)  # of the average
      >>> params = jt.optimizers.averaged_params(state.opt_state)
    """
    check_arguments(average_parameters, locals())
    check_number("decay", decay, lambda number: 0 <= number <= 1, "from 0 to 1")
    inner = accepting_extra_args(optimizer)

    def init(params: PyTree) -> AverageState:
        average = jax.tree.map(jnp.asarray, params)
        return AverageState(inner.init(params), average, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: AverageState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AverageState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        first, updated = state.count == 0, has_updated(inner_state)

        def move(average: Array, new: Array) -> Array:
            if not jnp.issubdtype(average.dtype, jnp.inexact):
                return jnp.where(updated, new, average)
            moved = average + jnp.asarray(1 - decay, average.dtype) * (new - average)
            return jnp.where(updated, jnp.where(first, new, moved), average)

        average = jax.tree.map(move, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(inner_state, average, state.count + updated)

    return evaluate_with(
        optax.GradientTransformationExtraArgs(init, update),
        _average if evaluate else _inner_params,
        restart_fn=_restart,
    )


def _average(state: AverageState, params: PyTree) -> PyTree:
    return state.average


def _inner_params(state: AverageState, params: PyTree) -> PyTree:
    return evaluation_params(state.inner, params)


def _restart(state: AverageState, params: PyTree) -> AverageState:
    return state._replace(average=params, count=jnp.zeros_like(state.count))


def has_updated(opt_state: PyTree) -> Bool[Array, ""] | bool:
    """Returns whether the latest step was to change the parameters.

    False if `skip_nonfinite` left it out, or if it only accumulated gradients.

    Args:
      opt_state: state of an optimizer after the step.
    """
    flags = [node.updated for node in find_nodes(opt_state, AccumulationState)]
    flags = flags or [node.finite for node in find_nodes(opt_state, SkipNonfiniteState)]
    flags += [node.mini_step == 0 for node in find_nodes(opt_state, optax.MultiStepsState)]
    return functools.reduce(operator.and_, flags, True)
