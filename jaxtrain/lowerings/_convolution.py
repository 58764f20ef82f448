"""Convolutions as matrix products, or as the kind that XLA:CPU runs fast inside a loop.

A training step has three convolutions per layer:

- The output has many positions and few taps. XLA runs an unpadded NHWC convolution fast if a
  reduction of its output is fused with it. So the images are padded by a copy beforehand, and the
  result is the minimum of each output and the maximum over its channels, which is the output. With
  many channels, one product per tap or per row of the window is faster.
- The gradient of the input is the same with the kernel reversed. Where the layer has strides, the
  products of all inputs with each tap are summed, shifted by the position of the tap.
- The gradient of the kernel has the output's gradient as its window, and few results, one per tap.
  One product of shifted copies of both contracts examples and positions.
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
from jax.extend.core import Primitive

LAYOUT = ("NHWC", "HWIO", "NHWC")
# With more channels, one product per tap is faster than a convolution.
MAX_CHANNELS = 64
# Folding the taps of the last axis into the channels copies the images once per tap.
MAX_FOLDED = 8
# Each product is an operation of the program, which must not grow without a bound.
MAX_PRODUCTS = 256


# `lax.conv_general_dilated` of unpadded NHWC images, which always is XLA's own convolution.
xla_convolution_p = Primitive("xla_convolution")


def full_params(lhs: Any, rhs: Any, **params: Any) -> dict[str, Any]:
    """Returns the parameters of `lax.conv_general_dilated_p` for those of `xla_convolution_p`."""
    return {
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT),
        "feature_group_count": 1,
        "batch_group_count": 1,
        **params,
    }


@xla_convolution_p.def_abstract_eval
def _(lhs: Any, rhs: Any, **params: Any) -> Any:
    return lax.conv_general_dilated_p.abstract_eval(lhs, rhs, **full_params(lhs, rhs, **params))[0]


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
    """Returns whether `convolve` replaces this convolution, rather than XLA's own."""
    del window_strides
    if lhs.ndim not in (3, 4) or 0 in (*lhs.shape, *rhs.shape, *out.shape):
        return False
    if {lhs.dtype, rhs.dtype, out.dtype} != {jnp.dtype(jnp.float32)}:
        return False
    rank = lhs.ndim - 2
    taps = math.prod(rhs.shape[d] for d in dimension_numbers.rhs_spec[2:])
    if taps > MAX_PRODUCTS and math.prod(_outputs(out, dimension_numbers)) > MAX_PRODUCTS:
        return False
    nhwc = lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT) if rank == 2 else None
    plain = set(lhs_dilation) | set(rhs_dilation) == {1} and all(p == (0, 0) for p in padding)
    grouped = (feature_group_count, batch_group_count) != (1, 1)
    few_outputs = math.prod(_outputs(out, dimension_numbers)) < taps
    several_inputs = rhs.shape[dimension_numbers.rhs_spec[1]] > 1
    return few_outputs or several_inputs or grouped or not plain or dimension_numbers != nhwc


def _outputs(out: Any, spec: lax.ConvDimensionNumbers) -> list[int]:
    return [out.shape[d] for d in spec.out_spec[2:]]


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    compiled: Any = None,
    **params: Any,
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments.

    Args:
      lhs: images, in the layout of `dimension_numbers`.
      rhs: kernel, in the layout of `dimension_numbers`.
      dimension_numbers: the layouts.
      feature_group_count: groups of the images' channels (as those of a vmapped kernel).
      batch_group_count: groups of the examples, as in the gradient of a grouped kernel.
      compiled: the module `_numba`, whose functions are called where they apply, or None.
      **params: the other parameters of the primitive.

    Returns:
      The output, in the layout of `dimension_numbers`.
    """
    spec = dimension_numbers
    axes = (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    x = lhs.transpose(axes)
    w = rhs.transpose(*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
    memory_order = sorted(range(x.ndim), key=axes.__getitem__)

    def ungrouped(x: jax.Array, w: jax.Array, may_convolve: bool) -> jax.Array:
        return _ungrouped(x, w, memory_order=memory_order, may_convolve=may_convolve, **params)

    groups = feature_group_count * batch_group_count
    if groups == 1:
        out = None if compiled is None else _call(compiled, x, w, **params)
        out = ungrouped(x, w, True) if out is None else out
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


def _call(
    compiled: Any,
    x: jax.Array,
    w: jax.Array,
    *,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    **_: Any,
) -> jax.Array | None:
    """Returns the convolution of `_ungrouped` by a compiled function, or None if none applies."""
    if x.ndim == 3:
        out = _call(
            compiled,
            x[:, None],
            w[None],
            window_strides=(1, *window_strides),
            padding=((0, 0), *padding),
            lhs_dilation=(1, *lhs_dilation),
            rhs_dilation=(1, *rhs_dilation),
        )
        return None if out is None else out[:, 0]
    if set(lhs_dilation) != {1} or w.shape[-1] % compiled.LANES:
        return None
    outputs = _output_size(x, w, window_strides, padding, lhs_dilation, rhs_dilation)
    if math.prod(outputs) >= math.prod(w.shape[:2]):
        if set(rhs_dilation) != {1} or not _within(padding, w.shape[:2]):
            return None
        return compiled.output(x, w, window_strides, padding)
    # The gradient of a kernel: the images' channels are the examples here, and `w` is the gradient
    # of the output, dilated by the strides of the output.
    if set(window_strides) != {1} or not _within(padding, outputs):
        return None
    images, gradient = x.transpose(3, 1, 2, 0), w.transpose(2, 0, 1, 3)
    out = compiled.kernel_gradient(images, gradient, tuple(outputs), rhs_dilation, padding)
    return out.transpose(2, 0, 1, 3)


def _within(padding: tuple[tuple[int, int], ...], window: Sequence[int]) -> bool:
    return all(0 <= low < taps for (low, _), taps in zip(padding, window, strict=True))


def _output_size(
    x: jax.Array,
    w: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
) -> list[int]:
    size = [
        (s - 1) * d + 1 + sum(p)
        for s, d, p in zip(x.shape[1:-1], lhs_dilation, padding, strict=True)
    ]
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[:-2], rhs_dilation, strict=True)]
    return [(s - r) // q + 1 for s, r, q in zip(size, reach, strides, strict=True)]


def _ungrouped(
    x: jax.Array,
    w: jax.Array,
    *,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    memory_order: list[int],
    may_convolve: bool,
    **other: Any,
) -> jax.Array:
    """Returns the convolution of x [batch, *space, inputs] and w [*window, inputs, outputs].

    Where x is copied, its axes stay in `memory_order`, since a transposed copy takes far longer.
    """
    precision = {name: other[name] for name in ("precision", "preferred_element_type")}
    window, inputs = w.shape[:-2], w.shape[-2]
    outputs = _output_size(x, w, window_strides, padding, lhs_dilation, rhs_dilation)
    few_outputs = math.prod(outputs) < math.prod(window)
    dense = set(window_strides) == {1} and (set(lhs_dilation) != {1} or set(padding) != {(0, 0)})
    convolved = (
        may_convolve
        and not few_outputs
        and math.prod(window) > 1
        and inputs <= MAX_CHANNELS
        and set(lhs_dilation) | set(rhs_dilation) == {1}
    )

    if dense and not few_outputs and not convolved:
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
        config = [(0, 0, 0), *config, (0, 0, 0)]
        zero = jnp.zeros((), x.dtype)
        padded = lax.pad(x.transpose(memory_order), zero, [config[axis] for axis in memory_order])
        # Otherwise XLA merges the padding into the convolution, which then is slow in a loop.
        padded = lax.optimization_barrier(padded)
        x = padded.transpose([memory_order.index(axis) for axis in range(x.ndim)])

    if few_outputs:
        return _contract_window(
            x, w, outputs, window_strides, rhs_dilation, memory_order, **precision
        )

    if convolved:
        strides = window_strides
        if len(window) == 1:  # XLA:CPU runs one-dimensional convolutions slowly.
            x, w = x[:, None], w[None]
            strides = (1, *strides)
        out = xla_convolution_p.bind(x, w, window_strides=strides, **other)
        # This changes nothing (except that a NaN spreads to the other channels), but XLA fuses the
        # convolution with the maximum, and then computes it in tiles, up to five times as fast.
        out = jnp.minimum(out, jnp.max(out, axis=-1, keepdims=True))
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


def _contract_window(
    x: jax.Array,
    w: jax.Array,
    outputs: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    memory_order: Sequence[int],
    **precision: Any,
) -> jax.Array:
    """Returns an unpadded convolution with few outputs, as products that contract the window.

    Copies of the images, shifted to each column of the output, lie side by side in memory, and so
    do copies of the window, shifted to each row. One product of both contains all outputs. Axes
    with many outputs, or along which the window is dilated, have one product per position instead.
    The operands are two-dimensional: XLA would transpose each slice for a dot of more dimensions.
    """
    if x.ndim == 3:
        order = [1, *(axis + (axis > 0) for axis in memory_order)]
        steps = ((1, *outputs), (1, *strides), (1, *dilation))
        return _contract_window(x[:, None], w[None], *steps, order, **precision)[:, 0]

    batch, (height, width) = x.shape[0], w.shape[:2]
    rows = outputs[0] if outputs[0] <= MAX_FOLDED and dilation[0] == 1 else 1
    columns = outputs[1] if outputs[1] <= MAX_FOLDED else 1
    contracted = [axis for axis in memory_order if axis]

    if columns > 1:
        shifted = [
            _slice(x, (0, column * strides[1]), (x.shape[1], width), (1, dilation[1]))
            for column in range(columns)
        ]
        shifted = [part.transpose(memory_order) for part in shifted]
        joined = lax.concatenate(shifted, memory_order.index(0))
        x = joined.transpose([memory_order.index(axis) for axis in range(x.ndim)])
        dilation = (dilation[0], 1)

    kernel = w.transpose(*(axis - 1 for axis in contracted), -1)
    if rows > 1:
        reach, zero, shifted = (rows - 1) * strides[0], jnp.zeros((), w.dtype), []
        for shift in range(0, reach + 1, strides[0]):
            padding = [(shift, reach - shift, 0) if axis == 1 else (0, 0, 0) for axis in contracted]
            shifted.append(lax.pad(kernel, zero, [*padding, (0, 0, 0)]))
        kernel = lax.concatenate(shifted, kernel.ndim - 1)
        height += reach
    kernel = kernel.reshape(-1, kernel.shape[-1])

    repeats = (outputs[0] // rows, outputs[1] // columns)
    products = []
    for row, column in itertools.product(*map(range, repeats)):
        start = (row * strides[0], column * strides[1])
        patch = _slice(x, start, (height, width), dilation).transpose(*contracted, 0)
        patch = patch.reshape(-1, x.shape[0])
        products.append(lax.dot_general(patch, kernel, (((0,), (0,)), ((), ())), **precision))
    out = jnp.stack(products).reshape(*repeats, columns, batch, rows, -1)
    return out.transpose(3, 0, 4, 1, 2, 5).reshape(batch, *outputs, -1)


def _slice(
    x: jax.Array, start: Sequence[int], count: Sequence[int], stride: Sequence[int]
) -> jax.Array:
    """Returns `count` positions along each spatial axis of x [batch, *space, channels]."""
    stop = [s + (c - 1) * d + 1 for s, c, d in zip(start, count, stride, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *stride, 1))
