"""Layers of a model with the tensors that the same layers have in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain._safetensors import place
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_layouts import (
    Entry,
    Leaf,
    Shape,
    convolution,
    dense,
    joined,
    joined_vectors,
    running_statistics,
    same,
    two_biases,
)
from jaxtrain.export._torch_trace import Uses
from jaxtrain.training.state import TrainState

Node = dict[str, Any]  # of nodes and leaves


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
      path: its path, such as "Block_0.Dense_0".
      entries: its arrays, each once.
      kind: "dense" or "convolution" if it has a Flax kernel, else "".
    """

    path: str
    entries: tuple[Entry, ...]
    kind: str = ""

    @property
    def tensors(self) -> dict[str, Shape]:
        """Shapes of PyTorch's tensors by name."""
        return {name: shape for entry in self.entries for name, shape in entry.tensors.items()}

    @property
    def parameters(self) -> list[str]:
        """Paths of its parameters, without running statistics."""
        paths = [path for entry in self.entries for path in entry.paths]
        return [path for path in paths if path.startswith("params.")]


def layers_of(state: TrainState, uses: Uses | None) -> list[Layer]:
    """Returns the layers of a model, in the order in which it uses them if that is known.

    Raises:
      InputError: a layer is a transposed convolution.
    """
    tree: Node = {}
    for path, leaf in named_arrays(state.params, ""):
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = Leaf(f"params.{path}", leaf.shape)
    leaves = dict(named_arrays(state.model_state, "model_state"))
    statistics = {
        path: running_statistics(found, leaves[found.mean].shape)
        for path, found in adapters.batch_statistics(
            state.model, state.params, state.model_state
        ).items()
    }
    found = _layers(tree, "", statistics, uses)
    found += [Layer(path, (entry,)) for path, entry in statistics.items()]  # without parameters
    if uses is None:
        return found
    order = uses.order
    last = len(order)
    return sorted(
        found, key=lambda layer: min([order.get(p, last) for p in layer.parameters] or [last])
    )


def _layers(node: Node, path: str, statistics: dict[str, Entry], uses: Uses | None) -> list[Layer]:
    """Returns the layers below a node; takes the statistics of those that have some."""
    compound = _lstm(node) or _attention(node)
    if compound:
        return [Layer(path, tuple(compound))]
    if node and all(isinstance(child, Leaf) for child in node.values()):
        layer = _layer(node, path, uses)
        if layer is not None:
            running = [statistics.pop(path)] if path in statistics else []
            return [layer._replace(entries=(*layer.entries, *running))]
    found: list[Layer] = []
    for name, child in node.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, Leaf):
            found.append(Layer(inner, (same("", child),)))
        else:
            found += _layers(child, inner, statistics, uses)
    return found


def _layer(leaves: dict[str, Leaf], path: str, uses: Uses | None) -> Layer | None:
    """Returns the layer of a node without further nodes; None if it has single parameters."""
    names = set(leaves) - {"bias"}
    bias = [same("bias", leaves["bias"], flat=True)] if "bias" in leaves else []
    if names == {"kernel"}:
        kernel = leaves["kernel"]
        is_dense = len(kernel.shape) == 2
        if uses is not None and not is_dense and kernel.path not in uses.convolutions:
            return None  # such as a DenseGeneral, or layers that are stacked for a loop
        if not is_dense and _is_transposed(kernel.path, uses):
            raise _transposed_error(path)
        weight = dense(kernel) if is_dense else convolution(kernel)
        return Layer(path, (weight, *bias), "dense" if is_dense else "convolution")
    if len(names) == 1 and names <= {"scale", "embedding", "weight"}:
        (name,) = names
        if len(leaves[name].shape) > 2 and _is_transposed(leaves[name].path, uses):
            raise _transposed_error(path)
        return Layer(path, (same("weight", leaves[name]), *bias))
    return None if names else Layer(path, tuple(bias))


def _transposed_error(path: str) -> InputError:
    return InputError(
        f"{path} is a transposed convolution, whose weights are not converted; expected a network "
        "without one: set its weights by state.replace(params=...)"
    )


def _is_transposed(kernel: str, uses: Uses | None) -> bool:
    """Returns whether a kernel is that of a transposed convolution, also one without strides."""
    return "ConvTranspose" in kernel or bool(uses and uses.convolutions.get(kernel))


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


def _lstm(node: Node) -> list[Entry] | None:
    """Returns the arrays of an LSTM cell; PyTorch joins its gates in the order i, f, g, o.

    PyTorch's LSTM has two biases, which are added; the other libraries have one.
    """
    names = {name.rstrip("_") for name in node}
    by_gate = {f"{source}{gate}" for source in "ih" for gate in "ifgo"}
    if names in (by_gate, {"dense_i", "dense_h"}) and _axes_of_kernels(node) != {2}:
        return None
    if names == by_gate:
        nodes = {name.rstrip("_"): child for name, child in node.items()}
        inner, outer = ([nodes[f"{source}{gate}"] for gate in "ifgo"] for source in "ih")
    elif names == {"dense_i", "dense_h"}:
        inner, outer = [node["dense_i"]], [node["dense_h"]]
    elif {"weight_ih", "weight_hh"} <= set(node) <= {"weight_ih", "weight_hh", "bias"}:
        entries = [same(name, node[name]) for name in ("weight_ih", "weight_hh")]
        return [*entries, *([two_biases([node["bias"]])] if "bias" in node else [])]
    else:
        return None
    kernels = [[child["kernel"] for child in part] for part in (inner, outer)]
    entries = [
        joined(name, part, part[0].shape[0])
        for name, part in zip(("weight_ih", "weight_hh"), kernels, strict=True)
    ]
    biases = [child["bias"] for child in outer if "bias" in child]
    return [*entries, *([two_biases(biases)] if biases else [])]


def _axes_of_kernels(node: Node) -> set[int]:
    """Returns the numbers of axes of the kernels in the children of a node; 0 for none."""
    kernels = [child.get("kernel") if isinstance(child, dict) else None for child in node.values()]
    return {len(kernel.shape) if isinstance(kernel, Leaf) else 0 for kernel in kernels}


def _attention(node: Node) -> list[Entry] | None:
    """Returns the arrays of multi-head attention as those of `torch.nn.MultiheadAttention`."""
    if set(node) != {"query", "key", "value", "out"} or _axes_of_kernels(node) != {3}:
        return None
    inputs = [node[name] for name in ("query", "key", "value")]
    width = inputs[0]["kernel"].shape[0]
    if any(part["kernel"].shape[0] != width for part in inputs):
        return None  # PyTorch has separate weights then
    out = node["out"]
    size = math.prod(out["kernel"].shape[:-1])
    entries = [
        joined("in_proj_weight", [part["kernel"] for part in inputs], width),
        joined("out_proj.weight", [out["kernel"]], size),
    ]
    if "bias" in out:
        entries.append(joined_vectors("in_proj_bias", [part["bias"] for part in inputs]))
        entries.append(same("out_proj.bias", out["bias"]))
    return entries
