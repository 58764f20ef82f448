"""Layouts of arrays here and of tensors in PyTorch, and the conversions between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.adapters import BatchStatistics

Shape = tuple[int, ...]
Arrays = list[np.ndarray]


class Entry(NamedTuple):
    """Tensors of PyTorch and the arrays that have the same values in another layout.

    Attributes:
      tensors: shapes of PyTorch's tensors by their name within the layer.
      paths: paths of the arrays in the state, such as "params.Dense_0.kernel".
      to_ours: `to_ours(tensors, channels)` returns the arrays. `channels` is the number of channels
        of the features that a dense layer flattens, else 1.
      to_torch: the inverse.
    """

    tensors: dict[str, Shape]
    paths: tuple[str, ...]
    to_ours: Callable[[Arrays, int], Arrays]
    to_torch: Callable[[Arrays, int], Arrays]


class Leaf(NamedTuple):
    """An array of the state.

    Attributes:
      path: its path.
      shape: its shape.
    """

    path: str
    shape: Shape


def same(name: str, leaf: Leaf, *, flat: bool = False) -> Entry:
    """Returns an array with PyTorch's layout; Equinox's biases of convolutions have more axes."""
    shape = (math.prod(leaf.shape),) if flat else leaf.shape
    return Entry(
        {name: shape},
        (leaf.path,),
        lambda tensors, channels: [tensors[0].reshape(leaf.shape)],
        lambda arrays, channels: [arrays[0].reshape(shape)],
    )


def running_statistics(found: BatchStatistics, shape: Shape) -> Entry:
    """Returns the running mean and variance of batch norm."""
    paths = (found.mean, found.var, *([found.counter] if found.counter else []))
    names = ("running_mean", "running_var")

    def to_ours(tensors: Arrays, channels: int) -> Arrays:
        return [*tensors, *([] if found.final_count is None else [found.final_count])]

    def to_torch(arrays: Arrays, channels: int) -> Arrays:
        return [array / np.asarray(found.scale, array.dtype) for array in arrays[:2]]

    return Entry(dict.fromkeys(names, shape), paths, to_ours, to_torch)


def dense(kernel: Leaf) -> Entry:
    """Returns a kernel [inputs, outputs], which is PyTorch's weight [outputs, inputs] transposed.

    PyTorch flattens features [channels, height, width], Flax [height, width, channels].
    """
    inputs, outputs = kernel.shape

    def to_ours(tensors: Arrays, channels: int) -> Arrays:
        weight = tensors[0].reshape(outputs, channels, inputs // channels)
        return [weight.transpose(2, 1, 0).reshape(inputs, outputs)]

    def to_torch(arrays: Arrays, channels: int) -> Arrays:
        weight = arrays[0].reshape(inputs // channels, channels, outputs)
        return [weight.transpose(2, 1, 0).reshape(outputs, inputs)]

    return Entry({"weight": (outputs, inputs)}, (kernel.path,), to_ours, to_torch)


def convolution(kernel: Leaf) -> Entry:
    """Returns a kernel [..., inputs, outputs], PyTorch's weight [outputs, inputs, ...]."""
    axes = len(kernel.shape)
    to_torch = (axes - 1, axes - 2, *range(axes - 2))
    to_ours = (*range(2, axes), 1, 0)
    return Entry(
        {"weight": tuple(kernel.shape[axis] for axis in to_torch)},
        (kernel.path,),
        lambda tensors, channels: [tensors[0].transpose(to_ours)],
        lambda arrays, channels: [arrays[0].transpose(to_torch)],
    )


def joined(name: str, kernels: Sequence[Leaf], inputs: int) -> Entry:
    """Returns kernels [inputs, ...] that PyTorch stores as one weight [outputs, inputs]."""
    shapes = [kernel.shape for kernel in kernels]
    sizes = [math.prod(shape) // inputs for shape in shapes]
    ends = np.cumsum(sizes)[:-1]
    return Entry(
        {name: (sum(sizes), inputs)},
        tuple(kernel.path for kernel in kernels),
        lambda tensors, channels: [
            part.T.reshape(shape)
            for part, shape in zip(np.split(tensors[0], ends), shapes, strict=True)
        ],
        lambda arrays, channels: [
            np.concatenate([array.reshape(inputs, -1).T for array in arrays])
        ],
    )


def joined_vectors(name: str, biases: Sequence[Leaf]) -> Entry:
    """Returns vectors that PyTorch stores as one."""
    shapes = [bias.shape for bias in biases]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return Entry(
        {name: (int(ends[-1]),)},
        tuple(bias.path for bias in biases),
        lambda tensors, channels: [
            part.reshape(shape)
            for part, shape in zip(np.split(tensors[0], ends[:-1]), shapes, strict=True)
        ],
        lambda arrays, channels: [np.concatenate([array.reshape(-1) for array in arrays])],
    )


def two_biases(biases: Sequence[Leaf]) -> Entry:
    """Returns the bias of an LSTM, the sum of PyTorch's two; back, the first of them is 0."""
    entry = joined_vectors("", biases)
    shape = entry.tensors[""]

    def to_torch(arrays: Arrays, channels: int) -> Arrays:
        bias = entry.to_torch(arrays, channels)[0]
        return [np.zeros_like(bias), bias]

    return Entry(
        {"bias_ih": shape, "bias_hh": shape},
        entry.paths,
        lambda tensors, channels: entry.to_ours([tensors[0] + tensors[1]], channels),
        to_torch,
    )
