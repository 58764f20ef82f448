"""jaxtrain as a peer: uint8 images, which the compiled step normalizes."""

from __future__ import annotations

from typing import Any

import jax

import jaxtrain as jt
from benchmarks.networks import linen
from benchmarks.problem import Optimizer, Params, Problem
from jaxtrain.race.contenders import JaxTrainer


def make_optimizer(optimizer: Optimizer) -> Any:
    """Returns the optimizer with PyTorch's numbers."""
    if optimizer.name == "sgd":
        return jt.optimizers.sgd(
            optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
    return getattr(jt.optimizers, optimizer.name)(optimizer.learning_rate)


def epochs(problem: Problem, params: Params) -> JaxTrainer:
    """Returns a trainer whose epoch is one call of `train_epoch`."""
    return _trainer(problem, params, "train_epoch")


def steps(problem: Problem, params: Params) -> JaxTrainer:
    """Returns a trainer whose epoch is a loop over `train_step`, on slices of NumPy arrays."""
    return _trainer(problem, params, "train_step")


def numba_epochs(problem: Problem, params: Params) -> JaxTrainer:
    """Returns the trainer of `epochs`, whose convolutions Numba compiles."""
    jt.use_cpu_lowerings(numba=True)
    return epochs(problem, params)


def numba_steps(problem: Problem, params: Params) -> JaxTrainer:
    """Returns the trainer of `steps`, whose convolutions Numba compiles."""
    jt.use_cpu_lowerings(numba=True)
    return steps(problem, params)


def _trainer(problem: Problem, params: Params, way: str) -> JaxTrainer:
    optimizer, model = make_optimizer(problem.optimizer), linen.make(problem)
    state = jt.init_state(model, optimizer, problem.images[:1], key=jax.random.key(0))
    state = state.replace(params=linen.load(problem, params))
    data = jt.Dataset(problem.images, problem.labels)
    return JaxTrainer(state, data, jt.losses.cross_entropy, problem.batch_size, way)
