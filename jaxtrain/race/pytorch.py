"""Trains a module in PyTorch, eager or by `torch.compile`.

The processes that use it do not import JAX: it is sent to them with its code.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from jaxtrain.race.processes import DEVICE_VARIABLE

# Losses of PyTorch by the names of those of `jaxtrain.losses`; that of labels has classes last.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": lambda predictions, targets, **options: F.cross_entropy(
        predictions.flatten(0, -2), targets.flatten(), **options
    ),
    "mean_squared_error": F.mse_loss,
    "mean_absolute_error": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "binary_cross_entropy": F.binary_cross_entropy,
    "sigmoid_binary_cross_entropy": F.binary_cross_entropy_with_logits,
}


class TorchTrainer:
    """Trains a module on slices of tensors in memory, in stored order.

    Args:
      module: the module, which is changed.
      optimizer: the optimizer of its parameters.
      loss: from outputs and targets to the mean loss.
      inputs: array, or tuple of arrays, [examples, ...].
      targets: array, or tuple of arrays, [examples, ...].
      batch_size: examples per step; the last batch may have fewer.
      threads: PyTorch's number of threads.
      channels_last: whether images and convolutions have the memory format channels_last.
      variant: "foreach" or "fused", the option of the optimizer; None for its default.
      compiled: whether module and loss are compiled by `torch.compile`.
      loader: whether the batches come from a DataLoader.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], torch.Tensor],
        inputs: Any,
        targets: Any,
        batch_size: int,
        *,
        threads: int,
        channels_last: bool = False,
        variant: str | None = None,
        compiled: bool = False,
        loader: bool = False,
    ) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.module = module.to(device()).train()
        self._last = channels_last
        if channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = optimizer
        if variant is not None:
            for group in optimizer.param_groups:
                group |= {"foreach": None, "fused": None, variant: True}
        self._updates = 0
        optimizer.register_step_post_hook(self._count)
        self._inputs = tuple(map(self._to_input, parts(inputs)))
        self._targets = tuple(map(_to_target, parts(targets)))
        self._single = not isinstance(inputs, tuple), not isinstance(targets, tuple)
        self._spread = not self._single[0] and _takes(module, inputs)
        self._batch_size, self._loader = batch_size, loader
        self._loss = loss
        self._loss_of = self._compute_loss
        # CUDA graphs compute each loss in the memory of the last one.
        self._copies = compiled and device().type == "cuda"
        if compiled:
            torch.compiler.reset()  # so that the programs of another problem are not reused
            for function in (loss, *(type(layer).forward for layer in module.modules())):
                _publish_globals(function)
            mode = "reduce-overhead" if self._copies else None  # CUDA graphs
            self._loss_of = torch.compile(self._compute_loss, dynamic=False, mode=mode)

    def train(self, passes: int) -> np.ndarray:
        """Makes passes over the data, and returns the losses of the last one before its updates."""
        for _ in range(passes):
            losses = [self._step(*batch) for batch in self._batches()]
        return torch.stack(losses).cpu().double().numpy()

    def losses(self) -> np.ndarray:
        """Makes one pass, and returns the loss of each step."""
        return self.train(1)

    def steps(self, count: int) -> None:
        """Takes steps on the first batch."""
        first = self._slice(0)
        for _ in range(count):
            loss = self._step(*first)
        loss.cpu()

    def predict(self, inputs: Any) -> np.ndarray:
        """Returns the outputs in evaluation mode."""
        tensors = tuple(map(self._to_input, parts(inputs)))
        self.module.eval()
        with torch.inference_mode():
            starts = range(0, len(tensors[0]), 1000)
            outputs = [self._call([x[start : start + 1000] for x in tensors]) for start in starts]
        self.module.train()
        return torch.cat(outputs).cpu().numpy()

    def updates(self) -> int:
        """Returns how many updates the optimizer has made."""
        return self._updates

    def _count(self, *_: object) -> None:
        self._updates += 1

    def _step(self, inputs: Any, targets: Any) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self._loss_of(inputs, targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone() if self._copies else loss.detach()

    def _compute_loss(self, inputs: Any, targets: Any) -> torch.Tensor:
        return self._loss(self._call(inputs), targets[0] if self._single[1] else targets)

    def _call(self, inputs: Any) -> Any:
        if self._single[0]:
            return self.module(inputs[0])
        return self.module(*inputs) if self._spread else self.module(tuple(inputs))

    def _slice(self, start: int) -> tuple[Any, Any]:
        stop = start + self._batch_size
        return [x[start:stop] for x in self._inputs], [x[start:stop] for x in self._targets]

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        count = len(self._inputs)
        if self._loader:
            dataset = torch.utils.data.TensorDataset(*self._inputs, *self._targets)
            for batch in torch.utils.data.DataLoader(dataset, self._batch_size):
                yield batch[:count], batch[count:]
            return
        for start in range(0, len(self._inputs[0]), self._batch_size):
            yield self._slice(start)

    def _to_input(self, array: np.ndarray) -> torch.Tensor:
        """Returns an input as jaxtrain's adapter gives it to a module."""
        floats = (x.dtype for x in self.module.parameters() if x.is_floating_point())
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if tensor.is_floating_point():
            tensor = tensor.to(next(floats, torch.float32))
        elif tensor.element_size() > 1:
            tensor = tensor.long()
        tensor = tensor.to(device())
        if self._last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _publish_globals(function: Any) -> None:
    """Makes the names that came with a function those of its module, where torch.compile looks."""
    names = getattr(function, "__globals__", {})
    if module := names.get("__name__"):
        found = vars(sys.modules.setdefault(module, types.ModuleType(module)))
        for name, value in list(names.items()):
            found.setdefault(name, value)


def device() -> torch.device:
    """Returns the device on which JAX computes.

    Raises:
      RuntimeError: JAX computes on a GPU that PyTorch does not see.
    """
    if os.environ.get(DEVICE_VARIABLE, "cpu") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("JAX computes on a GPU that PyTorch does not see")
    return torch.device("cuda")


def _to_target(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.float() if tensor.is_floating_point() else tensor.long()).to(device())


def parts(arrays: Any) -> tuple[Any, ...]:
    """Returns an array, or a tuple of arrays, as a tuple."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _takes(module: torch.nn.Module, inputs: Any) -> bool:
    """Returns whether a module takes its inputs as several arguments."""
    try:
        inspect.signature(module.forward).bind(*inputs)
    except TypeError:
        return False
    return True
