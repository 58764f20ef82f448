"""Convolutions as matrix products, or as the one kind that XLA:CPU runs fast inside a loop.

A training step has three convolutions per layer, and each has another shape:

- the output: many positions, few taps in the window. With few channels an unpadded NHWC
  convolution is fast as it is; else one product per row of the window is faster;
- the input's gradient: padded, with the kernel reversed, dilated where the layer has strides. The
  products of all inputs with each tap are summed, shifted by the position of the tap;
- the weight's gradient: the window is an image of the output's gradient, and the results are few,
  one per tap. Each result is one product that contracts examples and positions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NAMES = ("NHWC", "HWIO", "NHWC")
# Below this many channels, one product per tap is slower than a convolution.
MIN_CHANNELS = 16
# Folding the taps of the last axis into the channels copies the images once per tap.
MAX_FOLDED = 8
# Each product is an operation of the program, which must not grow without a bound.
MAX_PRODUCTS = 256


def applies(
    lhs: Any,
    rhs: Any,
    out: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> bool:
    """Returns whether `convolve` takes a convolution that is not fast already."""
    del window_strides
    if lhs.ndim not in (3, 4) or 0 in (*lhs.shape, *rhs.shape, *out.shape):
        return False
    if {lhs.dtype, rhs.dtype, out.dtype} != {jnp.dtype(jnp.float32)}:
        return False
    rank = lhs.ndim - 2
    taps = math.prod(rhs.shape[d] for d in dimension_numbers.rhs_spec[2:])
    if taps > MAX_PRODUCTS and math.prod(_outputs(out, dimension_numbers)) > MAX_PRODUCTS:
        return False
    nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, NAMES) if rank == 2 else None
    plain = set(lhs_dilation) | set(rhs_dilation) == {1} and all(p == (0, 0) for p in padding)
    grouped = (feature_group_count, batch_group_count) != (1, 1)
    few_outputs = math.prod(_outputs(out, dimension_numbers)) < taps
    many_inputs = rhs.shape[dimension_numbers.rhs_spec[1]] >= MIN_CHANNELS
    return few_outputs or many_inputs or grouped or not plain or dimension_numbers != nhwc


def _outputs(out: Any, spec: lax.ConvDimensionNumbers) -> list[int]:
    return [out.shape[d] for d in spec.out_spec[2:]]


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments.

    Args:
      lhs: images, in the layout of `dimension_numbers`.
      rhs: kernel, likewise.
      dimension_numbers: the layouts.
      feature_group_count: groups of the images' channels (as those of a vmapped kernel).
      batch_group_count: groups of the images themselves (as in the weight gradient of the above).
      **params: the other parameters of the primitive.
    """
    spec = dimension_numbers
    x = lhs.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    w = rhs.transpose(*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
    # In the order that they have in memory, so that a slice needs no transpose.
    contracted = sorted(
        range(1, x.ndim), key=lambda axis: (*spec.lhs_spec[2:], spec.lhs_spec[1])[axis - 1]
    )

    def ungrouped(x: jax.Array, w: jax.Array, may_convolve: bool) -> jax.Array:
        return _ungrouped(x, w, contracted=contracted, may_convolve=may_convolve, **params)

    groups = feature_group_count * batch_group_count
    if groups == 1:
        out = ungrouped(x, w, True)
    else:
        w = jnp.moveaxis(w.reshape(*w.shape[:-1], groups, -1), -2, 0)
        if feature_group_count > 1:
            x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)
        else:
            x = x.reshape(groups, -1, *x.shape[1:])
        # Batched matrix products: a vmapped convolution would be a grouped one again.
        out = jax.vmap(lambda x, w: ungrouped(x, w, False))(x, w)
        out = jnp.moveaxis(out, 0, -2)
        out = out.reshape(*out.shape[:-2], -1)
    order = [0] * out.ndim
    for position, axis in enumerate((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])):
        order[axis] = position
    return out.transpose(order)


def _ungrouped(
    x: jax.Array,
    w: jax.Array,
    *,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    contracted: list[int],
    may_convolve: bool,
    **precision: Any,
) -> jax.Array:
    """Returns the convolution of x [batch, *space, inputs] and w [*window, inputs, outputs]."""
    precision = {name: precision[name] for name in ("precision", "preferred_element_type")}
    window, inputs = w.shape[:-2], w.shape[-2]
    size = [
        (s - 1) * d + 1 + sum(p)
        for s, d, p in zip(x.shape[1:-1], lhs_dilation, padding, strict=True)
    ]
    reach = [(k - 1) * d + 1 for k, d in zip(window, rhs_dilation, strict=True)]
    outputs = [(s - r) // q + 1 for s, r, q in zip(size, reach, window_strides, strict=True)]
    few_outputs = math.prod(outputs) < math.prod(window)
    dense = set(window_strides) == {1} and (set(lhs_dilation) != {1} or set(padding) != {(0, 0)})

    if not few_outputs and dense and (not may_convolve or inputs >= MIN_CHANNELS):
        # Multiply first and shift the products, so that padding and dilation cost no arithmetic.
        shifted = []
        for tap in itertools.product(*map(range, window)):
            product = lax.dot_general(x, w[tap], (((x.ndim - 1,), (0,)), ((), ())), **precision)
            config = []
            for t, rd, ld, s, o, (low, _) in zip(
                tap, rhs_dilation, lhs_dilation, x.shape[1:-1], outputs, padding, strict=True
            ):
                before = low - t * rd
                config.append((before, o - before - ((s - 1) * ld + 1), ld - 1))
            zero = jnp.zeros((), product.dtype)
            shifted.append(lax.pad(product, zero, [(0, 0, 0), *config, (0, 0, 0)]))
        return functools.reduce(jnp.add, shifted)

    if set(lhs_dilation) != {1} or set(padding) != {(0, 0)}:
        config = [(low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        # Otherwise XLA merges the padding into the convolution, which then is slow in a loop.
        x = lax.optimization_barrier(x)

    if few_outputs:
        # Two-dimensional operands: XLA would transpose each slice for a dot of more dimensions.
        kernel = w.transpose(*(axis - 1 for axis in contracted), -1).reshape(-1, w.shape[-1])
        parts = []
        for position in itertools.product(*map(range, outputs)):
            start = tuple(p * q for p, q in zip(position, window_strides, strict=True))
            patch = _slice(x, start, window, rhs_dilation).transpose(*contracted, 0)
            patch = patch.reshape(-1, x.shape[0])
            parts.append(lax.dot_general(patch, kernel, (((0,), (0,)), ((), ())), **precision))
        out = jnp.stack(parts).reshape(*outputs, x.shape[0], w.shape[-1])
        return jnp.moveaxis(out, -2, 0)

    if may_convolve and inputs < MIN_CHANNELS and set(rhs_dilation) == {1}:
        strides = window_strides
        if len(window) == 1:  # XLA:CPU runs one-dimensional convolutions slowly.
            x, w = x[:, None], w[None]
            strides = (1, *strides)
        out = lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=NAMES, **precision)
        return out[:, 0] if len(window) == 1 else out

    if window[-1] <= MAX_FOLDED:
        # The taps along the last axis become channels: fewer and larger products.
        slices = [
            lax.slice_in_dim(x, start, start + (outputs[-1] - 1) * stride + 1, stride, axis=-2)
            for stride in window_strides[-1:]
            for start in range(0, window[-1] * rhs_dilation[-1], rhs_dilation[-1])
        ]
        x = jnp.concatenate(slices, axis=-1)
        w = w.reshape(*window[:-1], 1, x.shape[-1], w.shape[-1])
        window_strides = (*window_strides[:-1], 1)
    products = []
    for tap in itertools.product(*map(range, w.shape[:-2])):
        start = tuple(t * d for t, d in zip(tap, rhs_dilation, strict=True))
        patch = _slice(x, start, outputs, window_strides)
        product = lax.dot(patch.reshape(-1, patch.shape[-1]), w[tap], **precision)
        products.append(product.reshape(*patch.shape[:-1], -1))
    return functools.reduce(jnp.add, products)


def _slice(
    x: jax.Array, start: Sequence[int], count: Sequence[int], stride: Sequence[int]
) -> jax.Array:
    """Returns `count` positions along each spatial axis of x [batch, *space, channels]."""
    stop = [s + (c - 1) * d + 1 for s, c, d in zip(start, count, stride, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *stride, 1))
