"""Arithmetic, comparisons and other functions of each element."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, family, pointwise

register = family("Arithmetic and comparisons")


@register("aten.add", layout=pointwise)
def add(self: Any, other: Any, alpha: Any = 1) -> Any:
    return self + (other if alpha == 1 else alpha * other)


@register("aten.sub", "aten.subtract", layout=pointwise)
def sub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return self - (other if alpha == 1 else alpha * other)


@register("aten.div", "aten.divide", layout=pointwise)
def div(self: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return self // other
    quotient = self / other
    if rounding_mode is None:
        return quotient
    return jnp.trunc(quotient).astype(jnp.result_type(self, other))


@register("aten.clamp", "aten.clip", layout=pointwise)
def clamp(self: Any, min: Any = None, max: Any = None) -> Any:
    # The gradient at a limit is 1.
    self = self if min is None else jnp.where(self < min, min, self)
    return self if max is None else jnp.where(self > max, max, self)


@register("aten.pow", layout=pointwise)
def pow(self: Any, exponent: Any) -> Any:
    is_float = jnp.issubdtype(jnp.result_type(self), jnp.floating)
    if is_float and isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)  # also for negative bases
    if isinstance(self, jax.Array) and isinstance(exponent, int) and exponent < 0:
        return 1 / self**-exponent
    return jnp.asarray(self) ** exponent


add_all(
    register,
    {
        "mul multiply": lambda self, other: self * other,
        "floor_divide": lambda self, other: self // other,
        "remainder": jnp.remainder,
        "fmod": jnp.fmod,
        "neg negative": lambda self: -self,
        "reciprocal": lambda self: 1 / self,
        "rsqrt": jax.lax.rsqrt,
        "clamp_min": lambda self, min: clamp(self, min),
        "clamp_max": lambda self, max: clamp(self, None, max),
        "maximum max.other": jnp.maximum,
        "minimum min.other": jnp.minimum,
        "eq": lambda self, other: self == other,
        "ne not_equal": lambda self, other: self != other,
        "lt less": lambda self, other: self < other,
        "le less_equal": lambda self, other: self <= other,
        "gt greater": lambda self, other: self > other,
        "ge greater_equal": lambda self, other: self >= other,
        "bitwise_and __and__": lambda self, other: self & other,
        "bitwise_or __or__": lambda self, other: self | other,
        "bitwise_xor __xor__": lambda self, other: self ^ other,
        "bitwise_not": lambda self: ~self,
        "erf special_erf": jax.lax.erf,
        "abs absolute": jnp.abs,
        "atan2 arctan2": jnp.arctan2,
        **{
            name: getattr(jnp, name)
            for name in (
                *("exp", "expm1", "exp2", "log", "log1p", "log2", "log10", "sqrt", "sin", "cos"),
                *("tan", "sinh", "cosh", "tanh", "floor", "ceil", "round", "trunc", "sign"),
                *("isnan", "isinf", "isfinite", "logical_not", "logical_and", "logical_or"),
                "logical_xor",
            )
        },
        **{name: getattr(jnp, f"arc{name[1:]}") for name in ("asin", "acos", "atan")},
    },
    layout=pointwise,
)
