"""The floor: what a training step must at least compute and move, counted and then measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.problem import PIXELS, Problem

FLOAT_BYTES = 4


class Product(NamedTuple):
    """A matrix product [m, k] @ [k, n]."""

    m: int
    k: int
    n: int


class Work(NamedTuple):
    """What one training step costs at least.

    Attributes:
      flops: multiplications and additions of its matrix products.
      bytes: memory traffic if nothing stays in a cache between the passes: parameters read
        forward, backward and by the update, written once; gradients written and read; the batch
        read, each layer's output written forward and read backward.
    """

    flops: int
    bytes: int


def products(features: Sequence[int], batch_size: int) -> list[Product]:
    """The matrix products of a step: forward, gradient of each kernel, of each input but the first.

    (The images need no gradient.)
    """
    found = []
    fan_in = PIXELS
    for layer, width in enumerate(features):
        found += [Product(batch_size, fan_in, width), Product(fan_in, batch_size, width)]
        if layer:
            found.append(Product(batch_size, width, fan_in))
        fan_in = width
    return found


def step_work(features: Sequence[int], batch_size: int) -> Work:
    """Counted work of one step."""
    widths = (PIXELS, *features)
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    outputs = batch_size * sum(features)
    flops = sum(2 * m * k * n for m, k, n in products(features, batch_size))
    moved = 6 * parameters + batch_size * PIXELS + 2 * outputs
    return Work(flops, FLOAT_BYTES * moved)


def epoch_work(problem: Problem) -> Work:
    """Counted work of an epoch, the partial last batch included."""
    full, tail = divmod(len(problem.images), problem.batch_size)
    sizes = [problem.batch_size] * full + [tail] * bool(tail)
    steps = [step_work(problem.features, size) for size in sizes]
    return Work(sum(step.flops for step in steps), sum(step.bytes for step in steps))


def floors(problem: Problem) -> dict[str, Callable[[int], None]]:
    """The matrix products of so many steps alone, by each BLAS at hand: name -> run(steps).

    The operands stay the same from step to step, as warm in the cache as they can be.
    """
    shapes = products(problem.features, problem.batch_size)
    runs = {
        "matrix products, NumPy": _numpy_products(shapes),
        "matrix products, XLA": _xla_products(shapes),
    }
    try:
        import torch
    except ModuleNotFoundError:
        return runs
    runs["matrix products, PyTorch"] = _torch_products(shapes)
    if torch.cuda.is_available():  # a BLAS on the host would be no floor for a GPU
        del runs["matrix products, NumPy"]
    return runs


def _numpy_products(shapes: Sequence[Product]) -> Callable[[int], None]:
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


def _xla_products(shapes: Sequence[Product]) -> Callable[[int], None]:
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
            # Each round depends on the one before, or XLA would compute it once.
            pairs = [(left.at[0, 0].add(1e-20 * total), right) for left, right in pairs]
            return pairs, total

        return jax.lax.fori_loop(0, steps, body, (pairs, jnp.float32(0)))[1]

    return lambda steps: jax.block_until_ready(loop(pairs, jnp.int32(steps)))


def _torch_products(shapes: Sequence[Product]) -> Callable[[int], None]:
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
