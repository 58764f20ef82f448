"""Trains many networks: in one vmapped epoch of jaxtrain, and one by one in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from benchmarks.peers import jaxtrain as jaxtrain_peer
from benchmarks.problem import Problem, start

# From a number of networks to a function that trains them for an epoch and returns their losses
# [networks, steps]. Network k starts from `start(problem, seed=k)`.
Sweep = Callable[[int], Callable[[], np.ndarray]]


def jaxtrain_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains all networks in one compiled call."""
    state, data = jaxtrain_peer.start(problem, start(problem))

    def epoch(params: object, key: jax.Array) -> jax.Array:
        fresh = state.replace(params=params, key=key)
        return jt.train_epoch(fresh, data, jaxtrain_peer.LOSS, batch_size=problem.batch_size)[1]

    run = jax.jit(jax.vmap(epoch))

    def sweep(count: int) -> Callable[[], np.ndarray]:
        all_params = [start(problem, seed) for seed in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_params)
        keys = jax.random.split(jax.random.key(0), count)
        return lambda: np.asarray(run(stacked, keys))

    return sweep


def pytorch_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains one network after another in eager PyTorch."""
    from benchmarks.peers import pytorch

    def sweep(count: int) -> Callable[[], np.ndarray]:
        trainers = [pytorch.eager(problem, start(problem, seed)) for seed in range(count)]
        return lambda: np.stack([trainer.losses() for trainer in trainers])

    return sweep
