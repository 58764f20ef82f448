"""PyTorch as a peer: eager on slices or a DataLoader, and torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks import torch_reference
from benchmarks.networks import torch as networks
from benchmarks.peers import DEVICE_VARIABLE, MissingError
from benchmarks.problem import MEAN, STD, Optimizer, Params, Problem, Trainer, normalize

# These train faster in the memory format channels_last.
CHANNELS_LAST = ("CNN", "ResNet")

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def device() -> torch.device:
    """Returns the device on which JAX computes.

    Raises:
      MissingError: JAX computes on a GPU that PyTorch does not see.
    """
    if os.environ.get(DEVICE_VARIABLE, "cpu") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MissingError("JAX computes on a GPU that PyTorch does not see")
    return torch.device("cuda")


def wait() -> None:
    """Waits until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def eager(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer on slices of tensors that are already normalized and on the device."""
    return _trainer(problem, params)


def from_pixels(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer on slices of uint8 pixels, which normalizes each batch in its step."""
    return _trainer(problem, params, pixels=True)


def dataloader(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer on the batches of a DataLoader, as in the tutorial."""
    return _trainer(problem, params, loader=True)


def compiled(problem: Problem, params: Params) -> Trainer:
    """Returns the trainer of `eager` with network and loss compiled by `torch.compile`."""
    torch.compiler.reset()  # so that the programs of another problem are not reused
    mode = "reduce-overhead" if torch.cuda.is_available() else None  # CUDA graphs
    return _trainer(
        problem, params, wrap_loss=lambda loss: torch.compile(loss, dynamic=False, mode=mode)
    )


def _trainer(
    problem: Problem,
    params: Params,
    *,
    loader: bool = False,
    pixels: bool = False,
    wrap_loss: Callable[[Step], Step] = lambda loss: loss,
) -> Trainer:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32, as the others
    place = device()
    if pixels:
        inputs = torch.from_numpy(np.array(problem.images)).to(place)
    else:
        inputs = torch.from_numpy(normalize(problem.images)).to(place)
    targets = torch.from_numpy(problem.labels.astype(np.int64)).to(place)
    model = networks.make(problem, params).to(place).train()
    if problem.network in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(problem.optimizer, trained)
    updates = 0

    def count_update(*_: object) -> None:
        nonlocal updates
        updates += 1

    optimizer.register_step_post_hook(count_update)
    loss_of = wrap_loss(lambda images, labels: cross_entropy(model(images), labels))

    def as_inputs(images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - MEAN) / STD if pixels else images

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(as_inputs(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def batches() -> Iterable[Batch]:
        if not loader:
            return torch_reference.slices(inputs, targets, problem.batch_size)
        dataset = torch.utils.data.TensorDataset(inputs, targets)
        return torch.utils.data.DataLoader(dataset, batch_size=problem.batch_size)

    def steps(count: int) -> None:
        images, labels = inputs[: problem.batch_size], targets[: problem.batch_size]
        for _ in range(count):
            step(images, labels)
        wait()

    def losses() -> np.ndarray:
        model.train()
        collected = [step(images, labels) for images, labels in batches()]
        return torch.stack(collected).cpu().numpy()

    def prepare(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(images) if pixels else normalize(images)).to(place)

    def predict(images: torch.Tensor) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(as_inputs(part)) for part in images.split(1000)])
        model.train()
        return logits.cpu().numpy()

    return Trainer(steps, losses, losses, prepare, predict, lambda: updates)
