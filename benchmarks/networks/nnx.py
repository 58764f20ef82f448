"""The networks as Flax NNX modules, which take normalized images [batch, 28, 28]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from benchmarks.networks import Layer, layers_of
from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> nnx.Module:
    """Returns the network of a problem with these parameters."""
    return _sequence(layers_of(problem, params), nnx.Rngs(0))


def _sequence(layers: Sequence[Layer], rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(*(_make(layer, rngs) for layer in layers))


def _make(layer: Layer, rngs: nnx.Rngs) -> Callable[[Array], Array]:
    params = dict(layer.params)
    if layer.kind in FUNCTIONS:
        return FUNCTIONS[layer.kind]
    if layer.kind == "Dropout":
        return nnx.Dropout(layer.option, rngs=rngs)
    if layer.kind == "Residual":
        return Residual(_sequence(layer.main, rngs), _sequence(layer.shortcut, rngs))
    if layer.kind == "LSTM":
        return RowLSTM(params, rngs)
    if layer.kind == "Embedding":
        return Embedding(params["position"])
    made: Any
    if layer.kind == "Dense":
        if "weight" in params:
            params["kernel"] = params.pop("weight").T
        made = nnx.Linear(*params["kernel"].shape, rngs=rngs)
    elif layer.kind == "Conv":
        *window, inputs, filters = params["kernel"].shape
        padding = "VALID" if layer.option is None else window[0] // 2
        options: Any = {"strides": layer.option or 1, "use_bias": "bias" in params}
        made = nnx.Conv(inputs, filters, window, padding=padding, rngs=rngs, **options)
    elif layer.kind == "BatchNorm":
        made = nnx.BatchNorm(len(params["scale"]), momentum=0.9, epsilon=1e-5, rngs=rngs)
    else:
        made = nnx.LayerNorm(len(params["scale"]), epsilon=1e-5, rngs=rngs)
    for name, value in params.items():
        getattr(made, name)[...] = jnp.asarray(value)
    return made


def _attention(x: Array) -> Array:
    q, k, v = jnp.split(x.reshape(*x.shape[:-1], 12, 16), 3, axis=-2)
    return jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:-1], 64)


def _patches(images: Array) -> Array:
    return images.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 49, 16)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Flatten": lambda x: x.reshape(len(x), -1),
    "Channel": lambda x: x[..., None],
    "ReLU": nnx.relu,
    "GELU": lambda x: nnx.gelu(x, approximate=False),
    "MaxPool": lambda x: nnx.max_pool(x, (2, 2), (2, 2)),
    "Mean": lambda x: x.mean(axis=tuple(range(1, x.ndim - 1))),
    "Attention": _attention,
    "Patches": _patches,
}


class Residual(nnx.Module):
    """Adds the outputs of two sequences."""

    def __init__(self, main: nnx.Sequential, shortcut: nnx.Sequential) -> None:
        self.main, self.shortcut = main, shortcut

    def __call__(self, x: Array) -> Array:
        return self.shortcut(x) + self.main(x)


class RowLSTM(nnx.Module):
    """An LSTM that reads the rows of an image, and returns its last output."""

    def __init__(self, params: dict[str, np.ndarray], rngs: nnx.Rngs) -> None:
        cell: Any = nnx.OptimizedLSTMCell(28, 128, rngs=rngs)
        cell.dense_i.kernel[...] = jnp.asarray(params["kernel"])
        cell.dense_h.kernel[...] = jnp.asarray(params["recurrent_kernel"])
        cell.dense_h.bias[...] = jnp.asarray(params["bias"])
        self.rnn = nnx.RNN(cell, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        return self.rnn(images)[:, -1]


class Embedding(nnx.Module):
    """Adds a learned vector to each position."""

    def __init__(self, position: np.ndarray) -> None:
        self.position = nnx.Param(jnp.asarray(position))

    def __call__(self, x: Array) -> Array:
        return x + self.position[...]
