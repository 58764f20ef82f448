"""minimize: optimizes a function in one compiled loop with stopping criteria."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._carry import keep_types
from jaxtrain.optimizers._check import check_optimizer
from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._inspect import has_line_search


class Stop(enum.IntEnum):
    """Why a descent ended; `Stop(result.stop).message` is the reason as text.

    Example:
      >>> jt.optimizers.Stop.STEP_LIMIT.message
      'step limit'
      >>> result = jt.minimize(lambda x: x**2, jnp.array(1.0), optax.sgd(0.1), max_steps=3)
      >>> jt.optimizers.Stop(result.stop)
      <Stop.STEP_LIMIT: 0>
    """

    STEP_LIMIT = 0
    LOSS_THRESHOLD = 1
    GRADIENT_TOLERANCE = 2
    LOSS_NOT_FINITE = 3
    NO_PROGRESS = 4

    @property
    def message(self) -> str:
        """The reason as text."""
        return _MESSAGES[self]

    @classmethod
    def _missing_(cls, value: object) -> Stop | None:
        # Since Python 3.13, Enum does not find a member by a JAX array.
        return cls(int(value)) if isinstance(value, jax.Array) and value.ndim == 0 else None


_MESSAGES = {
    Stop.STEP_LIMIT: "step limit",
    Stop.LOSS_THRESHOLD: "loss below the threshold",
    Stop.GRADIENT_TOLERANCE: "gradient below the tolerance",
    Stop.LOSS_NOT_FINITE: "loss not finite",
    Stop.NO_PROGRESS: "line search without progress",
}


class Minimum(NamedTuple):
    """Where a descent ended, and its path.

    Attributes:
      params: the parameters at the end.
      loss: the loss at `params`.
      losses: the loss at the start and after each step, [max_steps + 1]; NaN after the last.
      steps: steps taken.
      evaluations: how often the loss was evaluated with its gradient, line searches included.
      stop: why it ended, a value of `Stop`: `Stop(result.stop).message` for example.
    """

    params: PyTree
    loss: Float[Array, ""]
    losses: Float[Array, "points"]
    steps: Int[Array, ""]
    evaluations: Int[Array, ""]
    stop: Int[Array, ""]


class _Point(NamedTuple):
    params: PyTree
    opt_state: PyTree
    loss: Array
    grad: PyTree
    losses: Array
    steps: Array
    evaluations: Array
    stalled: Array


def minimize(
    loss_fn: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    max_steps: int,
    loss_threshold: float = -jnp.inf,
    gradient_tolerance: float = 0.0,
) -> Minimum:
    """Minimizes a function until its value or its gradient is small, or for `max_steps` steps.

    A pure function of its arguments: `jax.jit` compiles it once for many calls; `jax.vmap` runs
    many descents at once, and the loop ends when the last of them stops.

    Args:
      loss_fn: params -> loss, a scalar. It must be deterministic: all data, no dropout.
      params: where to start.
      optimizer: any optax transformation; one with a line search, such as `optimizers.lbfgs`,
        evaluates no point twice.
      max_steps: maximum number of steps, at least 0.
      loss_threshold: stop when the loss is below this.
      gradient_tolerance: stop when no entry of the gradient has a larger absolute value.

    Returns:
      The end point, the losses on the way, and the reason for stopping. A descent also ends when
      the loss is no longer finite (it diverged), and when a line search does not move.

    Raises:
      InputError: max_steps is not an integer of at least 0, or is 2³¹ − 1 or more; or the optimizer
        changes the type of its state.

    Example:
      >>> def loss_fn(x):
      ...     return (x - 3) ** 2
      >>> result = jt.minimize(
      ...     loss_fn, jnp.array(0.0), optax.sgd(0.25), max_steps=100, loss_threshold=1e-6
      ... )
      >>> jt.optimizers.Stop(result.stop).message
      'loss below the threshold'
    """
    check_arguments(minimize, locals())
    check_optimizer(optimizer)
    check_integer(max_steps, "max_steps", minimum=0, maximum=2**31 - 2)
    searches = has_line_search(jax.eval_shape(optimizer.init, params))
    evaluate = jax.value_and_grad(loss_fn)
    update = accepting_extra_args(optimizer).update

    def stop(point: _Point) -> Array:
        """Returns the first reason to stop that applies, or -1."""
        largest = optax.tree_utils.tree_norm(point.grad, ord=jnp.inf)
        reasons = [
            (~jnp.isfinite(point.loss), Stop.LOSS_NOT_FINITE),
            (point.loss < loss_threshold, Stop.LOSS_THRESHOLD),
            (largest <= gradient_tolerance, Stop.GRADIENT_TOLERANCE),
            (point.stalled, Stop.NO_PROGRESS),
            (point.steps >= max_steps, Stop.STEP_LIMIT),
        ]
        return jnp.select([holds for holds, _ in reasons], [int(why) for _, why in reasons], -1)

    def step(point: _Point) -> _Point:
        updates, opt_state = update(
            point.grad,
            point.opt_state,
            point.params,
            value=point.loss,
            grad=point.grad,
            value_fn=loss_fn,
        )
        params = optax.apply_updates(point.params, updates)
        if searches:
            find = optax.tree_utils.tree_get
            loss, grad = find(opt_state, "value"), find(opt_state, "grad")
            evaluations = find(opt_state, "num_linesearch_steps")
            if grad is None:  # the search has evaluated this point already, without its gradient
                loss, grad = evaluate(params)
                evaluations += 1
            same = jax.tree.map(lambda a, b: jnp.all(a == b), params, point.params)
            stalled = jnp.all(jnp.array(jax.tree.leaves(same)))
        else:
            loss, grad = evaluate(params)
            evaluations, stalled = 1, jnp.zeros((), bool)
        steps = point.steps + 1
        after = _Point(
            params,
            opt_state,
            loss,
            grad,
            point.losses.at[steps].set(loss),
            steps,
            # The optimizer may count in int64.
            point.evaluations + jnp.asarray(evaluations, jnp.int32),
            stalled,
        )
        return keep_types(after, point, "the optimizer")

    loss, grad = evaluate(params)
    first = _Point(
        params,
        optimizer.init(params),
        loss,
        grad,
        jnp.full(max_steps + 1, jnp.nan, loss.dtype).at[0].set(loss),
        jnp.zeros((), jnp.int32),
        jnp.ones((), jnp.int32),
        jnp.zeros((), bool),
    )
    last = lax.while_loop(lambda point: stop(point) < 0, step, first)
    return Minimum(last.params, last.loss, last.losses, last.steps, last.evaluations, stop(last))
