"""Optimizers that follow `torch.optim`, argument by argument, as optax transformations.

Those with a learning rate end in `optax.scale_by_learning_rate`, wrapped in
`optax.inject_hyperparams`, so that the current rate can be read from the optimizer state (see
`records`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxtrain._arguments import check_arguments, check_integer, check_number
from jaxtrain.errors import InputError
from jaxtrain.optimizers._numbers import (
    LearningRate,
    Number,
    check_fractions,
    check_learning_rate,
    check_not_negative,
    is_used,
)
from jaxtrain.optimizers._schedules import SettableSchedule
from jaxtrain.optimizers._transforms import (
    damped_trace,
    scale_by_amsgrad,
    scale_by_root_sum_of_squares,
    scale_by_sign_and_step_size,
)


def sgd(
    learning_rate: LearningRate = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Returns stochastic gradient descent as `torch.optim.SGD`.

    Weight decay is L2: it is added to the gradient, before momentum. The first momentum buffer is
    the first gradient itself, without dampening. The rate scales the buffer when it is applied, so
    a schedule rescales the contribution of past gradients as well.

    Args:
      learning_rate: a number or an optax schedule.
      momentum: factor of the momentum buffer; 0 disables it.
      dampening: the gradient enters the buffer with the factor 1 - dampening.
      weight_decay: coefficient of the L2 penalty.
      nesterov: whether to use Nesterov momentum.

    Raises:
      InputError: an argument is negative or not finite, or Nesterov is used without momentum or
        with dampening.

    Example:
      >>> optimizer = jt.optimizers.sgd(0.1, momentum=0.9, nesterov=True)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, metrics = jt.train_step(state, batch, loss_fn)
    """
    check_arguments(sgd, locals())
    check_learning_rate(learning_rate)
    check_not_negative(momentum=momentum, dampening=dampening)
    if nesterov and (not is_used(momentum) or is_used(dampening)):
        raise InputError(
            f"nesterov is True with momentum {momentum} and dampening {dampening}; expected a "
            "momentum above 0 and no dampening, as in torch.optim.SGD"
        )
    parts = _l2(weight_decay)
    if is_used(momentum) and is_used(dampening):
        parts.append(damped_trace(momentum, dampening))
    elif is_used(momentum):
        parts.append(optax.trace(momentum, nesterov=nesterov))
    return optax.chain(*parts, _scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
) -> optax.GradientTransformation:
    """Returns Adam as `torch.optim.Adam` (Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980).

    Weight decay is L2: it is added to the gradient, before the moments (`adamw` decays the
    parameters themselves). Epsilon is added after the square root, as in optax.

    Args:
      learning_rate: a number or an optax schedule.
      betas: decay rates of the first and the second moment.
      eps: added to the denominator.
      weight_decay: coefficient of the L2 penalty.
      amsgrad: whether to use the largest second moment so far.

    Raises:
      InputError: an argument is negative or not finite, or a beta is outside [0, 1).

    Example:
      >>> optimizer = jt.optimizers.adam(1e-3)
    """
    check_arguments(adam, locals())
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
    """Returns Adam with decoupled weight decay as `torch.optim.AdamW`.

    (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101.) The parameters shrink by
    learning_rate · weight_decay per step; PyTorch's default decay is 1e-2, optax's 1e-4.

    Args:
      learning_rate: a number or an optax schedule.
      betas: as in `adam`.
      eps: as in `adam`.
      weight_decay: coefficient of the decay.
      amsgrad: as in `adam`.

    Raises:
      InputError: an argument is negative or not finite, or a beta is outside [0, 1).

    Example:
      >>> optimizer = jt.optimizers.adamw(1e-3, weight_decay=0.1)
    """
    check_arguments(adamw, locals())
    check_not_negative(weight_decay=weight_decay)
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
    """Returns RMSprop as `torch.optim.RMSprop` (Hinton's lecture; centered: Graves, 2013).

    Epsilon is added after the square root (optax: inside it), and the rate scales the momentum
    buffer when it is applied (optax: before it enters the buffer).

    Args:
      learning_rate: a number or an optax schedule.
      alpha: decay rate of the squared gradients.
      eps: added to the denominator.
      weight_decay: coefficient of the L2 penalty.
      momentum: factor of the momentum buffer; 0 disables it.
      centered: whether to divide by an estimate of the standard deviation instead.

    Raises:
      InputError: an argument is negative or not finite, or alpha is outside [0, 1).

    Example:
      >>> optimizer = jt.optimizers.rmsprop(1e-3, momentum=0.9)
    """
    check_arguments(rmsprop, locals())
    check_learning_rate(learning_rate)
    check_not_negative(eps=eps, momentum=momentum)
    check_fractions(alpha=(alpha,))
    scale_by = optax.scale_by_stddev if centered else optax.scale_by_rms
    return optax.chain(
        *_l2(weight_decay),
        scale_by(decay=alpha, eps=eps, eps_in_sqrt=False),
        *([optax.trace(momentum)] if is_used(momentum) else []),
        _scale_by_learning_rate(learning_rate),
    )


def rprop(
    learning_rate: LearningRate = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
) -> optax.GradientTransformation:
    """Returns resilient backpropagation as `torch.optim.Rprop` (Riedmiller & Braun, 1993).

    Each parameter has its own step size, which starts at `learning_rate`. It is multiplied by
    etas[1] while the gradient keeps its sign. When the sign changes, it is multiplied by etas[0]
    and the parameter is not updated in that step. optax's rprop applies each update one step late.

    Meant for full batches, since the noise of mini-batches changes signs.

    Args:
      learning_rate: the first step size of each parameter, a number.
      etas: factors by which a step size shrinks and grows.
      step_sizes: the smallest and the largest step size.

    Raises:
      InputError: an argument is negative or not finite, or etas or step_sizes are in the wrong
        order.

    Example:
      >>> optimizer = jt.optimizers.rprop(1e-2)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=len(train))
    """
    if callable(learning_rate):
        raise InputError(
            "the learning rate of rprop is a schedule; expected a number, since rprop adapts the "
            "step size of each parameter",
            argument="learning_rate",
        )
    check_arguments(rprop, locals())
    check_learning_rate(learning_rate)
    smallest, largest = step_sizes
    check_number("etas[0]", etas[0], lambda factor: 0 < factor < 1, "a factor in (0, 1)")
    check_number("etas[1]", etas[1], lambda factor: factor > 1, "a factor above 1")
    check_number("step_sizes[0]", smallest, lambda size: size >= 0, "the smallest, at least 0")
    check_number("step_sizes[1]", largest, lambda size: size >= smallest, "the largest")
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
    """Returns Adagrad as `torch.optim.Adagrad` (Duchi, Hazan & Singer, 2011).

    Epsilon is added after the square root (optax: inside it), the first accumulator is 0 (optax:
    0.1), and the rate of step t, counted from 0, is learning_rate / (1 + t · lr_decay).

    Args:
      learning_rate: a number or an optax schedule.
      lr_decay: decay of the rate.
      weight_decay: coefficient of the L2 penalty.
      initial_accumulator_value: first value of the sum of squared gradients.
      eps: added to the denominator.

    Raises:
      InputError: an argument is negative or not finite.

    Example:
      >>> optimizer = jt.optimizers.adagrad(1e-2)
    """
    check_learning_rate(learning_rate)
    check_not_negative(
        lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
    )
    rate = learning_rate
    if is_used(lr_decay):

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
    """Returns Adadelta as `torch.optim.Adadelta` (Zeiler, 2012, https://arxiv.org/abs/1212.5701).

    Weight decay is added to the gradient before it is scaled (optax: after).

    Args:
      learning_rate: a number or an optax schedule.
      rho: decay rate of the squared gradients and updates.
      eps: added inside both square roots.
      weight_decay: coefficient of the L2 penalty.

    Raises:
      InputError: an argument is negative or not finite, or rho is outside [0, 1).

    Example:
      >>> optimizer = jt.optimizers.adadelta(1.0)
    """
    check_learning_rate(learning_rate)
    check_not_negative(eps=eps)
    check_fractions(rho=(rho,))
    return optax.chain(
        *_l2(weight_decay),
        optax.scale_by_adadelta(rho, eps),
        _scale_by_learning_rate(learning_rate),
    )


def lbfgs(
    learning_rate: LearningRate = 1.0, history_size: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Returns L-BFGS with a line search, as `torch.optim.LBFGS(line_search_fn="strong_wolfe")`.

    (Liu & Nocedal, 1989; line search: Nocedal & Wright, Numerical Optimization, 2006, algorithm
    3.5.) One update is one iteration; PyTorch's `step` makes up to 20. The line search compares
    values of one function, so it needs full batches and a model without dropout. `minimize` runs
    L-BFGS without evaluating any point twice.

    Args:
      learning_rate: factor of the direction from which the line search starts.
      history_size: number of past steps that determine the direction.

    Raises:
      InputError: the rate is negative or not finite, or the history below 1.

    Example:
      >>> def rosenbrock(x):
      ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
      >>> optimizer = jt.optimizers.lbfgs()
      >>> result = jt.minimize(
      ...     rosenbrock, jnp.zeros(2), optimizer, max_steps=100, gradient_tolerance=1e-3
      ... )
      >>> jnp.round(result.params, 2)
      Array([1., 1.], dtype=float32)
    """
    check_learning_rate(learning_rate)
    check_integer(history_size, "history_size", minimum=1, maximum=2**31 - 1)
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
    """Returns the optimizer with a given name.

    Args:
      name: name of an optimizer of this module, such as "sgd".
      learning_rate: a number, or a schedule if the optimizer accepts one.
      **options: further arguments, such as momentum. One that the optimizer does not have must
        be 0.

    Raises:
      InputError: the name is unknown, or the optimizer lacks an option that is not 0.

    Example:
      >>> optimizer = jt.optimizers.make("sgd", 0.1, momentum=0.9)
      >>> optimizer = jt.optimizers.make("adam", 0.1, momentum=0.0)  # adam has no momentum
    """
    check_arguments(make, locals())
    if name not in OPTIMIZERS:
        raise InputError(f"the optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    for option, value in options.items():
        if option not in known and is_used(value):
            raise InputError(
                f"{option} is {value} with the optimizer {name}, which has no such option; "
                "expected 0, or an optimizer that has it",
                argument=option,
            )
    kept = {option: value for option, value in options.items() if option in known}
    return OPTIMIZERS[name](learning_rate, **kept)


def _scale_by_adam(
    learning_rate: LearningRate, betas: tuple[Number, Number], eps: Number, amsgrad: bool
) -> optax.GradientTransformation:
    check_learning_rate(learning_rate)
    check_not_negative(eps=eps)
    check_fractions(betas=betas)
    scale_by = scale_by_amsgrad if amsgrad else optax.scale_by_adam
    return scale_by(b1=betas[0], b2=betas[1], eps=eps)


def _l2(weight_decay: Number) -> list[optax.GradientTransformation]:
    """Returns PyTorch's L2 weight decay, which is added to the gradient first."""
    check_not_negative(weight_decay=weight_decay)
    return [optax.add_decayed_weights(weight_decay)] if is_used(weight_decay) else []


def _scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformation:
    scale = optax.inject_hyperparams(optax.scale_by_learning_rate, static_args="flip_sign")
    if callable(learning_rate):
        return scale(SettableSchedule(learning_rate))
    # A rate of 1 is a float as well, since the state keeps its dtype when another one is set.
    is_integer = jnp.issubdtype(jnp.result_type(learning_rate), jnp.integer)
    return scale(learning_rate * 1.0 if is_integer else learning_rate)
