"""Small networks of the kinds that people write in PyTorch, for the tests of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Case(NamedTuple):
    """A network, and shapes of its inputs without the batch; integers are the number of tokens."""

    make: Callable[[], nn.Module]
    shapes: tuple[Any, ...]


class Tokens(NamedTuple):
    """Inputs that are integers below `count`."""

    count: int
    shape: tuple[int, ...]


class Function(nn.Module):
    """A network of layers by name, and a function that calls them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 5, padding=2), nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2 = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, ceil_mode=True)
        x = x.view(x.size(0), -1)
        return F.log_softmax(self.fc2(torch.sigmoid(self.fc1(x))), dim=1)


def vgg() -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    )
    classifier = (nn.Linear(36, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 3))
    return nn.Sequential(
        *(features, nn.Dropout2d(0.0), nn.AdaptiveAvgPool2d(3), nn.Flatten(), *classifier)
    )


class Block(nn.Module):
    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        shortcut = (nn.Conv2d(inputs, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))
        self.downsample = nn.Sequential(*shortcut) if stride > 1 else None

    def forward(self, x: Any) -> Any:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 7, 2, padding=3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(3, 2, padding=1), Block(4, 4, 1), Block(4, 6, 2)),
        *(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 3)),
    )


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            *(nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3)),
        )

    def forward(self, x: Any) -> Any:
        x = x + self.conv(x)
        return x.mean([2, 3])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 3, 3, padding=1)
        self.middle = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Any) -> Any:
        skip = F.leaky_relu(self.down(x), 0.2)
        low = F.elu(self.middle(F.max_pool2d(skip, 2)))
        smooth = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        nearest = nn.functional.interpolate(low, size=x.shape[-2:], mode="nearest")
        x = torch.cat([skip, self.up(low), smooth[:, :2], nearest[:, 1:3]], dim=1)
        return self.out(x)


class Vae(nn.Module):
    """Draws in training alone, and not if the noise is turned off for a comparison."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.decoder, self.noise = nn.Linear(8, 6), nn.Linear(3, 8), noise

    def forward(self, x: Any) -> Any:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z = mu
        if self.training:
            std = torch.exp(0.5 * logvar)
            z = mu + torch.randn_like(std) * std * self.noise
        return torch.sigmoid(self.decoder(z)), mu, logvar


def siamese(self: Any, first: Any, second: Any) -> dict[str, Any]:
    a, b = (F.normalize(self.body(x.flatten(1)), dim=1) for x in (first, second))
    return {"distance": F.pairwise_distance(a, b), "a": a, "scores": F.cosine_similarity(a, b)}


def generator() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose2d(4, 6, 3, 1, 0, bias=False), nn.BatchNorm2d(6), nn.ReLU(True)),
        *(nn.ConvTranspose2d(6, 2, 4, 2, 1, groups=2, bias=False), nn.Tanh()),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.rnn = getattr(nn, kind)(4, 3, batch_first=True, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.out = nn.Linear(directions * options.get("proj_size", 3), 2)

    def forward(self, tokens: Any) -> Any:
        x, hidden = self.rnn(self.embed(tokens))
        return self.out(x[:, -1]), hidden[0].transpose(0, 1) if isinstance(hidden, tuple) else x


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Any) -> Any:
        h = c = torch.zeros(x.size(0), 4)
        state, out = torch.zeros(x.size(0), 4), []
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            state = self.rnn(h, self.gru(h, state))
            out += [state]
        return torch.stack(out, dim=1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", **options)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, norm_first=True, **options)
        self.source, self.target = nn.Embedding(7, 8), nn.Embedding(7, 8)

    def forward(self, source: Any, target: Any) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1))
        padding = source == 0
        memory = self.encoder(self.source(source), src_key_padding_mask=padding)
        return self.decoder(
            self.target(target), memory, tgt_mask=mask, memory_key_padding_mask=padding
        )


class Gpt(nn.Module):
    """Tied weights, a `tril` buffer and a fused projection, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8, bias=False)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("bias", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))

    def forward(self, tokens: Any) -> Any:
        batch, length = tokens.size()
        x = self.wte(tokens) + self.wpe(torch.arange(0, length, dtype=torch.long))
        parts = self.qkv(self.ln1(x)).split(8, dim=2)
        q, k, v = (p.view(batch, length, 2, 4).transpose(1, 2) for p in parts)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        y = y + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, length, 8))
        return self.head(self.ln3(x + self.mlp(self.ln2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm(x)
        y, weights = self.attention(y, y, y)
        return self.head((x + y)[:, 0]), weights


def layers_1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.GroupNorm(2, 4), nn.SiLU()),
        *(nn.AvgPool1d(3, 2, padding=1), nn.BatchNorm1d(4), nn.GELU(), nn.Softplus()),
        *(nn.ConvTranspose1d(4, 2, 3, stride=2), nn.InstanceNorm1d(2, affine=True), nn.PReLU()),
    )


def layers_3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.PReLU(2), nn.MaxPool3d(2)),
        *(nn.ConvTranspose3d(2, 1, 2, stride=2), nn.Mish(), nn.AvgPool3d(2, ceil_mode=True)),
    )


def decomposed() -> nn.Module:
    """Operations without a rule, which PyTorch decomposes, and a parametrization with buffers."""
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.Hardswish(), nn.ReflectionPad2d(1)),
        *(nn.Softmax2d(), nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(128, 4))),
        *(nn.Softsign(), nn.CELU()),
    )


class Counter(nn.Module):
    """Changes views and buffers in place, and stops gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))

    def forward(self, x: Any) -> Any:
        y = self.linear(x).clone()
        if self.training:
            self.steps[1] += 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        first, second = y[:, :2], y.chunk(2, dim=1)[1]
        first.mul_(2)
        y[:, 3] = second.detach()[:, 0] ** 2
        y.view(-1)[0:2] += 1.0
        z = y.to("cpu", torch.float64).float() ** 1.0
        z.clamp_(max=0.5)
        return y * (1 - self.mean) + z * first.sum(1, keepdim=True) + y.detach()


CASES = {
    "LeNet": Case(LeNet, ((1, 12, 12),)),
    "VGG": Case(vgg, ((2, 16, 16),)),
    "ResNet": Case(resnet, ((3, 16, 16),)),
    "MobileNetV2": Case(InvertedResidual, ((3, 6, 6),)),
    "UNet": Case(UNet, ((1, 8, 8),)),
    "VAE": Case(Vae, ((8,),)),
    "siamese": Case(lambda: Function(siamese, body=nn.Linear(8, 4)), ((2, 4), (2, 4))),
    "DCGAN": Case(generator, ((4, 1, 1),)),
    "LSTM": Case(lambda: Recurrent("LSTM", num_layers=2), (Tokens(7, (3,)),)),
    "LSTM with a projection": Case(
        lambda: Recurrent("LSTM", bidirectional=True, proj_size=2), (Tokens(7, (3,)),)
    ),
    "GRU": Case(lambda: Recurrent("GRU", bidirectional=True), (Tokens(7, (3,)),)),
    "RNN": Case(lambda: Recurrent("RNN", num_layers=2, bias=False), (Tokens(7, (3,)),)),
    "cells": Case(Cells, ((3, 3),)),
    "Transformer": Case(Transformer, (Tokens(7, (5,)), Tokens(7, (4,)))),
    "GPT": Case(Gpt, (Tokens(11, (6,)),)),
    "ViT": Case(ViT, ((3, 8, 8),)),
    "1-D": Case(layers_1d, ((2, 9),)),
    "3-D": Case(layers_3d, ((1, 4, 4, 4),)),
    "decomposed": Case(decomposed, ((2, 3, 3),)),
    "in place": Case(Counter, ((4,),)),
}
