"""Optimizers that follow `torch.optim`, argument by argument, as optax transformations.

Each ends in `optax.scale_by_learning_rate`, held by `optax.inject_hyperparams`, so that the
current rate can be read from the optimizer state (see `current_learning_rate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain.errors import InputError

LearningRate: TypeAlias = float | Float[Array, ""] | optax.Schedule


class DampedTraceState(NamedTuple):
    """State of `damped_trace`.

    Attributes:
      trace: the momentum buffer of each parameter.
      started: whether the buffer holds a gradient yet.
    """

    trace: PyTree
    started: Bool[Array, ""]


def sgd(
    learning_rate: LearningRate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Stochastic gradient descent as `torch.optim.SGD`.

    Weight decay is L2: it is added to the gradient, before momentum. The first momentum buffer is
    the first gradient itself, without dampening. The rate scales the buffer when it is applied, so
    a schedule changes past gradients' share too.

    Raises:
      InputError: a negative or NaN argument, or Nesterov without momentum or with dampening.
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    if nesterov and (not _is_used(momentum) or _is_used(dampening)):
        raise InputError(
            f"nesterov is True with momentum {momentum} and dampening {dampening}; expected a "
            "momentum above 0 and no dampening, as in torch.optim.SGD"
        )
    parts = []
    if _is_used(weight_decay):
        parts.append(optax.add_decayed_weights(weight_decay))
    if _is_used(momentum) and _is_used(dampening):
        parts.append(damped_trace(momentum, dampening))
    elif _is_used(momentum):
        parts.append(optax.trace(momentum, nesterov=nesterov))
    return optax.chain(*parts, _scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam as `torch.optim.Adam` (Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980).

    Weight decay is L2: it is added to the gradient, before the moments (`optax.adamw` decays the
    parameters themselves). Epsilon is added after the square root, as in optax.

    Raises:
      InputError: a negative or NaN argument, or a beta outside [0, 1).
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(eps=eps, weight_decay=weight_decay)
    _check_shares(betas=betas)
    parts = [optax.add_decayed_weights(weight_decay)] if _is_used(weight_decay) else []
    return optax.chain(
        *parts,
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
        _scale_by_learning_rate(learning_rate),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"sgd": sgd, "adam": adam}


def step_lr(
    learning_rate: float, step_size: int, gamma: float = 0.1, *, steps_per_epoch: int = 1
) -> optax.Schedule:
    """Multiply the rate by `gamma` every `step_size` epochs, as `torch.optim.lr_scheduler.StepLR`.

    Args:
      learning_rate: the rate of the first epochs.
      step_size: epochs between two changes.
      gamma: factor of each change.
      steps_per_epoch: optimizer steps in an epoch; 1 counts `step_size` in steps.

    Returns:
      A schedule: optimizer step -> learning rate.
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(gamma=gamma)
    for name, value in {"step_size": step_size, "steps_per_epoch": steps_per_epoch}.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
    steps = int(step_size * steps_per_epoch)

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        # Not optax.exponential_decay, which takes a gamma of 0 as no decay.
        return jnp.asarray(learning_rate) * jnp.asarray(gamma, jnp.float32) ** (count // steps)

    return schedule


def damped_trace(momentum: float, dampening: float) -> optax.GradientTransformation:
    """Momentum with PyTorch's dampening: buffer ← momentum · buffer + (1 − dampening) · gradient.

    `optax.trace` has no dampening. The first buffer is the first gradient, undamped.
    """

    def init(params: PyTree) -> DampedTraceState:
        return DampedTraceState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), bool))

    def update(
        updates: PyTree, state: DampedTraceState, params: PyTree | None = None
    ) -> tuple[PyTree, DampedTraceState]:
        del params
        share = jnp.where(state.started, 1 - dampening, 1.0)
        trace = jax.tree.map(
            lambda buffer, gradient: momentum * buffer + share.astype(gradient.dtype) * gradient,
            state.trace,
            updates,
        )
        return trace, DampedTraceState(trace, jnp.ones((), bool))

    return optax.GradientTransformation(init, update)


def current_learning_rate(opt_state: Any) -> Float[Array, ""] | None:
    """The rate of the latest step, for optimizers of this module; None for others."""
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", filtering=lambda path, value: hasattr(value, "dtype")
    )
    return found[0][1] if len(found) == 1 else None


def _scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformation:
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, static_args="flip_sign")
    return scale(learning_rate)


def _is_used(value: float) -> bool:
    """Whether an argument differs from 0; one that is traced, in a sweep over it, may."""
    return isinstance(value, jax.core.Tracer) or value != 0


def _check_learning_rate(learning_rate: LearningRate) -> None:
    if not callable(learning_rate):  # a schedule has no value yet
        _check_not_negative(learning_rate=learning_rate)


def _check_not_negative(**arguments: Any) -> None:
    for name, value in arguments.items():
        _check(name, value, lambda number: 0 <= number < math.inf, "finite and not negative")


def _check_shares(**arguments: tuple[Any, ...]) -> None:
    for name, values in arguments.items():
        for value in values:
            _check(name, value, lambda number: 0 <= number < 1, "in [0, 1)")


def _check(name: str, value: Any, is_good: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    try:
        good = is_good(float(value))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"{name} is {value!r}; expected a number that is {expected}")
