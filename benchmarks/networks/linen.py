"""The networks as Flax Linen modules; the names of their layers are those of the parameters.

Each takes images [batch, 28, 28], as uint8 pixels or as normalized floats.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

import jaxtrain as jt
from benchmarks.problem import MEAN, STD, Params, Problem


def make(problem: Problem) -> nn.Module:
    """Returns the network of a problem."""
    if problem.features:
        rate = problem.dropout_rates[0] if problem.dropout_rates else 0.0
        return jt.models.FeedForward(problem.features, rate, MEAN, STD)
    if problem.network == "CNN":
        return ConvNet(problem.dropout_rates)
    return {"ResNet": ResNet, "LSTM": RowLSTM, "ViT": ViT}[problem.network]()


def load(problem: Problem, params: Params) -> Params:
    """Returns the parameters as Linen names and lays them out."""
    found: dict[str, Any] = dict(params)
    if problem.network == "ViT":
        found["position"] = found.pop("Embedding_0")["position"]
    if problem.network == "LSTM":
        lstm, gates = found.pop("LSTM_0"), {}
        for letter, (kernel, recurrent, bias) in zip(
            "ifgo", zip(*(_split(lstm[name]) for name in lstm), strict=True), strict=True
        ):
            gates[f"i{letter}"] = {"kernel": kernel}
            gates[f"h{letter}"] = {"kernel": recurrent, "bias": bias}
        found["OptimizedLSTMCell_0"] = gates
    return jax.tree.map(jnp.asarray, found)


def _split(array: Any) -> list[Any]:
    return jnp.split(array, 4, axis=-1)


def normalized(images: Array) -> Array:
    """Returns uint8 pixels as normalized floats; floats are returned unchanged."""
    if images.dtype == jnp.uint8:
        return (images.astype(jnp.float32) / 255 - MEAN) / STD
    return images


class ConvNet(nn.Module):
    """The network of PyTorch's MNIST example: two convolutions, max pooling, two dense layers."""

    dropout_rates: tuple[float, ...]

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        x = normalized(images)[..., None]
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = jt.models.Dropout(self.dropout_rates[0])(x, train)
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        x = jt.models.Dropout(self.dropout_rates[1])(x, train)
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """A stem of 16 filters, and two residual blocks with batch norm; the second halves the size."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:

        def norm(x: Array) -> Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        def conv(x: Array, filters: int, size: int, stride: int) -> Array:
            return nn.Conv(
                filters, (size, size), (stride, stride), padding=size // 2, use_bias=False
            )(x)

        x = nn.relu(norm(conv(normalized(images)[..., None], 16, 3, 1)))
        for filters, stride in ((16, 1), (32, 2)):
            y = nn.relu(norm(conv(x, filters, 3, stride)))
            y = norm(conv(y, filters, 3, 1))
            if stride > 1:
                x = norm(conv(x, filters, 1, stride))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class RowLSTM(nn.Module):
    """An LSTM of 128 units that reads the 28 rows of an image."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        hidden: Any = nn.RNN(nn.OptimizedLSTMCell(128))(normalized(images))
        return nn.Dense(10)(hidden[:, -1])


class ViT(nn.Module):
    """Two transformer blocks of width 64 with 4 heads, on 49 patches of 4 × 4 pixels."""

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        x = normalized(images)
        x = x.reshape(-1, 7, 4, 7, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 49, 16)
        position = self.param("position", nn.initializers.normal(0.02), (49, 64))
        x = nn.Dense(64)(x)
        x += jnp.broadcast_to(position, x.shape)
        for _ in range(2):
            y = nn.LayerNorm(epsilon=1e-5)(x)
            q, k, v = jnp.split(nn.Dense(192)(y).reshape(-1, 49, 12, 16), 3, axis=2)
            y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
            x += nn.Dense(64)(y)
            y = nn.Dense(128)(nn.LayerNorm(epsilon=1e-5)(x))
            x += nn.Dense(64)(nn.gelu(y, approximate=False))
        return nn.Dense(10)(nn.LayerNorm(epsilon=1e-5)(x).mean(axis=1))
