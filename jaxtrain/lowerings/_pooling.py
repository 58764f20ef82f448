"""The gradient of max pooling by strided slices, where windows do not overlap."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Each element of a window is an operation of the program.
MAX_WINDOW = 64


def applies(
    source: Any,
    operand: Any,
    out: Any,
    *,
    select_prim: Any,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> bool:
    """Returns whether this is the gradient of a maximum over small windows that do not overlap."""
    return (
        select_prim is lax.ge_p
        and tuple(window_dimensions) == tuple(window_strides)
        and all(tuple(pair) == (0, 0) for pair in padding)
        and math.prod(window_dimensions) <= MAX_WINDOW
        and jnp.issubdtype(operand.dtype, jnp.floating)
    )


def max_pool_gradient(
    source: jax.Array, operand: jax.Array, *, window_dimensions: tuple[int, ...], **_: Any
) -> jax.Array:
    """Returns the gradient of the pooled array with respect to the array before pooling.

    The first of several equal maxima receives the whole gradient, as in XLA and in PyTorch.

    Args:
      source: gradient of the pooled array, one value per window.
      operand: the array that was pooled.
      window_dimensions: size of a window, which is also the stride.
    """
    window = window_dimensions
    ends = [count * size for count, size in zip(source.shape, window, strict=True)]
    taps = list(itertools.product(*map(range, window)))
    values = [lax.slice(operand, tap, ends, window) for tap in taps]
    maximum = functools.reduce(jnp.maximum, values)
    zero = jnp.zeros((), source.dtype)
    parts, taken = [], jnp.zeros(source.shape, bool)
    for tap, value in zip(taps, values, strict=True):
        hit = ~(value < maximum) & ~taken  # not `==`, which is False for NaN
        taken |= hit
        config = [
            (offset, length - offset - ((count - 1) * size + 1), size - 1)
            for offset, length, count, size in zip(
                tap, operand.shape, source.shape, window, strict=True
            )
        ]
        parts.append(lax.pad(jnp.where(hit, source, zero), zero, config))
    return functools.reduce(jnp.add, parts)
