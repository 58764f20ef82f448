"""The networks as Flax NNX modules, which take normalized images [batch, 28, 28]."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> nnx.Module:
    """Returns the network of a problem with these parameters."""
    rngs = nnx.Rngs(0)
    if problem.features:
        fan_in = math.prod(problem.images.shape[1:])
        model: nnx.Module = FeedForward(fan_in, problem.features, problem.dropout_rates, rngs)
    elif problem.network == "CNN":
        model = ConvNet(problem.dropout_rates, rngs)
    else:
        model = {"ResNet": ResNet, "LSTM": RowLSTM, "ViT": ViT}[problem.network](rngs)
    _load(model, params)
    return model


def _load(model: nnx.Module, params: Params) -> None:
    """Copies the parameters, layer by layer of each kind in the order of construction."""
    kinds = {
        nnx.Conv: "Conv",
        nnx.BatchNorm: "BatchNorm",
        nnx.Linear: "Dense",
        nnx.OptimizedLSTMCell: "LSTM",
        nnx.LayerNorm: "LayerNorm",
        Embedding: "Embedding",
    }
    counts: collections.Counter[str] = collections.Counter()
    for layer in _layers(model, tuple(kinds)):
        kind = kinds[type(layer)]
        variables = vars(layer)
        if isinstance(layer, nnx.OptimizedLSTMCell):
            variables = vars(layer.dense_h) | {
                "kernel": layer.dense_i.kernel,
                "recurrent_kernel": layer.dense_h.kernel,
            }
        for part, value in params[f"{kind}_{counts[kind]}"].items():
            if part == "weight":
                variables["kernel"][...] = jnp.asarray(value.T)
            else:
                variables[part][...] = jnp.asarray(value)
        counts[kind] += 1


def _layers(module: nnx.Module, kinds: tuple[type, ...]) -> Iterator[nnx.Module]:
    """Yields the layers of these kinds in the order of construction."""
    if isinstance(module, kinds):
        yield module
        return
    for value in vars(module).values():
        if isinstance(value, nnx.Module):
            yield from _layers(value, kinds)


class FeedForward(nnx.Module):
    """Dense layers, with ReLU and dropout after each hidden one."""

    def __init__(
        self,
        fan_in: int,
        features: tuple[int, ...],
        dropout_rates: tuple[float, ...],
        rngs: nnx.Rngs,
    ) -> None:
        widths = (fan_in, *features[:-1])
        self.hidden = nnx.List(
            nnx.Sequential(
                nnx.Linear(widths[layer], widths[layer + 1], rngs=rngs),
                nnx.relu,
                nnx.Dropout(rate, rngs=rngs),
            )
            for layer, rate in enumerate(dropout_rates)
        )
        self.output = nnx.Linear(widths[-1], features[-1], rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits."""
        x = images.reshape(len(images), -1)
        for layer in self.hidden:
            x = layer(x)
        return self.output(x)


class ConvNet(nnx.Module):
    """The network of PyTorch's MNIST example: two convolutions, max pooling, two dense layers."""

    def __init__(self, dropout_rates: tuple[float, ...], rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        self.dropout1 = nnx.Dropout(dropout_rates[0], rngs=rngs)
        self.dense = nnx.Linear(9216, 128, rngs=rngs)
        self.dropout2 = nnx.Dropout(dropout_rates[1], rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits."""
        x = nnx.relu(self.conv1(images[..., None]))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = self.dropout1(x).reshape(len(x), -1)
        return self.output(self.dropout2(nnx.relu(self.dense(x))))


class ConvNorm(nnx.Module):
    """A convolution with batch norm."""

    def __init__(self, inputs: int, filters: int, size: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(
            inputs, filters, (size, size), stride, padding=size // 2, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(filters, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Returns the normalized features."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """A residual block of two 3 × 3 convolutions with batch norm."""

    def __init__(self, inputs: int, filters: int, stride: int, rngs: nnx.Rngs) -> None:
        self.first = ConvNorm(inputs, filters, 3, stride, rngs)
        self.second = ConvNorm(filters, filters, 3, 1, rngs)
        self.shortcut = nnx.Sequential()
        if stride > 1:
            self.shortcut = nnx.Sequential(ConvNorm(inputs, filters, 1, stride, rngs))

    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        return nnx.relu(self.shortcut(x) + self.second(nnx.relu(self.first(x))))


class ResNet(nnx.Module):
    """A stem of 16 filters, and two residual blocks with batch norm; the second halves the size."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(1, 16, 3, 1, rngs)
        self.blocks = nnx.Sequential(Block(16, 16, 1, rngs), Block(16, 32, 2, rngs))
        self.output = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits."""
        x = self.blocks(nnx.relu(self.stem(images[..., None])))
        return self.output(x.mean(axis=(1, 2)))


class RowLSTM(nnx.Module):
    """An LSTM of 128 units that reads the 28 rows of an image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(28, 128, rngs=rngs), rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits."""
        return self.output(self.lstm(images)[:, -1])


class Embedding(nnx.Module):
    """Adds a learned vector to each position."""

    def __init__(self) -> None:
        self.position = nnx.Param(jnp.zeros((49, 64)))

    def __call__(self, x: Array) -> Array:
        """Returns the sum."""
        return x + self.position[...]


class TransformerBlock(nnx.Module):
    """Attention with 4 heads, and a feed-forward layer, each after a layer norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(64, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(64, 192, rngs=rngs)
        self.out = nnx.Linear(64, 64, rngs=rngs)
        self.norm2 = nnx.LayerNorm(64, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(-1, 49, 12, 16), 3, axis=2)
        x += self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """Two transformer blocks of width 64 with 4 heads, on 49 patches of 4 × 4 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.position = nnx.Linear(16, 64, rngs=rngs), Embedding()
        self.blocks = nnx.Sequential(TransformerBlock(rngs), TransformerBlock(rngs))
        self.norm = nnx.LayerNorm(64, epsilon=1e-5, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits."""
        x = images.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 49, 16)
        x = self.blocks(self.position(self.embed(x)))
        return self.output(self.norm(x).mean(axis=1))
