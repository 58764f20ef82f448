"""PyTorch as a peer: what `TorchTrainer` gets to train eager or by torch.compile."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.networks import torch as networks
from benchmarks.problem import MEAN, STD, Optimizer, Params, Problem, normalize

# These train faster in the memory format channels_last.
CHANNELS_LAST = ("CNN", "ResNet")

# The arguments of `jaxtrain.race.pytorch.TorchTrainer`, by position and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class FromPixels(torch.nn.Module):
    """A network that normalizes uint8 pixels."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.float() / 255 - MEAN) / STD)


def device() -> torch.device:
    """Returns the device on which JAX computes, as the process that measures is told."""
    return torch.device("cpu" if os.environ.get("JAXTRAIN_RACE_DEVICE", "cpu") == "cpu" else "cuda")


def make_optimizer(
    optimizer: Optimizer, parameters: Iterable[torch.Tensor]
) -> torch.optim.Optimizer:
    """Returns the optimizer, fused where PyTorch has a fused one."""
    if optimizer.name == "sgd":
        return torch.optim.SGD(
            parameters,
            optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
    if optimizer.name == "adam":
        return torch.optim.Adam(parameters, optimizer.learning_rate, fused=True)
    return torch.optim.Adadelta(parameters, optimizer.learning_rate)


def eager(problem: Problem, params: Params) -> Arguments:
    """Trains on slices of tensors that are already normalized and on the device."""
    return _arguments(problem, params)


def from_pixels(problem: Problem, params: Params) -> Arguments:
    """Trains on slices of uint8 pixels, which the network normalizes in each step."""
    return _arguments(problem, params, pixels=True)


def dataloader(problem: Problem, params: Params) -> Arguments:
    """Trains on the batches of a DataLoader, as in the tutorial."""
    return _arguments(problem, params, loader=True)


def compiled(problem: Problem, params: Params) -> Arguments:
    """Trains as `eager`, with network and loss compiled by `torch.compile`."""
    return _arguments(problem, params, compiled=True)


def _arguments(
    problem: Problem, params: Params, *, pixels: bool = False, **options: Any
) -> Arguments:
    model = networks.make(problem, params)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(problem.optimizer, trained)
    inputs = problem.images if pixels else normalize(problem.images)
    model = FromPixels(model) if pixels else model
    options |= {"threads": torch.get_num_threads()}
    options |= {"channels_last": problem.network in CHANNELS_LAST}
    data = inputs, problem.labels, problem.batch_size
    return (model, optimizer, cross_entropy, *data), options
