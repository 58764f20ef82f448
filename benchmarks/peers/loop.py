"""Parts of the peers that train step by step with optax, on slices of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problem import Optimizer, Problem, Trainer, normalize


def make_trainer(
    problem: Problem,
    step: Callable[[Any, Any], jax.Array],
    logits: Callable[[Any], Any],
    state: Callable[[], Any],
    updates: Callable[[], Any],
) -> Trainer:
    """Returns the trainer whose epoch is a Python loop over the step.

    Args:
      problem: the problem.
      step: takes a step on inputs and targets, changes the peer's state, and returns the loss.
      logits: returns the logits of inputs.
      state: returns the arrays of the state, which the last step computes.
      updates: returns how many steps the state has made.
    """
    inputs, targets = normalize(problem.images), problem.labels.astype(np.int32)
    first = jnp.asarray(inputs[: problem.batch_size]), jnp.asarray(targets[: problem.batch_size])

    def steps(count: int) -> None:
        for _ in range(count):
            step(*first)
        jax.block_until_ready(state())

    def losses() -> np.ndarray:
        collected = []
        for index in range(problem.steps):
            part = slice(index * problem.batch_size, (index + 1) * problem.batch_size)
            collected.append(step(inputs[part], targets[part]))
        return np.asarray(jax.block_until_ready(jnp.stack(collected)))

    return Trainer(
        repeated(losses),
        losses,
        steps,
        lambda images: np.asarray(logits(jnp.asarray(images))),
        lambda: int(updates()),
    )


def repeated(losses: Callable[[], np.ndarray]) -> Callable[[int], np.ndarray]:
    """Returns a function that makes passes, and returns the losses of the last one."""
    return lambda passes: [losses() for _ in range(passes)][-1]


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformation:
    """Returns the optimizer with PyTorch's defaults."""
    if optimizer.name == "adam":
        return optax.adam(optimizer.learning_rate)
    if optimizer.name == "adadelta":
        return optax.adadelta(optimizer.learning_rate)
    sgd = optax.sgd(optimizer.learning_rate, momentum=optimizer.momentum or None)
    if not optimizer.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(optimizer.weight_decay), sgd)
