"""Indexing, gathering, masking, copies and conversions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, family
from jaxtrain.errors import InputError

register = family("Indexing, masks and copies")


def _places(index: Any, dim: int) -> tuple[Any, ...]:
    """Returns an index into an array for `torch.gather` and `torch.scatter`."""
    grid = list(jnp.meshgrid(*map(jnp.arange, index.shape), indexing="ij", sparse=True))
    grid[dim] = index
    return tuple(grid)


def _index(indices: Any) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else i for i in indices)


@register("aten.gather")
def gather(self: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    return self[_places(index, dim)]


@register("aten.scatter")
def scatter(self: Any, dim: int, index: Any, src: Any) -> Any:
    places = _places(index, dim)
    values = src[tuple(map(slice, index.shape))] if isinstance(src, jax.Array) and src.ndim else src
    return self.at[places].set(values)


@register("aten.scatter_add")
def scatter_add(self: Any, dim: int, index: Any, src: Any) -> Any:
    return self.at[_places(index, dim)].add(src[tuple(map(slice, index.shape))])


@register("aten.scatter_reduce")
def scatter_reduce(
    self: Any, dim: int, index: Any, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if reduce == "prod":
        raise InputError("JAX has no gradient of a product over repeated indices")
    places, values = _places(index, dim), src[tuple(map(slice, index.shape))]
    if not include_self:  # the first value replaces it
        extreme = {"amax": "min", "amin": "max"}.get(reduce)
        start = getattr(_info(self.dtype), extreme) if extreme else 0
        self = self.at[places].set(jnp.asarray(start, self.dtype))
    if reduce == "mean":
        counts = jnp.full_like(self, include_self).at[places].add(1)
        total, counts = self.at[places].add(values), jnp.maximum(counts, 1)
        return total / counts if jnp.issubdtype(self.dtype, jnp.inexact) else total // counts
    method = {"sum": "add", "amax": "max", "amin": "min"}[reduce]
    return getattr(self.at[places], method)(values)


def _info(dtype: Any) -> Any:
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo)(dtype)


@register("aten.index_put")
def index_put(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    place = self.at[_index(indices)]
    return place.add(values) if accumulate else place.set(values)


@register("aten.index_select")
def index_select(self: Any, dim: int, index: Any) -> Any:
    return jnp.take(self, index, axis=dim)


@register("aten.where")
def where(condition: Any, self: Any, other: Any) -> Any:
    return jnp.where(condition, self, other)


@register("aten.masked_fill")
def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(value, self.dtype), self)


@register("aten.to", "aten._to_copy", "aten.type_as")
def to(self: Any, other: Any = None, *_: Any, dtype: Any = None, **__: Any) -> Any:
    dtype = dtype or getattr(other, "dtype", other)
    return self if dtype is None else self.astype(dtype)


@register("aten.to.device")
def to_device(self: Any, device: Any, dtype: Any, *_: Any) -> Any:
    return self.astype(dtype)


add_all(
    register,
    {
        "index": lambda self, indices: self[_index(indices)],
        "contiguous clone alias lift_fresh_copy": lambda self: self,
        "detach": jax.lax.stop_gradient,
        "copy": lambda self, src: src,
        "fill": lambda self, value: jnp.full_like(self, value),
        "zero": jnp.zeros_like,
    },
)
for _name in ("_assert_tensor_metadata", "_assert_scalar", "_assert_async"):
    register(f"aten.{_name}")(lambda *_, **__: None)
