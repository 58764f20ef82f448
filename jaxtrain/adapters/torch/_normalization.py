"""Batch, instance, group, layer and RMS norm; the first two with channels last."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import Update, along, channels_last, family, in_float32

register = family("Normalization")


@register("aten.batch_norm", layout=channels_last)
def batch_norm(
    input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *options: Any
) -> Any:
    axes = tuple(range(input.ndim - 1)) if training else None
    return _norm_with_statistics(input, weight, bias, mean, var, axes, *options)


@register("aten.instance_norm", layout=channels_last)
def instance_norm(
    input: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, *options: Any
) -> Any:
    axes = tuple(range(1, input.ndim - 1)) if use_input_stats else None
    return _norm_with_statistics(input, weight, bias, mean, var, axes, *options)


def _norm_with_statistics(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    axes: tuple[int, ...] | None,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """Normalizes by the statistics over some axes, or by the running ones; updates the latter."""
    if axes is None:
        return _normalize(input, running_mean, running_var, weight, bias, eps)
    mean, var = _statistics(input, axes)
    output = _normalize(input, mean, var, weight, bias, eps)
    if running_mean is None:
        return output
    count = math.prod(input.shape[axis] for axis in axes)
    means = (
        jnp.mean(s, tuple(range(s.ndim - 1))) for s in (mean, var * (count / max(count - 1, 1)))
    )
    running = zip((3, 4), (running_mean, running_var), means, strict=True)
    return Update(output, {i: old * (1 - momentum) + s * momentum for i, old, s in running})


@register("aten.group_norm")
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    groups = in_float32(input).reshape(input.shape[0], num_groups, -1)
    x = layer_norm(groups, groups.shape[-1:], eps=eps).reshape(input.shape)
    weight, bias = (s if s is None else along(s, 1, x.ndim) for s in (weight, bias))
    return _scaled(x, weight, bias).astype(input.dtype)


@register("aten.layer_norm")
def layer_norm(
    input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    mean, var = _statistics(input, tuple(range(-len(shape), 0)))
    return _normalize(input, mean, var, weight, bias, eps)


@register("aten.rms_norm")
def rms_norm(input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    x, axes = in_float32(input), tuple(range(-len(shape), 0))
    x = x / jnp.sqrt(jnp.mean(x * x, axes, keepdims=True) + eps)
    return _scaled(x, weight, None).astype(input.dtype)


def _statistics(input: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    x = in_float32(input)
    return jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)


def _normalize(input: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
    x = (in_float32(input) - mean) / jnp.sqrt(var + eps)
    return _scaled(x, weight, bias).astype(input.dtype)


def _scaled(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
