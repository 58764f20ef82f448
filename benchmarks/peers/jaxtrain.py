"""jaxtrain as a peer: uint8 images, which the compiled step normalizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from benchmarks.networks import linen
from benchmarks.peers import loop
from benchmarks.problem import Optimizer, Params, Problem, Trainer

LOSS = jt.losses.cross_entropy


def start(problem: Problem, params: Params) -> tuple[jt.TrainState, jt.Dataset]:
    """Returns the state with these parameters, and the data on the device."""
    data = jt.Dataset(jnp.asarray(problem.images), jnp.asarray(problem.labels))
    optimizer = make_optimizer(problem.optimizer)
    model = linen.make(problem)
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    return state.replace(params=linen.load(problem, params)), data


def make_optimizer(optimizer: Optimizer) -> Any:
    """Returns the optimizer with PyTorch's numbers."""
    if optimizer.name == "sgd":
        return jt.optimizers.sgd(
            optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
    return getattr(jt.optimizers, optimizer.name)(optimizer.learning_rate)


def epochs(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is one call of `train_epoch`."""
    return _trainer(problem, params, by_steps=False)


def steps(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a loop over `train_step`, on slices of NumPy arrays."""
    return _trainer(problem, params, by_steps=True)


def _trainer(problem: Problem, params: Params, *, by_steps: bool) -> Trainer:
    state, data = start(problem, params)

    def step(inputs: Any, targets: Any) -> jax.Array:
        nonlocal state
        state, metrics = jt.train_step(state, jt.Dataset(inputs, targets), LOSS)
        return metrics["loss"]

    def epoch() -> np.ndarray:
        nonlocal state
        state, losses = jt.train_epoch(state, data, LOSS, batch_size=problem.batch_size)
        return np.asarray(losses)

    def logits(images: jax.Array) -> Any:
        return jt.predict(state, images)

    made = loop.make_trainer(problem, step, logits, lambda: state, lambda: state.step, pixels=True)
    return made if by_steps else made._replace(epoch=epoch, losses=epoch)
