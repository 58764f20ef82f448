"""The same training in eager PyTorch, as the tutorials write it: what ours is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


def feed_forward(features: Sequence[int], fan_in: int, dropout_rate: float) -> nn.Sequential:
    """The network of tutorial T2; the last entry of `features` are the logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in features[:-1]:
        layers += [nn.Linear(fan_in, width), nn.ReLU(), nn.Dropout(dropout_rate)]
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, features[-1]))


def normalised(images: np.ndarray, mean: float, std: float) -> torch.Tensor:
    """Pixels 0 … 255 as the network's float32 inputs."""
    return (torch.from_numpy(np.array(images)).float() / 255 - mean) / std


def load_params(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Start the network at a jaxtrain FeedForward's kernels (transposed) and biases."""
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for linear, name in zip(linears, sorted(params), strict=True):
            linear.weight.copy_(torch.from_numpy(np.array(params[name]["kernel"]).T))
            linear.bias.copy_(torch.from_numpy(np.array(params[name]["bias"])))


def read_params(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    """The network's parameters in the layout of jaxtrain's FeedForward."""
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return {
        f"Dense_{index}": {
            "kernel": linear.weight.detach().numpy().T.copy(),
            "bias": linear.bias.detach().numpy().copy(),
        }
        for index, linear in enumerate(linears)
    }


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """One optimizer step a batch; the loss of each, before its update, left on the device."""
    losses = []
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def slices(
    inputs: torch.Tensor, targets: torch.Tensor, batch_size: int, order: torch.Tensor | None = None
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an epoch by slicing tensors, the partial last one included."""
    for start in range(0, len(inputs), batch_size):
        if order is None:
            yield inputs[start : start + batch_size], targets[start : start + batch_size]
        else:
            chosen = order[start : start + batch_size]
            yield inputs[chosen], targets[chosen]
