"""Batch, instance, group, layer and RMS norm; the first two with channels last."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxtrain.adapters.torch._rules import Update, along, channels_last, family, in_float32

register = family("Normalization")


@register("aten.batch_norm", layout=channels_last)
def batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    if not training:
        return _normalize(input, running_mean, running_var, weight, bias, eps)
    x, axes = in_float32(input), tuple(range(input.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    output = _normalize(input, mean, var, weight, bias, eps)
    if running_mean is None:
        return output
    count = input.size // input.shape[-1]
    return _running(output, running_mean, running_var, mean, var, momentum, count)


@register("aten.instance_norm", layout=channels_last)
def instance_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    if not use_input_stats:
        return _normalize(input, running_mean, running_var, weight, bias, eps)
    x, axes = in_float32(input), tuple(range(1, input.ndim - 1))
    mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    output = _normalize(input, mean, var, weight, bias, eps)
    if running_mean is None:
        return output
    mean, var = (jnp.mean(s, 0).reshape(-1) for s in (mean, var))
    count = math.prod(input.shape[1:-1])
    return _running(output, running_mean, running_var, mean, var, momentum, count)


def _running(
    output: Any, running_mean: Any, running_var: Any, mean: Any, var: Any, momentum: Any, count: Any
) -> Update:
    """Returns the output with the new running statistics, whose variance is unbiased."""
    mean = running_mean * (1 - momentum) + mean * momentum
    var = running_var * (1 - momentum) + var * (momentum * (count / (count - 1)))
    return Update(output, {3: mean, 4: var})


@register("aten.group_norm")
def group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = False,
) -> Any:
    groups = in_float32(input).reshape(input.shape[0], num_groups, -1)
    x = layer_norm(groups, groups.shape[-1:], eps=eps).reshape(input.shape)
    weight, bias = (s if s is None else along(s, 1, x.ndim) for s in (weight, bias))
    return _scaled(x, weight, bias).astype(input.dtype)


@register("aten.layer_norm")
def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> Any:
    x, axes = in_float32(input), tuple(range(-len(normalized_shape), 0))
    mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    return _normalize(input, mean, var, weight, bias, eps)


@register("aten.rms_norm")
def rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    x, axes = in_float32(input), tuple(range(-len(normalized_shape), 0))
    x = x / jnp.sqrt(jnp.mean(x * x, axes, keepdims=True) + eps)
    return _scaled(x, weight, None).astype(input.dtype)


def _normalize(input: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
    x = (in_float32(input) - mean) / jnp.sqrt(var + eps)
    return _scaled(x, weight, bias).astype(input.dtype)


def _scaled(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
