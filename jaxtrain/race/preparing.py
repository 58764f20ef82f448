"""Prepares a race in PyTorch: its fastest settings, the length of a section, losses to check.

As `pytorch`, it is sent to processes with its code.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from typing import Any

import numpy as np
import torch

from jaxtrain.adapters.torch import dropping_nothing
from jaxtrain.race.measuring import first_losses
from jaxtrain.race.pytorch import TorchTrainer, parts

# A setting is measured for so long, several times.
_TUNING_SECONDS, _TUNING_READINGS = 0.1, 3
# At least so many steps are in a pass, if there are data.
_MIN_STEPS = 5
# A first loss that another seed changes by more than this fraction depends on random draws.
_DRAWN = 1e-5


def prepare(
    task: tuple[Any, ...], cores: int, seconds: float, checked_steps: int
) -> dict[str, Any]:
    """Finds PyTorch's fastest settings and the length of a section, and computes losses to check.

    Args:
      task: the first arguments of `TorchTrainer`.
      cores: the largest number of threads.
      seconds: duration of a section.
      checked_steps: number of the losses.

    Returns:
      `settings`, options of `TorchTrainer`; `tried`, all that were tried, with their seconds per
      step; `steps` per pass and `passes` per section; `losses` of `checked_steps` steps, their
      `rounding`, which is the effect of a change of the parameters in the last place; and
      `inexact`, why only mean losses can be compared: what the module does, or None.
    """
    settings, tried = _tune(task, cores)
    available = len(parts(task[3])[0]) // task[5]
    step = min(duration for _, duration in tried)
    steps = min(available, max(_MIN_STEPS, math.ceil(seconds / step)))
    passes = max(1, round(seconds / (step * steps)))
    losses = _checked_losses(task, settings, checked_steps)
    others = _checked_losses(task, settings, checked_steps, rounding=True)
    (reseeded,) = _checked_losses(task, settings, 1, seed=1)
    inexact = None
    if abs(losses[0] - reseeded) > _DRAWN * abs(losses[0]):
        inexact = "draws random numbers"
    elif any(x.is_floating_point() and x.element_size() == 2 for x in task[0].parameters()):
        inexact = "computes in half precision"
    return {
        **{"settings": settings, "tried": tried, "steps": steps, "passes": passes},
        **{"losses": losses, "rounding": np.abs(losses - others), "inexact": inexact},
    }


def _tune(
    task: tuple[Any, ...], cores: int
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], float]]]:
    """Returns the fastest settings, one changed after the other, and all with their seconds."""
    module, optimizer, _, inputs, *_ = task
    best: dict[str, Any] = {"threads": cores, "channels_last": False, "variant": None}
    tried = [(best, _seconds(task, best))]
    threads = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    changes = [{"threads": count} for count in reversed(threads)]
    if any(isinstance(layer, torch.nn.Conv2d) for layer in module.modules()) and any(
        part.ndim == 4 for part in parts(inputs)
    ):
        changes.append({"channels_last": True})
    changes += [{"variant": name} for name in ("foreach", "fused") if name in optimizer.defaults]
    for change in changes:
        settings = {**min(tried, key=lambda each: each[1])[0], **change}
        with contextlib.suppress(RuntimeError):  # of a variant that the device does not have
            tried.append((settings, _seconds(task, settings)))
    return min(tried, key=lambda each: each[1])[0], tried


def _seconds(task: tuple[Any, ...], settings: dict[str, Any]) -> float:
    """Returns the seconds of a step."""
    trainer = _make(task, batches=1, settings=settings)
    trainer.steps(2)
    started = time.perf_counter()
    trainer.steps(1)
    count = max(1, math.ceil(_TUNING_SECONDS / (time.perf_counter() - started)))
    readings = []
    for _ in range(_TUNING_READINGS):
        started = time.perf_counter()
        trainer.steps(count)
        readings.append((time.perf_counter() - started) / count)
    return min(readings)


def _make(task: tuple[Any, ...], batches: int, settings: dict[str, Any]) -> TorchTrainer:
    """Returns a trainer of a copy of the module on the first batches."""
    *first, inputs, targets, size = task
    module, optimizer, loss = copy.deepcopy(first)
    data = _head(inputs, batches * size), _head(targets, batches * size)
    return TorchTrainer(module, optimizer, loss, *data, size, **settings)


def _checked_losses(
    task: tuple[Any, ...],
    settings: dict[str, Any],
    steps: int,
    *,
    seed: int = 0,
    rounding: bool = False,
) -> np.ndarray:
    """Returns the losses without dropout, perhaps from rounded parameters or with another seed."""
    trainer = _make(task, batches=steps, settings=settings)
    torch.manual_seed(seed)
    if rounding:
        with torch.no_grad():
            for x in trainer.module.parameters():
                if x.is_floating_point():
                    unit = torch.finfo(x.dtype).eps
                    x.mul_(1 + unit * torch.randint(-1, 2, x.shape, device=x.device))
    with dropping_nothing():
        return first_losses(trainer, steps)


def _head(arrays: Any, count: int) -> Any:
    return tuple(x[:count] for x in arrays) if isinstance(arrays, tuple) else arrays[:count]
