"""Flax NNX as a peer: a step under `nnx.jit`, as in Flax's MNIST tutorial."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from benchmarks.networks import nnx as networks
from benchmarks.peers.optax_optimizers import make_optimizer
from benchmarks.problem import Params, Problem, Trainer, normalize


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, inputs: ArrayLike, targets: ArrayLike
) -> jax.Array:
    """Takes one step in place, and returns the loss before it."""

    def loss_fn(model: nnx.Module) -> jax.Array:
        logits = model(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def logits_of(model: nnx.Module, inputs: ArrayLike) -> jax.Array:
    """Returns the logits."""
    return model(inputs)


def step_by_step(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a Python loop over the step."""
    model = networks.make(problem, params)
    model.train()
    optimizer = nnx.Optimizer(model, make_optimizer(problem.optimizer), wrt=nnx.Param)
    inputs, targets = normalize(problem.images), problem.labels.astype(np.int32)
    first = jnp.asarray(inputs[: problem.batch_size]), jnp.asarray(targets[: problem.batch_size])

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(model, optimizer, *first)
        jax.block_until_ready(nnx.state(model))

    def losses() -> np.ndarray:
        collected = []
        for index in range(problem.steps):
            part = slice(index * problem.batch_size, (index + 1) * problem.batch_size)
            collected.append(train_step(model, optimizer, inputs[part], targets[part]))
        return np.asarray(jax.block_until_ready(jnp.stack(collected)))

    def prepare(images: np.ndarray) -> jax.Array:
        return jnp.asarray(normalize(images))

    def predict(images: jax.Array) -> np.ndarray:
        model.eval()
        logits = np.asarray(logits_of(model, images))
        model.train()
        return logits

    return Trainer(steps, losses, losses, prepare, predict, lambda: int(optimizer.step[...]))
