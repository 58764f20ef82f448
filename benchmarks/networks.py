"""Many networks trained at once: a vmapped epoch of jaxtrain, and eager PyTorch one by one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from benchmarks.peers import ours
from benchmarks.problem import Problem, start

# How many networks -> a call that trains them for an epoch and returns each one's losses,
# [networks, steps]; network k starts at `start(problem, seed=k)`.
Sweep = Callable[[int], Callable[[], np.ndarray]]


def at_once(problem: Problem) -> Sweep:
    """All networks in one call."""
    state, data = ours.start(problem, start(problem))

    def epoch(params: object, key: jax.Array) -> jax.Array:
        fresh = state.replace(params=params, key=key)
        return jt.train_epoch(fresh, data, ours.LOSS, batch_size=problem.batch_size)[1]

    run = jax.jit(jax.vmap(epoch))

    def sweep(count: int) -> Callable[[], np.ndarray]:
        all_params = [start(problem, seed) for seed in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_params)
        keys = jax.random.split(jax.random.key(0), count)
        return lambda: np.asarray(run(stacked, keys))

    return sweep


def one_by_one(problem: Problem) -> Sweep:
    """Eager PyTorch, one network after another."""
    from benchmarks.peers import pytorch

    def sweep(count: int) -> Callable[[], np.ndarray]:
        trainers = [pytorch.eager(problem, start(problem, seed)) for seed in range(count)]
        return lambda: np.stack([trainer.losses() for trainer in trainers])

    return sweep
