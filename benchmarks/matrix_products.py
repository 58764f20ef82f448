"""Computes the matrix products of training steps alone, to compare a training step with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.flops import products
from benchmarks.problem import Problem


def _numpy_products(problem: Problem) -> Callable[[int], None]:
    shapes = products(problem.features, problem.batch_size)
    generator = np.random.default_rng(0)
    pairs = [
        (
            generator.standard_normal((m, k), np.float32),
            generator.standard_normal((k, n), np.float32),
            np.empty((m, n), np.float32),
        )
        for m, k, n in shapes
    ]

    def run(steps: int) -> None:
        for _ in range(steps):
            for left, right, out in pairs:
                np.matmul(left, right, out=out)

    return run


def _xla_products(problem: Problem) -> Callable[[int], None]:
    shapes = products(problem.features, problem.batch_size)
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = [
        (jax.random.normal(key, (m, k)), jax.random.normal(key, (k, n)))
        for key, (m, k, n) in zip(keys, shapes, strict=True)
    ]

    @jax.jit
    def loop(pairs: list[tuple[jax.Array, jax.Array]], steps: jax.Array) -> jax.Array:
        def body(_: jax.Array, carry: tuple[list, jax.Array]) -> tuple[list, jax.Array]:
            pairs, total = carry
            results = jax.lax.optimization_barrier([left @ right for left, right in pairs])
            total += sum(result[0, 0] for result in results)
            # Without a dependence on the previous iteration, XLA could compute them once.
            pairs = [(left.at[0, 0].add(1e-20 * total), right) for left, right in pairs]
            return pairs, total

        return jax.lax.fori_loop(0, steps, body, (pairs, jnp.float32(0)))[1]

    return lambda steps: jax.block_until_ready(loop(pairs, jnp.int32(steps)))


def _torch_products(problem: Problem) -> Callable[[int], None]:
    shapes = products(problem.features, problem.batch_size)
    import torch

    from benchmarks.peers.pytorch import device, wait

    place = device()
    pairs = [
        (
            torch.randn(m, k, device=place),
            torch.randn(k, n, device=place),
            torch.empty(m, n, device=place),
        )
        for m, k, n in shapes
    ]

    def run(steps: int) -> None:
        for _ in range(steps):
            for left, right, out in pairs:
                torch.mm(left, right, out=out)
        wait()

    return run


# Functions from a problem to `run(steps)`. The operands are the same in each step, and so are in
# the cache where they fit.
LOOPS = {
    "matrix products, NumPy": _numpy_products,
    "matrix products, XLA": _xla_products,
    "matrix products, PyTorch": _torch_products,
}
