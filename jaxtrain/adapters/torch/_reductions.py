"""Sums, means and other reductions, sorting and cumulative sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, family

register = family("Reductions and sorting")


def _axes(dim: Any) -> Any:
    """Returns axes as JAX takes them; no axes are all."""
    return dim if dim is None or isinstance(dim, int) else tuple(dim) or None


def _reduction(function: Any) -> Any:
    def reduce(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        options = {} if dtype is None else {"dtype": dtype}
        return function(self, axis=_axes(dim), keepdims=keepdim, **options)

    return reduce


@register("aten.var.correction")
def var(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    correction = 1 if correction is None else correction
    return jnp.var(self, axis=_axes(dim), ddof=correction, keepdims=keepdim)


@register("aten.std.correction")
def std(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return jnp.sqrt(var(self, dim, correction=correction, keepdim=keepdim))


@register("aten.linalg_vector_norm", "aten.norm")
def vector_norm(
    self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    x, ord = jnp.abs(self if dtype is None else self.astype(dtype)), 2 if ord is None else ord
    if ord in (float("inf"), float("-inf")):
        return (jnp.max if ord > 0 else jnp.min)(x, axis=_axes(dim), keepdims=keepdim)
    total = jnp.sum((x * x) if ord == 2 else x**ord, axis=_axes(dim), keepdims=keepdim)
    is_zero = total == 0  # where the gradient is 0
    return jnp.where(is_zero, 0, jnp.where(is_zero, 1, total) ** (1 / ord))


@register("aten.max.dim")
def max_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _selected(self, jnp.argmax(self, dim, keepdims=True), dim, keepdim)


@register("aten.min.dim")
def min_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _selected(self, jnp.argmin(self, dim, keepdims=True), dim, keepdim)


def _selected(self: Any, indices: Any, dim: int, keepdim: bool) -> Any:
    found = jnp.take_along_axis(self, indices, dim), indices
    return found if keepdim else tuple(x.squeeze(dim) for x in found)


@register("aten.kthvalue")
def kthvalue(self: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    indices = jax.lax.slice_in_dim(jnp.argsort(self, dim), k - 1, k, axis=dim)
    return _selected(self, indices, dim, keepdim)


@register("aten.median.dim")
def median(self: Any, dim: int, keepdim: bool = False) -> Any:
    return kthvalue(self, (self.shape[dim] + 1) // 2, dim, keepdim)


@register("aten.cummax")
def cummax(self: Any, dim: int) -> Any:
    return _cumulative(self, jax.lax.cummax(self, dim % self.ndim), dim)


@register("aten.cummin")
def cummin(self: Any, dim: int) -> Any:
    return _cumulative(self, jax.lax.cummin(self, dim % self.ndim), dim)


def _cumulative(self: Any, values: Any, dim: int) -> Any:
    """Returns cumulative extrema, and where the last of the equal ones is."""
    dim %= self.ndim
    positions = jax.lax.broadcasted_iota(jnp.int32, self.shape, dim)
    return values, jax.lax.cummax(jnp.where(self == values, positions, 0), dim)


@register("aten.sort")
def sort(self: Any, dim: int = -1, descending: bool = False, *, stable: Any = True) -> Any:
    indices = jnp.argsort(self, dim, descending=descending)
    return jnp.take_along_axis(self, indices, dim), indices


@register("aten.topk")
def topk(self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return tuple(jax.lax.slice_in_dim(x, 0, k, axis=dim) for x in sort(self, dim, largest))


add_all(
    register,
    {
        **{name: _reduction(getattr(jnp, name)) for name in ("sum", "mean", "prod")},
        **{name: _reduction(getattr(jnp, name)) for name in ("all", "any", "argmax", "argmin")},
        "amax max": _reduction(jnp.max),
        "amin min": _reduction(jnp.min),
        "logcumsumexp": lambda self, dim: jax.lax.cumlogsumexp(self, dim % self.ndim),
        "cumsum": lambda self, dim, *, dtype=None: jnp.cumsum(self, dim, dtype),
        "cumprod": lambda self, dim, *, dtype=None: jnp.cumprod(self, dim, dtype),
    },
)
