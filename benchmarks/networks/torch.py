"""The networks as PyTorch modules, which take normalized images [batch, 28, 28]."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import torch_reference
from benchmarks.networks import pytorch_layout
from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> nn.Module:
    """Returns the network of a problem with these parameters."""
    if problem.features:
        rate = problem.dropout_rates[0] if problem.dropout_rates else 0.0
        fan_in = math.prod(problem.images.shape[1:])
        model: nn.Module = torch_reference.feed_forward(problem.features, fan_in, rate)
        torch_reference.load(model, params)
        return model
    if problem.network == "CNN":
        model = ConvNet(problem.dropout_rates)
    else:
        model = {"ResNet": ResNet, "LSTM": RowLSTM, "ViT": ViT}[problem.network]()
    _load(model, params)
    return model


def _load(model: nn.Module, params: Params) -> None:
    """Copies the parameters, layer by layer of each kind in the order of construction."""
    kinds: dict[type, str] = {
        nn.Conv2d: "Conv",
        nn.BatchNorm2d: "BatchNorm",
        nn.Linear: "Dense",
        nn.LSTM: "LSTM",
        nn.LayerNorm: "LayerNorm",
        Embedding: "Embedding",
    }
    with torch.no_grad():
        for kind, name in kinds.items():
            layers = [layer for layer in model.modules() if isinstance(layer, kind)]
            for index, layer in enumerate(layers):
                found = pytorch_layout(params[f"{name}_{index}"])
                if isinstance(layer, nn.LSTM):
                    # The other libraries have one bias.
                    layer.get_parameter("bias_ih_l0").zero_().requires_grad_(False)
                    names = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0"}
                    names["bias"] = "bias_hh_l0"
                    found = {names[part]: value for part, value in found.items()}
                for part, value in found.items():
                    getattr(layer, part).copy_(torch.from_numpy(np.ascontiguousarray(value)))


class ConvNet(nn.Module):
    """The network of PyTorch's MNIST example: two convolutions, max pooling, two dense layers."""

    def __init__(self, dropout_rates: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Dropout(dropout_rates[0]), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()),
            *(nn.Dropout(dropout_rates[1]), nn.Linear(128, 10)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images[:, None])


def _conv(inputs: int, filters: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """A residual block of two 3 × 3 convolutions with batch norm."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, filters, 3, stride), nn.BatchNorm2d(filters)
        self.conv2, self.norm2 = _conv(filters, filters, 3, 1), nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                _conv(inputs, filters, 1, stride), nn.BatchNorm2d(filters)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """A stem of 16 filters, and two residual blocks with batch norm; the second halves the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(1, 16, 3, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2))
        self.output = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.blocks(self.stem(images[:, None])).mean((2, 3)))


class RowLSTM(nn.Module):
    """An LSTM of 128 units that reads the 28 rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(28, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.lstm(images)[0][:, -1])


class Embedding(nn.Module):
    """Adds a learned vector to each position."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(49, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.position


class TransformerBlock(nn.Module):
    """Attention with 4 heads, and a feed-forward layer, each after a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.norm2, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).reshape(-1, 49, 12, 16).transpose(1, 2).chunk(3, 1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Two transformer blocks of width 64 with 4 heads, on 49 patches of 4 × 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(16, 64), Embedding()
        self.blocks = nn.Sequential(TransformerBlock(), TransformerBlock())
        self.norm, self.output = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.reshape(-1, 7, 4, 7, 4).transpose(2, 3).reshape(-1, 49, 16)
        x = self.blocks(self.position(self.embed(x)))
        return self.output(self.norm(x).mean(1))
