"""Convolutions and resampling, with channels last in this module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.adapters.torch._rules import channels_last, family, pair, promoted

register = family("Convolutions and resampling")


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


@register(
    *(f"aten.upsample_nearest{n}d.vec" for n in (1, 2, 3)),
    layout=channels_last,
)
def upsample_nearest(input: Any, output_size: Any, scale_factors: Any) -> Any:
    for axis, (size, step) in enumerate(_sizes(input, output_size, scale_factors), 1):
        input = _interpolate(input, axis, np.floor(np.arange(size) * np.float32(step)))
    return input


@register(
    *(
        "aten.upsample_linear1d.vec",
        "aten.upsample_bilinear2d.vec",
        "aten.upsample_trilinear3d.vec",
    ),
    layout=channels_last,
)
def upsample_linear(input: Any, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
    for axis, (size, step) in enumerate(_sizes(input, output_size, scale_factors), 1):
        positions = np.maximum((np.arange(size) + 0.5) * step - 0.5, 0)
        if align_corners:
            positions = np.linspace(0, input.shape[axis] - 1, size)
        input = _interpolate(input, axis, positions)
    return input


def _sizes(input: Any, output_size: Any, scale_factors: Any) -> list[tuple[int, float]]:
    """Returns the size of the output along each axis, and the step between its positions."""
    lengths = input.shape[1:-1]
    if scale_factors is None:
        return [(size, n / size) for n, size in zip(lengths, output_size, strict=True)]
    return [(int(n * f), 1 / f) for n, f in zip(lengths, scale_factors, strict=True)]


def _interpolate(x: Any, axis: int, positions: np.ndarray) -> Any:
    """Returns the values at positions along an axis, as a product with a matrix of weights."""
    length = x.shape[axis]
    distances = np.minimum(positions, length - 1)[:, None] - np.arange(length)
    matrix = jnp.asarray(np.maximum(1 - np.abs(distances), 0), x.dtype)
    product = jnp.tensordot(x, matrix, ((axis,), (1,)), precision="highest")
    return jnp.moveaxis(product, -1, axis)
