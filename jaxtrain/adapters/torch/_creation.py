"""Arrays of constants."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, family

register = family("Constants")


@register("aten.arange", "aten.arange.start_step")
def arange(*limits: Any, dtype: Any = None) -> Any:
    is_float = any(isinstance(x, float) for x in limits)
    values: Any = jnp.arange(*limits)
    return values.astype(dtype or (jnp.float32 if is_float else jnp.int32))


@register("aten.full")
def full(size: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    return jnp.full(tuple(size), fill_value, dtype)


@register("aten.eye")
def eye(n: int, m: int | None = None, *, dtype: Any = None) -> Any:
    return jnp.eye(n, m, dtype=dtype or jnp.float32)


add_all(
    register,
    {
        "zeros empty": lambda size, *, dtype=None: jnp.zeros(tuple(size), dtype),
        "ones": lambda size, *, dtype=None: jnp.ones(tuple(size), dtype),
        "zeros_like empty_like": lambda self, *, dtype=None: jnp.zeros_like(self, dtype),
        "ones_like": lambda self, *, dtype=None: jnp.ones_like(self, dtype),
        "full_like": lambda self, fill_value, *, dtype=None: jnp.full_like(self, fill_value, dtype),
        "new_zeros new_empty": lambda self, size, *, dtype=None: jnp.zeros(
            tuple(size), dtype or self.dtype
        ),
        "new_ones": lambda self, size, *, dtype=None: jnp.ones(tuple(size), dtype or self.dtype),
        "new_full": lambda self, size, fill_value, *, dtype=None: jnp.full(
            tuple(size), fill_value, dtype or self.dtype
        ),
        "linspace": lambda start, end, steps, *, dtype=None: jnp.linspace(
            start, end, steps, dtype=dtype
        ),
        "scalar_tensor": lambda s, *, dtype=None: jnp.asarray(s, dtype),
    },
)
