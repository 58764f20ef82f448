"""The networks as Equinox modules, which take one normalized image [28, 28].

Each is called as `model(image, state, key)`; the key is None in evaluation. In training, the
function is to be mapped over images and keys, with `axis_name="batch"`.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> tuple[Any, eqx.nn.State]:
    """Returns the network of a problem with these parameters, and its state."""
    key = jax.random.key(0)  # the same for all layers, as `_load` replaces their parameters
    network: Any = {"CNN": ConvNet, "ResNet": ResNet, "LSTM": RowLSTM, "ViT": ViT}.get(
        problem.network, FeedForward
    )
    arguments: tuple[Any, ...] = (key,)
    if problem.features:
        fan_in = math.prod(problem.images.shape[1:])
        arguments = (fan_in, problem.features, problem.dropout_rates, key)
    elif problem.network == "CNN":
        arguments = (problem.dropout_rates, key)
    model, state = eqx.nn.make_with_state(network)(*arguments)
    return _load(model, params), state


def _load(model: Any, params: Params) -> Any:
    """Returns the model with these parameters, by layer of each kind in the order of fields."""
    kinds: dict[type, str] = {
        eqx.nn.Conv2d: "Conv",
        eqx.nn.BatchNorm: "BatchNorm",
        eqx.nn.Linear: "Dense",
        eqx.nn.LSTMCell: "LSTM",
        eqx.nn.LayerNorm: "LayerNorm",
        Embedding: "Embedding",
    }
    counts: collections.Counter[str] = collections.Counter()

    def loaded(layer: Any) -> Any:
        kind = kinds.get(type(layer))
        if kind is None:
            return layer
        found = _converted(layer, params[f"{kind}_{counts[kind]}"])
        counts[kind] += 1
        return eqx.tree_at(
            lambda layer: [getattr(layer, part) for part in found],
            layer,
            [jnp.asarray(value) for value in found.values()],
        )

    return jax.tree.map(loaded, model, is_leaf=lambda layer: type(layer) in kinds)


def _converted(layer: Any, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters as a layer of Equinox names and lays them out."""
    found = dict(params)
    if isinstance(layer, eqx.nn.Conv2d):
        found["weight"] = found.pop("kernel").transpose(3, 2, 0, 1)
        if "bias" in found:
            found["bias"] = found["bias"][:, None, None]
    elif isinstance(layer, eqx.nn.LSTMCell):
        found["weight_ih"] = found.pop("kernel").T
        found["weight_hh"] = found.pop("recurrent_kernel").T
    elif "kernel" in found:
        weight = found.pop("kernel").T
        if layer.in_features == 9216:  # images are flattened from [channels, height, width]
            weight = weight.reshape(-1, 12, 12, 64).transpose(0, 3, 1, 2).reshape(-1, 9216)
        found["weight"] = weight
    elif "scale" in found:
        found["weight"] = found.pop("scale")
    return found


class FeedForward(eqx.Module):
    """Dense layers, with ReLU and dropout after each hidden one."""

    layers: list[eqx.nn.Linear]
    dropouts: list[eqx.nn.Dropout]

    def __init__(
        self, fan_in: int, features: tuple[int, ...], dropout_rates: tuple[float, ...], key: Array
    ) -> None:
        self.layers = []
        for width in features:
            self.layers.append(eqx.nn.Linear(fan_in, width, key=key))
            fan_in = width
        self.dropouts = [eqx.nn.Dropout(rate) for rate in dropout_rates]

    def __call__(
        self, image: Array, state: eqx.nn.State, key: Array | None
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the logits and the state."""
        x = image.reshape(-1)
        for layer, dropout in zip(self.layers[:-1], self.dropouts, strict=True):
            use, key = (None, None) if key is None else jax.random.split(key)
            x = dropout(jax.nn.relu(layer(x)), key=use, inference=use is None)
        return self.layers[-1](x), state


class ConvNet(eqx.Module):
    """The network of PyTorch's MNIST example: two convolutions, max pooling, two dense layers."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    dropout1: eqx.nn.Dropout
    dense: eqx.nn.Linear
    dropout2: eqx.nn.Dropout
    output: eqx.nn.Linear

    def __init__(self, dropout_rates: tuple[float, ...], key: Array) -> None:
        self.conv1 = eqx.nn.Conv2d(1, 32, 3, key=key)
        self.conv2 = eqx.nn.Conv2d(32, 64, 3, key=key)
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.dropout1, self.dropout2 = (eqx.nn.Dropout(rate) for rate in dropout_rates)
        self.dense = eqx.nn.Linear(9216, 128, key=key)
        self.output = eqx.nn.Linear(128, 10, key=key)

    def __call__(
        self, image: Array, state: eqx.nn.State, key: Array | None
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the logits and the state."""
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        x = jax.nn.relu(self.conv1(image[None]))
        x = self.pool(jax.nn.relu(self.conv2(x))).reshape(-1)
        x = self.dropout1(x, key=key1, inference=key is None)
        x = jax.nn.relu(self.dense(x))
        return self.output(self.dropout2(x, key=key2, inference=key is None)), state


class ConvNorm(eqx.Module):
    """A convolution with batch norm."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, inputs: int, filters: int, size: int, stride: int, key: Array) -> None:
        self.conv = eqx.nn.Conv2d(
            inputs, filters, size, stride, padding=size // 2, use_bias=False, key=key
        )
        self.norm = eqx.nn.BatchNorm(filters, "batch", 1e-5, momentum=0.9, mode="batch")

    def __call__(
        self, x: Array, state: eqx.nn.State, inference: bool
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the normalized features and the state."""
        return self.norm(self.conv(x), state, inference=inference)


class Block(eqx.Module):
    """A residual block of two 3 × 3 convolutions with batch norm."""

    first: ConvNorm
    second: ConvNorm
    shortcut: ConvNorm | None

    def __init__(self, inputs: int, filters: int, stride: int, key: Array) -> None:
        self.first = ConvNorm(inputs, filters, 3, stride, key)
        self.second = ConvNorm(filters, filters, 3, 1, key)
        self.shortcut = ConvNorm(inputs, filters, 1, stride, key) if stride > 1 else None

    def __call__(
        self, x: Array, state: eqx.nn.State, inference: bool
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the block's output and the state."""
        y, state = self.first(x, state, inference)
        y, state = self.second(jax.nn.relu(y), state, inference)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state, inference)
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    """A stem of 16 filters, and two residual blocks with batch norm; the second halves the size."""

    stem: ConvNorm
    blocks: list[Block]
    output: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.stem = ConvNorm(1, 16, 3, 1, key)
        self.blocks = [Block(16, 16, 1, key), Block(16, 32, 2, key)]
        self.output = eqx.nn.Linear(32, 10, key=key)

    def __call__(
        self, image: Array, state: eqx.nn.State, key: Array | None
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the logits and the state."""
        x, state = self.stem(image[None], state, key is None)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state, key is None)
        return self.output(x.mean(axis=(1, 2))), state


class RowLSTM(eqx.Module):
    """An LSTM of 128 units that reads the 28 rows of an image."""

    cell: eqx.nn.LSTMCell
    output: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.cell = eqx.nn.LSTMCell(28, 128, key=key)
        self.output = eqx.nn.Linear(128, 10, key=key)

    def __call__(
        self, image: Array, state: eqx.nn.State, key: Array | None
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the logits and the state."""

        def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
            return self.cell(row, carry), None

        (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(128), jnp.zeros(128)), image)
        return self.output(hidden), state


class Embedding(eqx.Module):
    """Adds a learned vector to each position."""

    position: Array

    def __init__(self) -> None:
        self.position = jnp.zeros((49, 64))

    def __call__(self, x: Array) -> Array:
        """Returns the sum."""
        return x + self.position


class TransformerBlock(eqx.Module):
    """Attention with 4 heads, and a feed-forward layer, each after a layer norm."""

    norm1: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.norm1, self.norm2 = eqx.nn.LayerNorm(64), eqx.nn.LayerNorm(64)
        self.qkv = eqx.nn.Linear(64, 192, key=key)
        self.out = eqx.nn.Linear(64, 64, key=key)
        self.up = eqx.nn.Linear(64, 128, key=key)
        self.down = eqx.nn.Linear(128, 64, key=key)

    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        y = jax.vmap(self.qkv)(jax.vmap(self.norm1)(x))
        q, k, v = jnp.split(y.reshape(49, 12, 16), 3, axis=1)
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x += jax.vmap(self.out)(y)
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y, approximate=False))


class ViT(eqx.Module):
    """Two transformer blocks of width 64 with 4 heads, on 49 patches of 4 × 4 pixels."""

    embed: eqx.nn.Linear
    position: Embedding
    blocks: list[TransformerBlock]
    norm: eqx.nn.LayerNorm
    output: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.embed, self.position = eqx.nn.Linear(16, 64, key=key), Embedding()
        self.blocks = [TransformerBlock(key), TransformerBlock(key)]
        self.norm, self.output = eqx.nn.LayerNorm(64), eqx.nn.Linear(64, 10, key=key)

    def __call__(
        self, image: Array, state: eqx.nn.State, key: Array | None
    ) -> tuple[Array, eqx.nn.State]:
        """Returns the logits and the state."""
        x = image.reshape(7, 4, 7, 4).transpose(0, 2, 1, 3).reshape(49, 16)
        x = self.position(jax.vmap(self.embed)(x))
        for block in self.blocks:
            x = block(x)
        return self.output(jax.vmap(self.norm)(x).mean(axis=0)), state
