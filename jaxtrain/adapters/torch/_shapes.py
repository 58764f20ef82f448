"""Views, joins, splits and other changes of shape."""

from __future__ import annotations

import math
import sys
from typing import Any

import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, family

register = family("Shapes")


@register("aten.flatten")
def flatten(self: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % max(self.ndim, 1), end_dim % max(self.ndim, 1)
    return self.reshape((*self.shape[:start], -1, *self.shape[end + 1 :]))


@register("aten.unflatten")
def unflatten(self: Any, dim: int, sizes: Any) -> Any:
    dim %= self.ndim
    return self.reshape((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))


@register("aten.squeeze")
def squeeze(self: Any, dim: Any = None) -> Any:
    dims = range(self.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    return jnp.squeeze(self, tuple(d for d in dims if self.shape[d] == 1))


@register("aten.expand", "aten.broadcast_to")
def expand(self: Any, size: Any, *, implicit: bool = False) -> Any:
    shape = (*(1,) * (len(size) - self.ndim), *self.shape)
    sizes = [n if isinstance(s, int) and s == -1 else s for s, n in zip(size, shape, strict=True)]
    return jnp.broadcast_to(self, sizes)


@register("aten.roll")
def roll(self: Any, shifts: Any, dims: Any = ()) -> Any:
    return jnp.roll(self, tuple(shifts), tuple(dims) or None)


@register("aten.slice")
def slice_(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    end = None if isinstance(end, int) and end >= sys.maxsize else end
    return self[(*(slice(None),) * (dim % self.ndim), slice(start or None, end, step))]


@register("aten.select")
def select(self: Any, dim: int, index: Any) -> Any:
    return self[(*(slice(None),) * (dim % self.ndim), index)]


@register("aten.split", "aten.split_with_sizes")
def split(self: Any, split_size: Any, dim: int = 0) -> Any:
    length = self.shape[dim]
    if isinstance(split_size, int):
        starts = list(range(0, length, split_size))
        return [slice_(self, dim, start, min(start + split_size, length)) for start in starts]
    ends = [sum(split_size[: i + 1]) for i in range(len(split_size))]
    return [slice_(self, dim, e - s, e) for s, e in zip(split_size, ends, strict=True)]


@register("aten.chunk")
def chunk(self: Any, chunks: int, dim: int = 0) -> Any:
    return split(self, -(-self.shape[dim] // chunks), dim)


@register("aten.unbind")
def unbind(self: Any, dim: int = 0) -> Any:
    return [select(self, dim, i) for i in range(self.shape[dim])]


@register("aten.repeat", "aten.tile")
def repeat(self: Any, repeats: Any) -> Any:
    return jnp.tile(self, tuple(repeats))


@register("aten.repeat_interleave")
def repeat_interleave(self: Any, repeats: Any, dim: int | None = None, **_: Any) -> Any:
    return jnp.repeat(self, repeats, axis=dim)


@register("aten.pad")
def pad(self: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    pairs = [(low, high) for low, high in zip(pad[::2], pad[1::2], strict=True)]
    widths = [(0, 0)] * (self.ndim - len(pairs)) + pairs[::-1]
    for axis, (low, high) in enumerate(widths):  # negative widths remove
        if min(low, high) < 0:
            self = slice_(self, axis, max(-low, 0), self.shape[axis] - max(-high, 0))
    widths = [(max(low, 0), max(high, 0)) for low, high in widths]
    if mode == "constant":
        return jnp.pad(self, widths, constant_values=0 if value is None else value)
    return jnp.pad(
        self, widths, {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    )


@register("aten.unfold")
def unfold(self: Any, dimension: int, size: int, step: int) -> Any:
    axis = dimension % self.ndim
    starts = range(0, self.shape[axis] - size + 1, step)
    windows = jnp.stack([slice_(self, axis, start, start + size) for start in starts], axis)
    return jnp.moveaxis(windows, axis + 1, -1)


add_all(
    register,
    {
        "constant_pad_nd": lambda self, widths, value=0: pad(self, widths, "constant", value),
        "view reshape _unsafe_view": lambda self, size: self.reshape(tuple(size)),
        "permute": lambda self, dims: self.transpose(tuple(dims)),
        "transpose swapaxes swapdims": jnp.swapaxes,
        "t numpy_T mT": lambda self: self if self.ndim < 2 else self.swapaxes(-1, -2),
        "unsqueeze": jnp.expand_dims,
        "cat concat concatenate": lambda tensors, dim=0: jnp.concatenate(tensors, dim),
        "stack": lambda tensors, dim=0: jnp.stack(tensors, dim),
        "flip": lambda self, dims: jnp.flip(self, tuple(dims)),
        "diagonal": lambda self, offset=0, dim1=0, dim2=1: jnp.diagonal(self, offset, dim1, dim2),
        "numel": lambda self: math.prod(self.shape),
        "sym_numel": lambda self: math.prod(self.shape),
        "size sym_size": lambda self, dim: self.shape[dim],
    },
)
