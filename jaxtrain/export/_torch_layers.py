"""Layers of a model with the tensors that the same layers have in PyTorch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain._safetensors import place
from jaxtrain.dataset import named_arrays
from jaxtrain.training.state import TrainState

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


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
      path: its path, such as "Block_0.Dense_0".
      entries: its arrays, each once.
      channels: output channels of a convolution whose features are channels-last, else None.
      features: inputs of a dense layer that may flatten such features, else None.
    """

    path: str
    entries: tuple[Entry, ...]
    channels: int | None = None
    features: int | None = None

    @property
    def tensors(self) -> dict[str, Shape]:
        """Shapes of PyTorch's tensors by name."""
        return {name: shape for entry in self.entries for name, shape in entry.tensors.items()}


class _Leaf(NamedTuple):
    path: str
    shape: Shape


class _Statistics(NamedTuple):
    found: adapters.BatchStatistics
    shape: Shape


Node = dict[str, Any]  # of nodes and leaves


def layers_of(state: TrainState) -> list[Layer]:
    """Returns the layers of a model in the order of their calls, or else of their names."""
    tree: Node = {}
    for path, leaf in named_arrays(state.params, ""):
        *parents, name = path.split(".")
        _at(tree, parents)[name] = _Leaf(f"params.{path}", leaf.shape)
    leaves = dict(named_arrays(state.model_state, "model_state"))
    statistics = adapters.batch_statistics(state.model, state.params, state.model_state)
    for path, found in statistics.items():
        node = _at(tree, list(filter(None, path.split("."))))
        node["statistics"] = _Statistics(found, leaves[found.mean].shape)
    calls = {path: index for index, path in enumerate(call_order(state))}

    def order(layer: Layer) -> tuple[int, Any]:
        path = layer.path
        while path not in calls and path:  # a single parameter, or the cell of a loop
            path = path.rpartition(".")[0]
        return calls.get(path, 0), natural(layer.path)

    return sorted(_layers(tree, ""), key=order)


def call_order(state: TrainState) -> list[str]:
    """Returns the paths of layers in the order in which the model calls them; [] if unknown."""
    example = adapters.example_inputs(state.model)
    if example is None:
        return []

    def call(params: PyTree, model_state: PyTree, inputs: PyTree) -> Any:
        return state.model.apply(params, model_state, inputs, train=False, key=None)[0]

    with adapters.recording(state.model, state.params, state.model_state) as recorder:
        jax.eval_shape(call, state.params, state.model_state, example)
    return [".".join(found.path) for found in recorder.calls]


def _at(tree: Node, names: Sequence[str]) -> Node:
    """Returns the node at a path, which is created if it is missing."""
    for name in names:
        tree = tree.setdefault(name, {})
    return tree


def _layers(node: Node, path: str) -> list[Layer]:
    entries = _entries(node)
    if entries is not None:
        shape: Shape = node["kernel"].shape if "kernel" in node else ()
        channels = shape[-1] if len(shape) > 2 else None
        features = shape[0] if len(shape) == 2 else None
        return [Layer(path, tuple(entries), channels, features)]
    found: list[Layer] = []
    for name, child in node.items():
        inner = ".".join(filter(None, [path, name]))
        if isinstance(child, _Leaf):
            found.append(Layer(inner, (_same("", child),)))
        else:
            found += _layers(child, inner)
    return found


def convert(layer: Layer, tensors: Mapping[str, np.ndarray], channels: int) -> dict[str, Any]:
    """Returns the arrays of a layer by path, from PyTorch's tensors by their name in the layer."""
    found: dict[str, Any] = {}
    for entry in layer.entries:
        arrays = entry.to_ours([tensors[part] for part in entry.tensors], channels)
        found |= zip(entry.paths, arrays, strict=True)
    return found


def with_arrays(tree: PyTree, name: str, arrays: Mapping[str, Any]) -> PyTree:
    """Returns a pytree with some of its leaves replaced by arrays, given by path."""
    leaves = [
        place(arrays[path].astype(leaf.dtype), leaf) if path in arrays else leaf
        for path, leaf in named_arrays(tree, name)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Returns a key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def have_order(names: Sequence[str]) -> bool:
    """Returns whether the numbers in some dotted names tell their order."""
    paths = [name.split(".") for name in names]
    for a in paths:
        for b in paths:
            first = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), None)
            if first is not None and len({re.sub(r"\d+$", "", part) for part in first}) > 1:
                return False
    return True


def _entries(node: Node) -> list[Entry] | None:
    """Returns the arrays of a node that is one layer, or None if it is a module of several."""
    for find in (_lstm, _attention):
        entries = find(node)
        if entries is not None:
            return entries
    leaves = dict(node)
    statistics = _running(leaves.pop("statistics")) if "statistics" in leaves else []
    if not all(isinstance(leaf, _Leaf) for leaf in leaves.values()):
        return None
    names = set(leaves) - {"bias"}
    weight = []
    if names == {"kernel"}:
        kernel = leaves["kernel"]
        weight = [_dense(kernel) if len(kernel.shape) == 2 else _convolution(kernel)]
    elif len(names) == 1 and names <= {"scale", "embedding", "weight"}:
        weight = [_same("weight", leaves[names.pop()])]
    elif names or not node:
        return None
    bias = [_same("bias", leaves["bias"], flat=True)] if "bias" in leaves else []
    return [*weight, *bias, *statistics]


def _same(name: str, leaf: _Leaf, *, flat: bool = False) -> Entry:
    """Returns an array with PyTorch's layout; Equinox's biases of convolutions have more axes."""
    shape = (math.prod(leaf.shape),) if flat else leaf.shape
    return Entry(
        {name: shape},
        (leaf.path,),
        lambda tensors, channels: [tensors[0].reshape(leaf.shape)],
        lambda arrays, channels: [arrays[0].reshape(shape)],
    )


def _running(statistics: _Statistics) -> list[Entry]:
    """Returns the running mean and variance of batch norm."""
    found = statistics.found
    paths = (found.mean, found.var, *([found.started] if found.started else []))
    names = ("running_mean", "running_var")

    def to_ours(tensors: Arrays, channels: int) -> Arrays:
        return [*tensors, *([] if found.complete is None else [found.complete])]

    def to_torch(arrays: Arrays, channels: int) -> Arrays:
        return [array / found.scale for array in arrays[:2]]

    return [Entry(dict.fromkeys(names, statistics.shape), paths, to_ours, to_torch)]


def _dense(kernel: _Leaf) -> Entry:
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


def _convolution(kernel: _Leaf) -> Entry:
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


def _joined(name: str, kernels: Sequence[_Leaf], inputs: int) -> Entry:
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


def _joined_vectors(name: str, biases: Sequence[_Leaf]) -> Entry:
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


def _lstm(node: Node) -> list[Entry] | None:
    """Returns the arrays of an LSTM cell; PyTorch joins its gates in the order i, f, g, o.

    PyTorch's LSTM has two biases, which are added; the other libraries have one.
    """
    names = {name.rstrip("_") for name in node}
    by_gate = {f"{source}{gate}" for source in "ih" for gate in "ifgo"}
    if names == by_gate:
        nodes = {name.rstrip("_"): child for name, child in node.items()}
        inner, outer = ([nodes[f"{source}{gate}"] for gate in "ifgo"] for source in "ih")
    elif names == {"dense_i", "dense_h"}:
        inner, outer = [node["dense_i"]], [node["dense_h"]]
    elif {"weight_ih", "weight_hh"} <= names <= {"weight_ih", "weight_hh", "bias"}:
        entries = [_same(name, node[name]) for name in ("weight_ih", "weight_hh")]
        return [*entries, *([_two_biases([node["bias"]])] if "bias" in node else [])]
    else:
        return None
    kernels = [[child["kernel"] for child in part] for part in (inner, outer)]
    entries = [
        _joined(name, part, part[0].shape[0])
        for name, part in zip(("weight_ih", "weight_hh"), kernels, strict=True)
    ]
    biases = [child["bias"] for child in outer if "bias" in child]
    return [*entries, *([_two_biases(biases)] if biases else [])]


def _two_biases(biases: Sequence[_Leaf]) -> Entry:
    joined = _joined_vectors("", biases)
    shape = joined.tensors[""]

    def to_torch(arrays: Arrays, channels: int) -> Arrays:
        bias = joined.to_torch(arrays, channels)[0]
        return [np.zeros_like(bias), bias]

    return Entry(
        {"bias_ih": shape, "bias_hh": shape},
        joined.paths,
        lambda tensors, channels: joined.to_ours([tensors[0] + tensors[1]], channels),
        to_torch,
    )


def _attention(node: Node) -> list[Entry] | None:
    """Returns the arrays of multi-head attention as those of `torch.nn.MultiheadAttention`."""
    if set(node) != {"query", "key", "value", "out"}:
        return None
    inputs = [node[name] for name in ("query", "key", "value")]
    width = inputs[0]["kernel"].shape[0]
    if any(part["kernel"].shape[0] != width for part in inputs):
        return None
    out = node["out"]
    size = math.prod(out["kernel"].shape[:-1])
    entries = [
        _joined("in_proj_weight", [part["kernel"] for part in inputs], width),
        _joined("out_proj.weight", [out["kernel"]], size),
    ]
    if "bias" in out:
        entries.append(_joined_vectors("in_proj_bias", [part["bias"] for part in inputs]))
        entries.append(_same("out_proj.bias", out["bias"]))
    return entries
