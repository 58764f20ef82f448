"""Layers of a model with the tensors that the same layers have in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
# By path of an array, the order of the features that it meets: PyTorch's entry j is entry order[j].
Orders = Mapping[str, np.ndarray]


class _Leaf(NamedTuple):
    """The path of an array in the state, such as "params.Dense_0.kernel", and its shape."""

    path: str
    shape: Shape


class Entry(NamedTuple):
    """A tensor of PyTorch and the arrays that have the same values in another order.

    Attributes:
      tensor: its name within the layer, such as "weight".
      shape: its shape.
      leaves: the arrays.
      build: moves the entries of the arrays to those of the tensor.
      axis: the axis of the arrays along which they meet the features of the layer before, if any.
      added: a tensor of the same shape that PyTorch adds to it: the second bias of an LSTM.
    """

    tensor: str
    shape: Shape
    leaves: tuple[_Leaf, ...]
    build: Callable[[list[np.ndarray]], np.ndarray]
    axis: int | None = None
    added: str | None = None

    @property
    def paths(self) -> list[str]:
        """Paths of the arrays."""
        return [leaf.path for leaf in self.leaves]

    def arranged(self, arrays: Sequence[np.ndarray], orders: Orders) -> np.ndarray:
        """Returns the tensor of some arrays."""
        pairs = zip(self.paths, arrays, strict=True)
        found = [x.take(orders[path], self.axis) if path in orders else x for path, x in pairs]
        return self.build(found).reshape(self.shape)


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
      path: its path, such as "Block_0.Dense_0".
      entries: its arrays, each once.
      statistics: of batch norm, whose arrays are among the entries.
    """

    path: str
    entries: tuple[Entry, ...]
    statistics: BatchStatistics | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of PyTorch's tensors by name."""
        names = ((name, x.shape) for x in self.entries for name in (x.added, x.tensor))
        return {name: shape for name, shape in names if name is not None}

    @property
    def paths(self) -> list[str]:
        """Paths of its arrays."""
        return [path for entry in self.entries for path in entry.paths]


_Node = dict[str, Any]  # of nodes and leaves


def to_ours(layer: Layer, tensors: Mapping[str, np.ndarray], orders: Orders) -> dict[str, Any]:
    """Returns the arrays of a layer by path, from PyTorch's tensors by their name in the layer.

    Args:
      layer: the layer.
      tensors: all tensors of the layer, or some.
      orders: of features.
    """
    found: dict[str, Any] = {}
    for entry in layer.entries:
        if entry.tensor in tensors:
            tensor = tensors[entry.tensor]
            tensor = tensor if entry.added is None else tensor + tensors[entry.added]
            # The entries of the arrays are numbered, and each takes the value where its number is.
            sizes = [math.prod(leaf.shape) for leaf in entry.leaves]
            parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
            numbers = [x.reshape(leaf.shape) for x, leaf in zip(parts, entry.leaves, strict=True)]
            values = np.empty_like(tensor, shape=sum(sizes))
            values[entry.arranged(numbers, orders).reshape(-1)] = tensor.reshape(-1)
            for part, leaf in zip(parts, entry.leaves, strict=True):
                found[leaf.path] = values[part].reshape(leaf.shape)
    if layer.statistics is not None and layer.statistics.final_count is not None:
        found[layer.statistics.counter] = layer.statistics.final_count
    return found


def to_torch(layer: Layer, arrays: Mapping[str, np.ndarray], orders: Orders) -> dict[str, Any]:
    """Returns PyTorch's tensors of a layer by name, from its arrays by path."""
    found: dict[str, Any] = {}
    for entry in layer.entries:
        tensor = entry.arranged([arrays[path] for path in entry.paths], orders)
        if layer.statistics is not None and entry.tensor.startswith("running_"):
            tensor = tensor / np.asarray(layer.statistics.scale, tensor.dtype)
        if entry.added is not None:
            found[entry.added] = np.zeros_like(tensor)
        found[entry.tensor] = tensor
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
    found = {layer.path: layer for layer in _layers(tree, "", uses)}
    leaves = dict(named_arrays(state.model_state, "model_state"))
    batch_norms = adapters.batch_statistics(state.model, state.params, state.model_state)
    for path, statistics in batch_norms.items():
        entries = [
            _moved(name, _Leaf(leaf, leaves[leaf].shape), axis=0)
            for name, leaf in (("running_mean", statistics.mean), ("running_var", statistics.var))
        ]
        own = found.get(path, Layer(path, ())).entries  # there may be no scale and bias
        found[path] = Layer(path, (*own, *entries), statistics)
    if uses is None:
        return list(found.values())
    numbers = {path: number for number, path in enumerate(uses.features)}

    def first_use(layer: Layer) -> int:
        paths = [path for path in layer.paths if path.startswith("params.")]
        return min((numbers.get(path, len(numbers)) for path in paths), default=len(numbers))

    return sorted(found.values(), key=first_use)


def _layers(node: _Node, path: str, uses: Uses | None) -> list[Layer]:
    """Returns the layers below a node."""
    entries = _lstm(node) or _attention(node) or _simple(node, path, uses)
    if entries:
        return [Layer(path, tuple(entries))]
    found: list[Layer] = []
    for name, child in node.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, _Leaf):
            found.append(Layer(inner, (_moved("", child),)))
        else:
            found += _layers(child, inner, uses)
    return found


def _simple(node: _Node, path: str, uses: Uses | None) -> list[Entry] | None:
    """Returns the arrays of a dense, convolution, embedding or norm layer; None for others."""
    names = node.keys() - {"bias"}
    is_known = len(names) < 2 and names <= {"kernel", "scale", "embedding", "weight"}
    if not node or not is_known or not all(isinstance(x, _Leaf) for x in node.values()):
        return None
    name = min(names, default="bias")
    array, axes = node[name], len(node[name].shape)
    bias = [_moved("bias", node["bias"], axis=0 if axes == 1 else None)] if "bias" in node else []
    if axes == 1:
        return [*(_moved("weight", node[name], axis=0) for name in names), *bias]
    is_transposed = uses is not None and uses.convolutions.get(array.path, False)
    # By the name also one without strides, which is a convolution to JAX.
    if axes > 2 and (is_transposed or "ConvTranspose" in array.path):
        raise InputError(
            f"{path} is a transposed convolution, whose weights are not converted; expected a "
            "network without one: set its weights by state.replace(params=...)"
        )
    if name != "kernel":
        return [_moved("weight", array, axis=1 if (name, axes) == ("weight", 2) else None), *bias]
    if axes > 2 and uses is not None and array.path not in uses.convolutions:
        return None  # such as a DenseGeneral, or layers that are stacked for a loop
    order = (axes - 1, axes - 2, *range(axes - 2))  # PyTorch has [outputs, inputs, ...]
    return [_moved("weight", array, order, 0 if axes == 2 else None), *bias]


def _moved(
    name: str, leaf: _Leaf, order: Sequence[int] | None = None, axis: int | None = None
) -> Entry:
    """Returns an array whose axes PyTorch has in this order; as vectors, the biases of Equinox."""
    order = order or range(len(leaf.shape))
    shape = tuple(leaf.shape[i] for i in order)
    shape = (math.prod(shape),) if name == "bias" else shape
    return Entry(name, shape, (leaf,), lambda arrays: arrays[0].transpose(order), axis)


def _joined(name: str, leaves: Sequence[_Leaf], inputs: int | None = None) -> Entry:
    """Returns arrays that PyTorch stores as one: vectors, or kernels [inputs, ...]."""

    def build(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([x.reshape(inputs or x.size, -1).T.reshape(-1) for x in arrays])

    size = sum(math.prod(leaf.shape) for leaf in leaves)
    shape = (size // inputs, inputs) if inputs else (size,)
    return Entry(name, shape, tuple(leaves), build, 0 if inputs else None)


def _lstm(node: _Node) -> list[Entry] | None:
    """Returns the arrays of an LSTM cell; PyTorch joins its gates in the order i, f, g, o."""
    nodes = {name.rstrip("_"): child for name, child in node.items()}
    if {"weight_ih", "weight_hh"} <= nodes.keys() <= {"weight_ih", "weight_hh", "bias"}:
        entries = [_moved(name, node[name], axis=1) for name in ("weight_ih", "weight_hh")]
        biases = [node["bias"]] if "bias" in node else []
    else:
        gates = "ifgo" if "ii" in nodes else ["dense_"]
        sides = [[f"{x}{g}" if "ii" in nodes else f"{g}{x}" for g in gates] for x in "ih"]
        if nodes.keys() != {*sides[0], *sides[1]} or _axes_of_kernels(nodes) != {2}:
            return None
        entries = [
            _joined(name, [nodes[x]["kernel"] for x in side], nodes[side[0]]["kernel"].shape[0])
            for name, side in zip(("weight_ih", "weight_hh"), sides, strict=True)
        ]
        biases = [nodes[x]["bias"] for x in sides[1] if "bias" in nodes[x]]
    if biases:  # the sum of PyTorch's two
        entries.append(_joined("bias_hh", biases)._replace(added="bias_ih"))
    return entries


def _attention(node: _Node) -> list[Entry] | None:
    """Returns the arrays of multi-head attention as those of `torch.nn.MultiheadAttention`."""
    if node.keys() != {"query", "key", "value", "out"} or _axes_of_kernels(node) != {3}:
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
        entries.append(_joined("out_proj.bias", [out["bias"]]))
    return entries


def _axes_of_kernels(nodes: _Node) -> set[int]:
    """Returns the numbers of axes of the kernels in some nodes; 0 for none."""
    kernels = [child.get("kernel") if isinstance(child, dict) else None for child in nodes.values()]
    return {len(kernel.shape) if isinstance(kernel, _Leaf) else 0 for kernel in kernels}
