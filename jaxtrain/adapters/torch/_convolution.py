"""Convolutions, with channels last in this module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxtrain.adapters.torch._rules import channels_last, family, pair, promoted

register = family("Convolutions")


@register("aten.conv1d", "aten.conv2d", "aten.conv3d", layout=channels_last)
def conv(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    count = weight.ndim - 2
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(pair(dilation, count), weight.shape[2:], strict=True)]
        widths = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    else:
        widths = [(p, p) for p in pair(padding, count)]
    return _convolve(
        input,
        weight,
        bias,
        window_strides=pair(stride, count),
        padding=widths,
        rhs_dilation=pair(dilation, count),
        feature_group_count=groups,
    )


@register(
    *("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"),
    layout=channels_last,
)
def conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    count = weight.ndim - 2
    sizes = (pair(x, count) for x in (padding, output_padding, dilation))
    widths = [
        (d * (k - 1) - p, d * (k - 1) - p + o)
        for p, o, d, k in zip(*sizes, weight.shape[2:], strict=True)
    ]
    # The gradient of a convolution: the kernel [inputs, outputs / groups, *window] is reversed.
    weight = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    weight = jnp.flip(weight.reshape(-1, *weight.shape[2:]), range(2, count + 2))
    return _convolve(
        input,
        weight,
        bias,
        window_strides=(1,) * count,
        padding=widths,
        lhs_dilation=pair(stride, count),
        rhs_dilation=pair(dilation, count),
        feature_group_count=groups,
    )


def _convolve(input: Any, weight: Any, bias: Any, **options: Any) -> Any:
    input, weight, bias = promoted(input, weight, bias)
    axes = "DHW"[-(weight.ndim - 2) :]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    weight = jnp.moveaxis(weight, (1, 0), (-2, -1))
    output = lax.conv_general_dilated(input, weight, dimension_numbers=layout, **options)
    return output if bias is None else output + bias
