"""Dropout and random numbers, from the key of the training step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import family, pointwise
from jaxtrain.models import dropout as drop

register = family("Random numbers")


@register("aten.dropout", random=True, layout=pointwise)
def dropout(input: Any, p: float, train: bool, *, key: Any) -> Any:
    if not train or p == 0:
        return input
    return jnp.zeros_like(input) if p == 1 else drop(input, p, key)


@register("aten.randn", random=True)
def randn(size: Any, *, dtype: Any = None, key: Any) -> Any:
    return jax.random.normal(key, tuple(size), dtype or jnp.float32)


@register("aten.rand", random=True)
def rand(size: Any, *, dtype: Any = None, key: Any) -> Any:
    return jax.random.uniform(key, tuple(size), dtype or jnp.float32)


@register("aten.randn_like", random=True)
def randn_like(self: Any, *, dtype: Any = None, key: Any) -> Any:
    return jax.random.normal(key, self.shape, dtype or self.dtype)


@register("aten.rand_like", random=True)
def rand_like(self: Any, *, dtype: Any = None, key: Any) -> Any:
    return jax.random.uniform(key, self.shape, dtype or self.dtype)


@register("aten.normal.default", "aten.normal_functional", random=True)  # in place
def normal(self: Any, mean: Any = 0.0, std: Any = 1.0, *, key: Any) -> Any:
    return mean + std * jax.random.normal(key, self.shape, self.dtype)


@register("aten.uniform", random=True)
def uniform(self: Any, start: Any = 0.0, to: Any = 1.0, *, key: Any) -> Any:
    return jax.random.uniform(key, self.shape, self.dtype, start, to)


@register("aten.bernoulli", random=True)
def bernoulli(self: Any, p: Any = None, *, key: Any) -> Any:
    return jax.random.bernoulli(key, self if p is None else p, self.shape).astype(self.dtype)


@register("aten.bernoulli.float", random=True)  # in place
def bernoulli_(self: Any, p: float = 0.5, *, key: Any) -> Any:
    return bernoulli(self, p, key=key)


@register("aten.randint", "aten.randint.low", random=True)
def randint(*bounds: Any, dtype: Any = None, key: Any) -> Any:
    *limits, size = bounds
    low, high = limits if len(limits) == 2 else (0, *limits)
    return jax.random.randint(key, tuple(size), low, high, dtype or jnp.int32)


@register("aten.randperm", random=True)
def randperm(n: int, *, dtype: Any = None, key: Any) -> Any:
    return jax.random.permutation(key, n)


@register("prims.normal", random=True)  # torch.normal, randn and others that PyTorch decomposes
def normal_of(shape: Any, *, mean: Any, std: Any, dtype: Any = None, key: Any, **_: Any) -> Any:
    return mean + std * jax.random.normal(key, tuple(shape), dtype or jnp.float32)


@register("aten.multinomial", random=True)
def multinomial(self: Any, num_samples: int, replacement: bool = False, *, key: Any) -> Any:
    logits, shape = jnp.log(self), (*self.shape[:-1], num_samples)
    if replacement:
        return jax.random.categorical(key, logits[..., None, :], shape=shape)
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)  # the Gumbel top-k trick
    return jax.lax.top_k(noisy, num_samples)[1]
