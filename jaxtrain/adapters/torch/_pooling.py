"""Pooling, with channels last in this module."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.adapters.torch._rules import channels_last, family, pair

register = family("Pooling")


def max_pool(
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    count: int,
) -> Any:
    sizes = _windows(self, kernel_size, stride, padding, pair(dilation, count), ceil_mode)
    lowest = -jnp.inf if jnp.issubdtype(self.dtype, jnp.floating) else jnp.iinfo(self.dtype).min
    return _reduce(self, lowest, lax.max, *sizes, pair(dilation, count))


def avg_pool(
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    count: int,
) -> Any:
    window, strides, widths = _windows(self, kernel_size, stride, padding, (1,) * count, ceil_mode)
    total = _reduce(self, 0.0, lax.add, window, strides, widths)
    if divisor_override is not None:
        return total / divisor_override
    # Positions that `ceil_mode` adds are not counted, those of the padding only if it is asked for.
    counted = pair(padding, count) if count_include_pad else (0,) * count
    outside = [(a - p, b - p) for (a, b), p in zip(widths, counted, strict=True)]
    if set(outside) == {(0, 0)}:
        return total / math.prod(window)
    sizes = [n + 2 * p for n, p in zip(self.shape[1:-1], counted, strict=True)]
    ones = jnp.ones((1, *sizes, 1), self.dtype)
    return total / _reduce(ones, 0.0, lax.add, window, strides, outside)


def _reduce(
    x: Any, start: Any, function: Any, window: Any, strides: Any, padding: Any, dilation: Any = None
) -> Any:
    window, strides = (1, *window, 1), (1, *strides, 1)
    dilation = None if dilation is None else (1, *dilation, 1)
    padding = [(0, 0), *padding, (0, 0)]
    return lax.reduce_window(x, start, function, window, strides, padding, window_dilation=dilation)


def _windows(
    x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Any, Any, Any]:
    """Returns window, strides and padding of the last axes."""
    count = len(dilation)
    kernel = pair(kernel_size, count)
    strides = pair(stride, count) if stride else kernel
    widths = []
    for size, k, s, p, d in zip(
        x.shape[1:-1], kernel, strides, pair(padding, count), dilation, strict=True
    ):
        room = size + 2 * p - d * (k - 1) - 1
        steps = math.ceil(room / s) if ceil_mode else room // s
        if ceil_mode and steps * s >= size + p:  # a window must start inside
            steps -= 1
        widths.append((p, max(p, p + steps * s - room)))
    return kernel, strides, widths


def _adaptive(self: Any, output_size: Any, *, reduce: Any, count: int) -> Any:
    """Reduces each axis to a number of windows, which are as equal as possible."""
    for axis, size in zip(range(1, count + 1), pair(output_size, count), strict=True):
        length = self.shape[axis]
        if length % size == 0:
            split = (*self.shape[:axis], size, length // size, *self.shape[axis + 1 :])
            self = reduce(self.reshape(split), axis=axis + 1)
            continue
        starts = np.arange(size) * length // size
        ends = -(-(np.arange(size) + 1) * length // size)
        parts = [
            reduce(lax.slice_in_dim(self, int(a), int(b), axis=axis), axis=axis, keepdims=True)
            for a, b in zip(starts, ends, strict=True)
        ]
        self = jnp.concatenate(parts, axis)
    return self


_RULES: dict[str, Any] = {
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive_avg_pool": functools.partial(_adaptive, reduce=jnp.mean),
    # PyTorch returns the indices of the maxima as well.
    "adaptive_max_pool": lambda *args, count: (_adaptive(*args, reduce=jnp.max, count=count), None),
}
for _count in (1, 2, 3):
    for _name, _rule in _RULES.items():
        _function: Any = functools.partial(_rule, count=_count)
        register(f"aten.{_name}{_count}d", layout=channels_last)(_function)
