"""Optimizers that follow `torch.optim`, argument by argument, as optax transformations.

Those with a learning rate end in `optax.scale_by_learning_rate`, held by
`optax.inject_hyperparams`, so that the current rate can be read from the optimizer state (see
`current_learning_rate`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxtrain.errors import InputError
from jaxtrain.transforms import (
    ClippingState,
    Number,
    clip_by_global_norm,
    damped_trace,
    scale_by_amsgrad,
    scale_by_root_sum_of_squares,
    scale_by_sign_and_step_size,
)

LearningRate: TypeAlias = Number | optax.Schedule


def sgd(
    learning_rate: LearningRate = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
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
    _check_not_negative(momentum=momentum, dampening=dampening)
    if nesterov and (not _is_used(momentum) or _is_used(dampening)):
        raise InputError(
            f"nesterov is True with momentum {momentum} and dampening {dampening}; expected a "
            "momentum above 0 and no dampening, as in torch.optim.SGD"
        )
    parts = _l2(weight_decay)
    if _is_used(momentum) and _is_used(dampening):
        parts.append(damped_trace(momentum, dampening))
    elif _is_used(momentum):
        parts.append(optax.trace(momentum, nesterov=nesterov))
    return optax.chain(*parts, _scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
) -> optax.GradientTransformation:
    """Adam as `torch.optim.Adam` (Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980).

    Weight decay is L2: it is added to the gradient, before the moments (`adamw` decays the
    parameters themselves). Epsilon is added after the square root, as in optax.

    Raises:
      InputError: a negative or NaN argument, or a beta outside [0, 1).
    """
    return optax.chain(
        *_l2(weight_decay),
        _scale_by_adam(learning_rate, betas, eps, amsgrad),
        _scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    amsgrad: bool = False,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay as `torch.optim.AdamW`.

    (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101.) The parameters shrink by
    learning_rate · weight_decay a step; PyTorch's default decay is 1e-2, optax's 1e-4.

    Raises:
      InputError: a negative or NaN argument, or a beta outside [0, 1).
    """
    _check_not_negative(weight_decay=weight_decay)
    return optax.chain(
        _scale_by_adam(learning_rate, betas, eps, amsgrad),
        optax.add_decayed_weights(weight_decay),
        _scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: LearningRate = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
) -> optax.GradientTransformation:
    """RMSprop as `torch.optim.RMSprop` (Hinton's lecture; centered: Graves, 2013).

    Epsilon is added after the square root (optax: inside it), and the rate scales the momentum
    buffer when it is applied (optax: before it enters the buffer).

    Raises:
      InputError: a negative or NaN argument, or alpha outside [0, 1).
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(eps=eps, momentum=momentum)
    _check_shares(alpha=(alpha,))
    scale_by = optax.scale_by_stddev if centered else optax.scale_by_rms
    return optax.chain(
        *_l2(weight_decay),
        scale_by(decay=alpha, eps=eps, eps_in_sqrt=False),
        *([optax.trace(momentum)] if _is_used(momentum) else []),
        _scale_by_learning_rate(learning_rate),
    )


def rprop(
    learning_rate: LearningRate = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
) -> optax.GradientTransformation:
    """Resilient backpropagation as `torch.optim.Rprop` (Riedmiller & Braun, 1993).

    Each parameter has a step size of its own, first `learning_rate`, times etas[1] while its
    gradient keeps its sign and etas[0] where the sign turns; there the parameter rests for a step.
    optax's rprop applies each update one step late. Meant for full batches: the noise of
    mini-batches turns signs.

    Raises:
      InputError: a negative or NaN argument, or etas or step_sizes in the wrong order.
    """
    if callable(learning_rate):
        raise InputError(
            "the learning rate of rprop is a schedule; expected a number, since each parameter's "
            "step size adapts itself"
        )
    _check_learning_rate(learning_rate)
    eta_minus, eta_plus = etas
    smallest, largest = step_sizes
    if not (0 < eta_minus < 1 < eta_plus):
        raise InputError(f"etas are {etas}; expected one in (0, 1) and one above 1")
    if not (0 <= smallest <= largest):
        raise InputError(f"step_sizes are {step_sizes}; expected the smallest and the largest")
    return optax.chain(
        scale_by_sign_and_step_size(learning_rate, etas, step_sizes), optax.scale(-1.0)
    )


def adagrad(
    learning_rate: LearningRate = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    initial_accumulator_value: Number = 0.0,
    eps: Number = 1e-10,
) -> optax.GradientTransformation:
    """Adagrad as `torch.optim.Adagrad` (Duchi, Hazan & Singer, 2011).

    Epsilon is added after the square root (optax: inside it), the first accumulator is 0 (optax:
    0.1), and the rate of step t, counted from 0, is learning_rate / (1 + t · lr_decay).

    Raises:
      InputError: a negative or NaN argument.
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(
        lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
    )
    rate = learning_rate
    if _is_used(lr_decay):

        def rate(count: Int[Array, ""]) -> Float[Array, ""]:
            base = learning_rate(count) if callable(learning_rate) else learning_rate
            return base / (1 + count * lr_decay)

    return optax.chain(
        *_l2(weight_decay),
        scale_by_root_sum_of_squares(initial_accumulator_value, eps),
        _scale_by_learning_rate(rate),
    )


def adadelta(
    learning_rate: LearningRate = 1.0,
    rho: Number = 0.9,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
) -> optax.GradientTransformation:
    """Adadelta as `torch.optim.Adadelta` (Zeiler, 2012, https://arxiv.org/abs/1212.5701).

    Weight decay is added to the gradient before it is scaled (optax: after).

    Raises:
      InputError: a negative or NaN argument, or rho outside [0, 1).
    """
    _check_learning_rate(learning_rate)
    _check_not_negative(eps=eps)
    _check_shares(rho=(rho,))
    return optax.chain(
        *_l2(weight_decay),
        optax.scale_by_adadelta(rho, eps),
        _scale_by_learning_rate(learning_rate),
    )


def lbfgs(
    learning_rate: LearningRate = 1.0, history_size: int = 100
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search, as `torch.optim.LBFGS(line_search_fn="strong_wolfe")`.

    (Liu & Nocedal, 1989; line search: Nocedal & Wright, Numerical Optimization, 2006, algorithm
    3.5.) One update is one iteration, where PyTorch's `step` makes up to 20. It compares values of
    one function, so it takes full batches and a model without dropout; `minimize` runs it without
    evaluating any point twice.

    Args:
      learning_rate: factor of the direction from which the line search starts.
      history_size: how many past steps shape the direction.

    Raises:
      InputError: a negative or NaN rate, or a history below 1.
    """
    _check_learning_rate(learning_rate)
    if not isinstance(history_size, (int, np.integer)) or history_size < 1:
        raise InputError(f"history_size is {history_size!r}; expected a whole number of at least 1")
    return optax.lbfgs(
        learning_rate,
        memory_size=history_size,
        linesearch=optax.scale_by_zoom_linesearch(
            max_linesearch_steps=25, initial_guess_strategy="one"
        ),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "rmsprop": rmsprop,
    "rprop": rprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "lbfgs": lbfgs,
}


def make(name: str, learning_rate: LearningRate, **options: Any) -> optax.GradientTransformation:
    """The optimizer of that name; options that it does not have must be 0.

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: a number, or a schedule where the optimizer takes one.
      options: further arguments by name, such as momentum.

    Raises:
      InputError: no such optimizer, or it lacks an option that is not 0.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"the optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    for option, value in options.items():
        if option not in known and _is_used(value):
            raise InputError(
                f"{option} is {value} with the optimizer {name}, which has none; expected 0, or an "
                "optimizer that has it"
            )
    kept = {option: value for option, value in options.items() if option in known}
    return OPTIMIZERS[name](learning_rate, **kept)


def clip_gradients(
    optimizer: optax.GradientTransformation, max_gradient_norm: float | None
) -> optax.GradientTransformation:
    """Let an optimizer see gradients scaled down to a global norm, as after `clip_grad_norm_`.

    (Pascanu, Mikolov & Bengio, 2013, https://arxiv.org/abs/1211.5063.)

    Args:
      optimizer: any but one with a line search (L-BFGS), which compares losses along the true
        gradient.
      max_gradient_norm: Euclidean norm over all parameters above which gradients are scaled; None
        leaves them.

    Raises:
      InputError: a norm that is not positive.
    """
    if max_gradient_norm is None:
        return optimizer
    _check(
        "max_gradient_norm",
        max_gradient_norm,
        lambda number: 0 < number < math.inf,
        "finite and positive",
    )
    return optax.chain(clip_by_global_norm(max_gradient_norm), optimizer)


def step_lr(
    learning_rate: Number, step_size: int, gamma: Number = 0.1, *, steps_per_epoch: int = 1
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


def current_learning_rate(opt_state: Any) -> Float[Array, ""] | None:
    """The rate of the latest step, for optimizers of this module that have one; else None.

    (Rprop has a step size for each parameter, L-BFGS finds its own along each line.)
    """
    if has_line_search(opt_state):
        return None
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", filtering=lambda path, value: hasattr(value, "dtype")
    )
    return found[0][1] if len(found) == 1 else None


def has_line_search(opt_state: Any) -> bool:
    """Whether an optimizer compares values of the loss, and so needs the same batch each step."""
    return _has_state(
        opt_state, optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState
    )


def has_clipping(opt_state: Any) -> bool:
    """Whether an optimizer clips gradients by `clip_gradients`."""
    return _has_state(opt_state, ClippingState)


def _has_state(opt_state: Any, *kinds: type) -> bool:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(leaf, kinds) for leaf in leaves)


def _scale_by_adam(
    learning_rate: LearningRate, betas: tuple[Number, Number], eps: Number, amsgrad: bool
) -> optax.GradientTransformation:
    _check_learning_rate(learning_rate)
    _check_not_negative(eps=eps)
    _check_shares(betas=betas)
    scale_by = scale_by_amsgrad if amsgrad else optax.scale_by_adam
    return scale_by(b1=betas[0], b2=betas[1], eps=eps)


def _l2(weight_decay: Number) -> list[optax.GradientTransformation]:
    """L2 weight decay as PyTorch has it: added to the gradient before all else."""
    _check_not_negative(weight_decay=weight_decay)
    return [optax.add_decayed_weights(weight_decay)] if _is_used(weight_decay) else []


def _scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformation:
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, static_args="flip_sign")
    return scale(learning_rate)


def _is_used(value: Number) -> bool:
    """Whether an argument differs from 0; one that is traced, in a sweep over it, may."""
    return isinstance(value, jax.core.Tracer) or bool(value != 0)


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
