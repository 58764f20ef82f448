"""Counts the FLOPs of training steps, and the bytes that they move at least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.problem import PIXELS, Problem

FLOAT_BYTES = 4


class Product(NamedTuple):
    """A matrix product [m, k] @ [k, n]."""

    m: int
    k: int
    n: int


class Work(NamedTuple):
    """The least work of some training steps.

    Attributes:
      flops: multiplications and additions of the matrix products.
      bytes: memory traffic if nothing stays in a cache between the passes: parameters read
        forward, backward and by the update, and written once; gradients written and read; the
        batch read; each layer's output written forward and read backward.
    """

    flops: int
    bytes: int


def products(features: Sequence[int], batch_size: int) -> list[Product]:
    """Returns the matrix products of a step.

    These are the forward product, the gradient of the kernel and the gradient of the input of each
    layer; the input of the first layer needs no gradient.
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
    """Returns the work of one step."""
    widths = (PIXELS, *features)
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    outputs = batch_size * sum(features)
    flops = sum(2 * m * k * n for m, k, n in products(features, batch_size))
    moved = 6 * parameters + batch_size * PIXELS + 2 * outputs
    return Work(flops, FLOAT_BYTES * moved)


def epoch_work(problem: Problem) -> Work:
    """Returns the work of an epoch, including the partial last batch."""
    full, tail = divmod(len(problem.images), problem.batch_size)
    sizes = [problem.batch_size] * full + [tail] * bool(tail)
    steps = [step_work(problem.features, size) for size in sizes]
    return Work(sum(step.flops for step in steps), sum(step.bytes for step in steps))
