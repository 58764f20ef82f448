"""Learning rate schedules of `torch.optim.lr_scheduler` as optax schedules."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxtrain._arguments import check_arguments, check_integer, check_number
from jaxtrain.optimizers._numbers import Number, check_learning_rate, check_not_negative


class RateState(NamedTuple):
    """State of a `SettableSchedule`.

    Attributes:
      count: updates so far.
      is_fixed: whether the rate is `rate`, rather than that of the schedule.
      rate: the rate that was set.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name of a method of tuple
    is_fixed: Bool[Array, ""]
    rate: Float[Array, ""]


class SettableSchedule:
    """A schedule for `optax.inject_hyperparams` that `set_learning_rate` replaces by a constant."""

    def __init__(self, schedule: optax.Schedule) -> None:
        self.schedule = schedule

    def init(self) -> RateState:
        """Returns the state before the first update."""
        rate = jnp.zeros((), jnp.result_type(float))
        return RateState(jnp.zeros((), jnp.int32), jnp.zeros((), bool), rate)

    def update(self, state: RateState, **_: Any) -> RateState:
        """Returns the state after an update."""
        return state._replace(count=optax.safe_increment(state.count))

    def __call__(self, state: RateState, **_: Any) -> Float[Array, ""]:
        """Returns the rate of the next update."""
        rate = jnp.asarray(self.schedule(state.count))
        return jnp.where(state.is_fixed, state.rate.astype(rate.dtype), rate)


def step_lr(
    learning_rate: Number, step_size: int, gamma: Number = 0.1, *, steps_per_epoch: int = 1
) -> optax.Schedule:
    """Returns a schedule that multiplies the rate by `gamma` every `step_size` epochs.

    Same as `torch.optim.lr_scheduler.StepLR`.

    Args:
      learning_rate: the rate of the first epochs.
      step_size: epochs between two changes.
      gamma: factor of each change.
      steps_per_epoch: optimizer steps per epoch; with 1, `step_size` counts steps.

    Returns:
      A function from optimizer step to learning rate.

    Raises:
      InputError: an argument is out of range.

    Example:
      >>> schedule = jt.optimizers.step_lr(1.0, step_size=2, gamma=0.5)
      >>> [float(schedule(step)) for step in range(5)]
      [1.0, 1.0, 0.5, 0.5, 0.25]
      >>> optimizer = jt.optimizers.adadelta(schedule)
    """
    check_learning_rate(learning_rate)
    check_not_negative(gamma=gamma)
    check_integer(step_size, "step_size", minimum=1)
    check_integer(steps_per_epoch, "steps_per_epoch", minimum=1)
    steps = int(step_size * steps_per_epoch)

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        # Not optax.exponential_decay, which takes a gamma of 0 as no decay.
        return jnp.asarray(learning_rate) * jnp.asarray(gamma, jnp.float32) ** (count // steps)

    return schedule


def cosine_annealing_lr(
    learning_rate: Number, t_max: int, eta_min: Number = 0.0, *, steps_per_epoch: int = 1
) -> optax.Schedule:
    """Returns a schedule that falls along half a cosine, and rises again after `t_max` epochs.

    Same as `torch.optim.lr_scheduler.CosineAnnealingLR` (Loshchilov & Hutter, 2017,
    https://arxiv.org/abs/1608.03983, without restarts).

    Args:
      learning_rate: the rate at the start.
      t_max: epochs until the rate is `eta_min`.
      eta_min: the smallest rate.
      steps_per_epoch: optimizer steps per epoch; with 1, `t_max` counts steps.

    Returns:
      A function from optimizer step to learning rate.

    Raises:
      InputError: an argument is out of range.

    Example:
      >>> schedule = jt.optimizers.cosine_annealing_lr(1.0, t_max=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 25, 50, 75, 100)]
      [1.0, 0.854, 0.5, 0.146, 0.0]
      >>> optimizer = jt.optimizers.sgd(schedule, momentum=0.9)
    """
    check_learning_rate(learning_rate)
    check_not_negative(eta_min=eta_min)
    check_integer(t_max, "t_max", minimum=1)
    check_integer(steps_per_epoch, "steps_per_epoch", minimum=1)

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        rate = jnp.asarray(learning_rate, jnp.result_type(float))
        progress = (count // steps_per_epoch) / t_max
        return eta_min + (rate - eta_min) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return schedule


def linear_lr(
    learning_rate: Number,
    start_factor: float = 1 / 3,
    end_factor: float = 1.0,
    total_iters: int = 5,
    *,
    steps_per_epoch: int = 1,
) -> optax.Schedule:
    """Returns a schedule that changes linearly between two factors of the rate: a warmup.

    Same as `torch.optim.lr_scheduler.LinearLR`. Another schedule may follow, by
    `optax.join_schedules`, as in `torch.optim.lr_scheduler.SequentialLR`.

    Args:
      learning_rate: the rate that the factors multiply.
      start_factor: factor at the start.
      end_factor: factor after `total_iters` epochs and from then on.
      total_iters: epochs of the change.
      steps_per_epoch: optimizer steps per epoch; with 1, `total_iters` counts steps.

    Returns:
      A function from optimizer step to learning rate.

    Raises:
      InputError: an argument is out of range.

    Example:
      >>> warmup = jt.optimizers.linear_lr(1.0, 0.25, total_iters=3)
      >>> [float(warmup(step)) for step in range(5)]
      [0.25, 0.5, 0.75, 1.0, 1.0]
      >>> decay = jt.optimizers.cosine_annealing_lr(1.0, t_max=100)
      >>> schedule = optax.join_schedules([warmup, decay], [3])
    """
    check_learning_rate(learning_rate)
    check_not_negative(start_factor=start_factor, end_factor=end_factor)
    check_integer(total_iters, "total_iters", minimum=1)
    check_integer(steps_per_epoch, "steps_per_epoch", minimum=1)

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        rate = jnp.asarray(learning_rate, jnp.result_type(float))
        progress = jnp.minimum(count // steps_per_epoch, total_iters) / total_iters
        return rate * (start_factor + (end_factor - start_factor) * progress)

    return schedule


def one_cycle_lr(
    max_lr: Number,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> optax.Schedule:
    """Returns a schedule that rises to `max_lr` and falls far below the rate at the start.

    Same as `torch.optim.lr_scheduler.OneCycleLR` with `cycle_momentum=False` (Smith & Topin, 2019,
    https://arxiv.org/abs/1708.07120). After the last step, the rate stays.

    Args:
      max_lr: the largest rate.
      total_steps: optimizer steps of the whole cycle.
      pct_start: the fraction of the steps during which the rate rises.
      anneal_strategy: "cos" or "linear".
      div_factor: `max_lr` over the rate at the start.
      final_div_factor: the rate at the start over the rate at the end.
      three_phase: falls to the rate at the start first, in as many steps as it rose, and then to
        the end.

    Returns:
      A function from optimizer step to learning rate.

    Raises:
      InputError: an argument is out of range.

    Example:
      >>> schedule = jt.optimizers.one_cycle_lr(1.0, total_steps=101, pct_start=0.3)
      >>> [round(float(schedule(step)), 3) for step in (0, 15, 30, 100)]
      [0.04, 0.538, 1.0, 0.0]
      >>> optimizer = jt.optimizers.adam(schedule)
    """
    check_arguments(one_cycle_lr, locals())
    check_learning_rate(max_lr)
    check_integer(total_steps, "total_steps", minimum=1)
    check_number("pct_start", pct_start, lambda part: 0 <= part <= 1, "a number from 0 to 1")
    for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        check_number(name, value, lambda factor: factor > 0, "a number above 0")
    peak = pct_start * total_steps - 1
    last = total_steps - 1.0
    # The ends of the phases, in steps, and the factors of `max_lr` there.
    start, end = 1 / div_factor, 1 / div_factor / final_div_factor
    phases = [(peak, start, 1.0), (last, 1.0, end)]
    if three_phase:
        phases = [(peak, start, 1.0), (2 * pct_start * total_steps - 2, 1.0, start)]
        phases.append((last, start, end))

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.minimum(jnp.asarray(count, jnp.result_type(float)), last)
        factor = jnp.asarray(end, step.dtype)
        begins = [0.0, *(stop for stop, _, _ in phases[:-1])]
        for begin, (stop, first, second) in reversed(list(zip(begins, phases, strict=True))):
            length = stop - begin
            progress = jnp.where(length == 0, 1.0, (step - begin) / (length or math.inf))
            if anneal_strategy == "cos":
                value = second + (first - second) * (1 + jnp.cos(jnp.pi * progress)) / 2
            else:
                value = first * (1 - progress) + second * progress
            factor = jnp.where(step <= stop, value, factor)
        return jnp.asarray(max_lr, step.dtype) * factor

    return schedule
