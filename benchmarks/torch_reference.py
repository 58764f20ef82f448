"""The tutorials' network and training loop in eager PyTorch, the reference for jaxtrain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


def feed_forward(features: Sequence[int], fan_in: int, dropout_rate: float) -> nn.Sequential:
    """Returns the network of tutorial T2; the last of `features` is the number of logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in features[:-1]:
        layers += [nn.Linear(fan_in, width), nn.ReLU(), nn.Dropout(dropout_rate)]
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, features[-1]))


def normalised(images: np.ndarray, mean: float, std: float) -> torch.Tensor:
    """Returns pixels from 0 to 255 as normalized float32 inputs."""
    return (torch.from_numpy(np.array(images)).float() / 255 - mean) / std


def load(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Copies the parameters of a jaxtrain FeedForward into the network."""
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for linear, name in zip(linears, sorted(params), strict=True):
            linear.weight.copy_(torch.from_numpy(np.array(params[name]["weight"])))
            linear.bias.copy_(torch.from_numpy(np.array(params[name]["bias"])))


def read_params(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    """Returns the network's parameters in the layout of a jaxtrain FeedForward."""
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return {
        f"Dense_{index}": {
            "weight": linear.weight.detach().numpy().copy(),
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
    """Takes one step per batch, and returns the losses before each update, on the device."""
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
    """Yields the batches of an epoch as slices, including the partial last batch."""
    for start in range(0, len(inputs), batch_size):
        if order is None:
            yield inputs[start : start + batch_size], targets[start : start + batch_size]
        else:
            chosen = order[start : start + batch_size]
            yield inputs[chosen], targets[chosen]
