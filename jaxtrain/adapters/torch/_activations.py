"""Activation functions, with the gradients of PyTorch where a function has a kink."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import add_all, along, family, pointwise

register = family("Activations")


@register("aten.gelu", layout=pointwise)
def gelu(self: Any, *, approximate: str = "none") -> Any:
    return jax.nn.gelu(self, approximate=approximate == "tanh")


@register("aten.leaky_relu", layout=pointwise)
def leaky_relu(self: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(self > 0, self, self * negative_slope)


@register("aten.prelu")
def prelu(self: Any, weight: Any) -> Any:
    slope = along(weight, 1, self.ndim) if weight.size > 1 else weight.reshape(())
    return jnp.where(self > 0, self, self * slope)


@register("aten.elu", layout=pointwise)
def elu(self: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    negative = alpha * jnp.expm1(jnp.where(self > 0, 0.0, self) * input_scale)
    return scale * jnp.where(self > 0, self, negative)


@register("aten.hardtanh", layout=pointwise)
def hardtanh(self: Any, min_val: float = -1, max_val: float = 1) -> Any:
    inside = (self > min_val) & (self < max_val)  # the gradient at a limit is 0
    return jnp.where(inside, self, jnp.where(self <= min_val, min_val, max_val))


@register("aten.softmax")
def softmax(self: Any, dim: int, dtype: Any = None) -> Any:
    return jax.nn.softmax(self if dtype is None else self.astype(dtype), dim)


@register("aten.log_softmax")
def log_softmax(self: Any, dim: int, dtype: Any = None) -> Any:
    return jax.nn.log_softmax(self if dtype is None else self.astype(dtype), dim)


# The last argument is whether half precision becomes float32, which is so on GPUs alone.
add_all(
    register,
    {
        "_softmax": lambda self, dim, half_to_float: softmax(self, dim),
        "_log_softmax": lambda self, dim, half_to_float: log_softmax(self, dim),
    },
)
add_all(
    register,
    {
        "relu": jax.nn.relu,
        "relu6": lambda self: hardtanh(self, 0, 6),
        "sigmoid": jax.nn.sigmoid,
        "silu": jax.nn.silu,
    },
    layout=pointwise,
)
