"""Flax NNX as a peer: a step under `nnx.jit`, on slices of NumPy arrays."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from benchmarks.problem import PIXELS, Params, Problem, Trainer, normalize


class FeedForward(nnx.Module):
    """The network, with ReLU and dropout after each hidden layer."""

    def __init__(self, problem: Problem, params: Params, rngs: nnx.Rngs) -> None:
        """Starts from these parameters."""
        widths = (PIXELS, *problem.features)
        layers = []
        for layer, (fan_in, width) in enumerate(itertools.pairwise(widths)):
            linear = nnx.Linear(fan_in, width, rngs=rngs)
            linear.kernel = nnx.Param(jnp.asarray(params[f"Dense_{layer}"]["kernel"]))
            linear.bias = nnx.Param(jnp.asarray(params[f"Dense_{layer}"]["bias"]))
            layers.append(linear)
        self.layers = nnx.List(layers)
        self.dropout = nnx.Dropout(problem.dropout_rate, rngs=rngs)

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Returns the logits."""
        x = jnp.asarray(inputs)
        for layer in self.layers[:-1]:
            x = self.dropout(nnx.relu(layer(x)))
        return self.layers[-1](x)


@nnx.jit
def train_step(
    model: FeedForward, optimizer: nnx.Optimizer, inputs: ArrayLike, targets: ArrayLike
) -> jax.Array:
    """Takes one step in place, and returns the loss before it."""

    def loss_fn(model: FeedForward) -> jax.Array:
        logits = model(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: FeedForward, inputs: ArrayLike) -> jax.Array:
    """Returns the most likely classes."""
    return model(inputs).argmax(-1)


def step_by_step(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a Python loop over the step."""
    model = FeedForward(problem, params, nnx.Rngs(0))
    model.train()
    sgd = optax.chain(
        optax.add_decayed_weights(problem.weight_decay), optax.sgd(problem.learning_rate)
    )
    optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)
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

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        model.eval()
        found = np.asarray(predict(model, normalize(images)))
        model.train()
        return float((found == labels).mean())

    return Trainer(steps, losses, losses, accuracy)
