"""Learning rate schedules of `torch.optim.lr_scheduler` as optax schedules."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxtrain._arguments import check_integer
from jaxtrain.optimizers._numbers import Number, check_learning_rate, check_not_negative


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
      >>> schedule = jt.optimizers.step_lr(1.0, step_size=1, gamma=0.7, steps_per_epoch=938)
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
