"""Layers of a model with the tensors that the same layers have in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain._safetensors import place
from jaxtrain.adapters import BatchStatistics
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_trace import Uses
from jaxtrain.training.state import TrainState

Shape = tuple[int, ...]
Arrays = list[np.ndarray]
Orders = Mapping[str, Mapping[int, np.ndarray | None]]


class Entry(NamedTuple):
    """Tensors of PyTorch and the arrays that have the same values in another layout.

    Attributes:
      tensors: shapes of PyTorch's tensors by their name within the layer.
      paths: paths of the arrays in the state, such as "params.Dense_0.kernel".
      to_ours: returns the arrays from the tensors.
      to_torch: the inverse.
    """

    tensors: dict[str, Shape]
    paths: tuple[str, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_torch: Callable[[Arrays], Arrays]


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
      path: its path, such as "Block_0.Dense_0".
      entries: its arrays, each once.
      inputs: by path, the axis of an array along which it meets the features of the layer before.
    """

    path: str
    entries: tuple[Entry, ...]
    inputs: Mapping[str, int] = MappingProxyType({})

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of PyTorch's tensors by name."""
        return {name: shape for entry in self.entries for name, shape in entry.tensors.items()}

    @property
    def paths(self) -> list[str]:
        """Paths of its arrays."""
        return [path for entry in self.entries for path in entry.paths]


class _Leaf(NamedTuple):
    """The path and the shape of an array."""

    path: str
    shape: Shape


_Node = dict[str, Any]  # of nodes and leaves


def to_ours(layer: Layer, tensors: Mapping[str, np.ndarray], orders: Orders) -> dict[str, Any]:
    """Returns the arrays of a layer by path, from PyTorch's tensors by their name in the layer.

    Args:
      layer: the layer.
      tensors: those of an entry are all there, or none is.
      orders: as `Uses.feature_orders`.
    """
    found: dict[str, Any] = {}
    for entry in layer.entries:
        if not entry.tensors.keys() <= tensors.keys():
            continue
        arrays = entry.to_ours([tensors[part] for part in entry.tensors])
        for path, array in zip(entry.paths, arrays, strict=True):
            for axis, order in orders.get(path, {}).items():
                array = array if order is None else array.take(np.argsort(order), axis)
            found[path] = array
    return found


def to_torch(layer: Layer, arrays: Mapping[str, np.ndarray], orders: Orders) -> dict[str, Any]:
    """Returns PyTorch's tensors of a layer by name, from its arrays by path."""
    found: dict[str, Any] = {}
    for entry in layer.entries:
        parts = []
        for path in entry.paths:
            array = arrays[path]
            for axis, order in orders.get(path, {}).items():
                array = array if order is None else array.take(order, axis)
            parts.append(array)
        found |= zip(entry.tensors, entry.to_torch(parts), strict=True)
    return found


def with_arrays(tree: PyTree, name: str, arrays: Mapping[str, Any]) -> PyTree:
    """Returns a pytree with some of its leaves replaced by arrays, given by path."""
    leaves = [
        place(arrays[path].astype(leaf.dtype), leaf) if path in arrays else leaf
        for path, leaf in named_arrays(tree, name)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def layers_of(state: TrainState, uses: Uses | None) -> list[Layer]:
    """Returns the layers of a model, in the order in which it uses them if that is known.

    Raises:
      InputError: a layer is a transposed convolution.
    """
    tree: _Node = {}
    for path, leaf in named_arrays(state.params, ""):
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _Leaf(f"params.{path}", leaf.shape)
    leaves = dict(named_arrays(state.model_state, "model_state"))
    statistics = {
        path: _running_statistics(found, leaves[found.mean].shape)
        for path, found in adapters.batch_statistics(
            state.model, state.params, state.model_state
        ).items()
    }
    found = _layers(tree, "", statistics, uses)
    found += [_norm(path, [entry]) for path, entry in statistics.items()]  # without parameters
    if uses is None:
        return found
    last = len(uses.order)

    def first_use(layer: Layer) -> int:
        paths = [path for path in layer.paths if path.startswith("params.")]
        return min([uses.order.get(path, last) for path in paths] or [last])

    return sorted(found, key=first_use)


def _layers(node: _Node, path: str, statistics: dict[str, Entry], uses: Uses | None) -> list[Layer]:
    """Returns the layers below a node; takes the statistics of those that have some."""
    compound = _lstm(node) or _attention(node)
    if compound:
        return [Layer(path, tuple(compound))]
    if node and all(isinstance(child, _Leaf) for child in node.values()):
        layer = _layer(node, path, statistics, uses)
        if layer is not None:
            return [layer]
    found: list[Layer] = []
    for name, child in node.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, _Leaf):
            found.append(Layer(inner, (_same("", child),)))
        else:
            found += _layers(child, inner, statistics, uses)
    return found


def _layer(
    leaves: dict[str, _Leaf], path: str, statistics: dict[str, Entry], uses: Uses | None
) -> Layer | None:
    """Returns the layer of a node without further nodes; None if it has single parameters."""
    names = leaves.keys() - {"bias"}
    if len(names) > 1 or not names <= {"kernel", "scale", "embedding", "weight"}:
        return None
    bias = [_same("bias", leaves["bias"], is_vector=True)] if "bias" in leaves else []
    if not names or len(leaves[min(names)].shape) == 1:
        weight = [_same("weight", leaves[name]) for name in names]
        return _norm(
            path, [*weight, *bias, *([statistics.pop(path)] if path in statistics else [])]
        )
    (name,) = names
    array, axes = leaves[name], len(leaves[name].shape)
    if name == "kernel" and axes > 2 and uses is not None and array.path not in uses.convolutions:
        return None  # such as a DenseGeneral, or layers that are stacked for a loop
    # By the name also one without strides, which is a convolution to JAX.
    is_transposed = uses is not None and uses.convolutions.get(array.path, False)
    if axes > 2 and (is_transposed or "ConvTranspose" in array.path):
        raise InputError(
            f"{path} is a transposed convolution, whose weights are not converted; expected a "
            "network without one: set its weights by state.replace(params=...)"
        )
    if name == "kernel":
        return Layer(path, (_kernel(array), *bias), {array.path: axes - 2} if axes == 2 else {})
    inputs = {array.path: 1} if name == "weight" and axes == 2 else {}
    return Layer(path, (_same("weight", array), *bias), inputs)


def _norm(path: str, entries: Sequence[Entry]) -> Layer:
    """Returns a layer of vectors, one entry per feature."""
    vectors = {
        array: 0
        for entry in entries
        for array in entry.paths[:2]  # not the counter of the statistics
    }
    return Layer(path, tuple(entries), vectors)


def _same(name: str, leaf: _Leaf, *, is_vector: bool = False) -> Entry:
    """Returns an array with PyTorch's layout; Equinox's biases of convolutions have more axes."""
    shape = (math.prod(leaf.shape),) if is_vector else leaf.shape
    return Entry(
        {name: shape},
        (leaf.path,),
        lambda tensors: [tensors[0].reshape(leaf.shape)],
        lambda arrays: [arrays[0].reshape(shape)],
    )


def _running_statistics(found: BatchStatistics, shape: Shape) -> Entry:
    """Returns the running mean and variance of batch norm."""
    paths = (found.mean, found.var, *([found.counter] if found.counter else []))
    counter = [] if found.final_count is None else [found.final_count]
    return Entry(
        {"running_mean": shape, "running_var": shape},
        paths,
        lambda tensors: [*tensors, *counter],
        lambda arrays: [x / np.asarray(found.scale, x.dtype) for x in arrays[:2]],
    )


def _kernel(kernel: _Leaf) -> Entry:
    """Returns a kernel [..., inputs, outputs], PyTorch's weight [outputs, inputs, ...]."""
    axes = len(kernel.shape)
    order = (axes - 1, axes - 2, *range(axes - 2))
    return Entry(
        {"weight": tuple(kernel.shape[axis] for axis in order)},
        (kernel.path,),
        lambda tensors: [tensors[0].transpose(np.argsort(order))],
        lambda arrays: [arrays[0].transpose(order)],
    )


def _joined(name: str, parts: Sequence[_Leaf], inputs: int | None = None) -> Entry:
    """Returns arrays that PyTorch stores as one: vectors, or kernels [inputs, ...]."""
    shapes = [part.shape for part in parts]
    sizes = [math.prod(shape) // (inputs or 1) for shape in shapes]

    def to_ours(tensors: Arrays) -> Arrays:
        split = np.split(tensors[0], np.cumsum(sizes)[:-1])
        return [part.T.reshape(shape) for part, shape in zip(split, shapes, strict=True)]

    def to_torch(arrays: Arrays) -> Arrays:
        return [
            np.concatenate([x.reshape(-1, size).T for x, size in zip(arrays, sizes, strict=True)])
        ]

    if inputs is None:
        return Entry(
            {name: (sum(sizes),)},
            tuple(part.path for part in parts),
            to_ours,
            lambda arrays: [np.concatenate([x.reshape(-1) for x in arrays])],
        )
    return Entry(
        {name: (sum(sizes), inputs)}, tuple(part.path for part in parts), to_ours, to_torch
    )


def _two_biases(biases: Sequence[_Leaf]) -> Entry:
    """Returns the bias of an LSTM: the sum of PyTorch's two, or to PyTorch, 0 and the bias."""
    entry = _joined("", biases)

    def to_torch(arrays: Arrays) -> Arrays:
        (bias,) = entry.to_torch(arrays)
        return [np.zeros_like(bias), bias]

    return Entry(
        dict.fromkeys(("bias_ih", "bias_hh"), entry.tensors[""]),
        entry.paths,
        lambda tensors: entry.to_ours([tensors[0] + tensors[1]]),
        to_torch,
    )


def _lstm(node: _Node) -> list[Entry] | None:
    """Returns the arrays of an LSTM cell; PyTorch joins its gates in the order i, f, g, o."""
    nodes = {name.rstrip("_"): child for name, child in node.items()}
    if {"weight_ih", "weight_hh"} <= set(nodes) <= {"weight_ih", "weight_hh", "bias"}:
        bias = [_two_biases([node["bias"]])] if "bias" in node else []
        return [_same(name, node[name]) for name in ("weight_ih", "weight_hh")] + bias
    if nodes.keys() == {f"{source}{gate}" for source in "ih" for gate in "ifgo"}:
        inner, outer = ([nodes[f"{source}{gate}"] for gate in "ifgo"] for source in "ih")
    elif nodes.keys() == {"dense_i", "dense_h"}:
        inner, outer = [nodes["dense_i"]], [nodes["dense_h"]]
    else:
        return None
    if _axes_of_kernels(nodes) != {2}:
        return None
    kernels = {"weight_ih": inner, "weight_hh": outer}
    entries = [
        _joined(name, [x["kernel"] for x in part], part[0]["kernel"].shape[0])
        for name, part in kernels.items()
    ]
    biases = [x["bias"] for x in outer if "bias" in x]
    return [*entries, *([_two_biases(biases)] if biases else [])]


def _attention(node: _Node) -> list[Entry] | None:
    """Returns the arrays of multi-head attention as those of `torch.nn.MultiheadAttention`."""
    if set(node) != {"query", "key", "value", "out"} or _axes_of_kernels(node) != {3}:
        return None
    inputs, out = [node[name] for name in ("query", "key", "value")], node["out"]
    width = inputs[0]["kernel"].shape[0]
    if any(part["kernel"].shape[0] != width for part in inputs):
        return None  # PyTorch has separate weights then
    entries = [
        _joined("in_proj_weight", [part["kernel"] for part in inputs], width),
        _joined("out_proj.weight", [out["kernel"]], math.prod(out["kernel"].shape[:-1])),
    ]
    if "bias" in out:
        entries.append(_joined("in_proj_bias", [part["bias"] for part in inputs]))
        entries.append(_same("out_proj.bias", out["bias"]))
    return entries


def _axes_of_kernels(nodes: _Node) -> set[int]:
    """Returns the numbers of axes of the kernels in some nodes; 0 for none."""
    kernels = [child.get("kernel") if isinstance(child, dict) else None for child in nodes.values()]
    return {len(kernel.shape) if isinstance(kernel, _Leaf) else 0 for kernel in kernels}
