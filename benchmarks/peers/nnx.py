"""Flax NNX as a peer: a step under `nnx.jit`, as in Flax's MNIST tutorial."""

from __future__ import annotations

import jax
import optax
from flax import nnx
from jax.typing import ArrayLike

from benchmarks.networks import nnx as networks
from benchmarks.peers import loop
from benchmarks.problem import Params, Problem, Trainer


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
    optimizer = nnx.Optimizer(model, loop.make_optimizer(problem.optimizer), wrt=nnx.Param)

    def predict(images: jax.Array) -> jax.Array:
        model.eval()
        logits = logits_of(model, images)
        model.train()
        return logits

    return loop.make_trainer(
        problem,
        lambda inputs, targets: train_step(model, optimizer, inputs, targets),
        predict,
        lambda: nnx.state(model),
        lambda: optimizer.step[...],
    )
