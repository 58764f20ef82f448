"""The suite `speedrun`: MNIST to 99 % test accuracy, by our recipe and by PyTorch's example."""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import problem, torch_reference
from benchmarks.results import EAGER, EXAMPLE, OURS, RECIPE
from benchmarks.suites import Row, Settings, measure
from jaxtrain.race.processes import call
from jaxtrain.race.turns import Values

if TYPE_CHECKING:
    import torch

CASE = "MNIST to 99 %"
SEEDS = 20
TARGET = 0.99
EXAMPLE_EPOCHS = 14
# The recipe of `experiments/speedrun.py`, which PyTorch's process does not import.
BATCH_SIZE, LEARNING_RATE, WARMUP, LABEL_SMOOTHING = 16, 0.005, 0.2, 0.1

Reading = dict[str, Any]


def run_suite(settings: Settings, data_dir: Path | None = None) -> Iterator[list[Row]]:
    """Trains by each recipe, in turns and each time in a new process.

    Yields:
      All rows so far, after each round. The facts of a row are the test accuracies of its seeds,
      and the seconds of compiling and of the process.
    """
    quick = settings.data is None
    with tempfile.TemporaryDirectory() as scratch:
        # A quick run trains both sides on digits, so that its times can be compared.
        data = settings.data or problem.write_images(Path(scratch), "digits")
        yield from _rows(settings, data, data_dir, quick)


def _rows(
    settings: Settings, data: Path, data_dir: Path | None, quick: bool
) -> Iterator[list[Row]]:
    actions: dict[str, Callable[[int], Values]] = {}
    accuracies: list[float] = []
    if OURS in settings.names:
        if not quick:
            settings.log(f"speedrun: {SEEDS} seeds")
            accuracies = _reading(run_recipe, quick, data_dir, SEEDS)["accuracies"]
        actions[OURS] = lambda _: {CASE: _reading(run_recipe, quick, data_dir, 1)}
    if EAGER in settings.names:
        actions[RECIPE] = lambda seed: {CASE: _reading(train_recipe, data, seed)}
        if not quick:
            actions[EXAMPLE] = lambda seed: {CASE: _reading(train_example, data, seed)}
    for found, failed in measure("speedrun", actions, settings):
        yield [
            *(Row("speedrun", CASE, name, missing=reason) for name, reason in failed.items()),
            *(_row(name, each, accuracies) for name, each in found.get(CASE, {}).items()),
        ]


def _row(name: str, readings: list[Reading], ours: list[float]) -> Row:
    facts = {
        "accuracies": ours if name == OURS and ours else [each["accuracy"] for each in readings],
        "compile_seconds": [each["compile_seconds"] for each in readings],
        "process_seconds": [each["process_seconds"] for each in readings],
    }
    return Row("speedrun", CASE, name, [each["seconds"] for each in readings], facts)


def _reading(function: Callable[..., Reading], *arguments: Any) -> Reading:
    """Returns what a function measures in a new process, and the seconds of the process."""
    started = time.perf_counter()
    found = call(function, *arguments)
    return found | {"process_seconds": time.perf_counter() - started}


def run_recipe(quick: bool, data_dir: Path | None, seeds: int) -> Reading:
    """Runs `experiments/speedrun.py` with the seeds 0 to `seeds - 1`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--seeds", str(seeds), "--output-dir", folder, "--no-compilation-cache"]
        arguments += ["--dataset", "digits" if quick else "mnist"]
        arguments += ["--data-dir", str(data_dir)] if data_dir else []
        sys.argv = ["speedrun.py", *arguments]
        runpy.run_module("experiments.speedrun", run_name="__main__", alter_sys=True)
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "seconds": summary["train_seconds"] / seeds,
        "compile_seconds": summary["compile_seconds"],
        "accuracies": summary["test_accuracies"],
        "accuracy": summary["test_accuracy"],
    }


def train_recipe(file: Path, seed: int) -> Reading:
    """Trains by the recipe of `experiments/speedrun.py`; the time includes the test."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    (inputs, targets), test = (_tensors(file, split) for split in ("train", "test"))
    model = make_network()
    optimizer, schedule = make_optimizer(model, steps=-(-len(inputs) // BATCH_SIZE))
    started = time.perf_counter()
    order = torch.randperm(len(inputs))
    model.train()
    for x, y in torch_reference.slices(inputs, targets, BATCH_SIZE, order):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=LABEL_SMOOTHING).backward()
        optimizer.step()
        schedule.step()
    accuracy = _accuracy(model, *test)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "compile_seconds": 0.0, "accuracy": accuracy}


def train_example(file: Path, seed: int) -> Reading:
    """Trains as PyTorch's MNIST example until its test accuracy first exceeds 99 %.

    Uses the example's network, optimizer, schedule and batch size, but tensors in memory in place
    of a DataLoader.
    """
    import torch
    from torch.nn import functional as F

    from benchmarks.networks import torch as networks

    torch.manual_seed(seed)
    (inputs, targets), test = (_tensors(file, split) for split in ("train", "test"))
    model = networks.ConvNet((0.25, 0.5))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    started = time.perf_counter()
    epochs, accuracy = 0, 0.0
    while accuracy <= TARGET and epochs < EXAMPLE_EPOCHS:
        batches = torch_reference.slices(inputs, targets, 64, torch.randperm(len(inputs)))
        torch_reference.train_steps(model, optimizer, batches, F.cross_entropy)
        schedule.step()
        epochs, accuracy = epochs + 1, _accuracy(model, *test)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "compile_seconds": 0.0, "accuracy": accuracy}


def make_network() -> torch.nn.Module:
    """Returns the network of `experiments/speedrun.py`, in the format in which it trains faster."""
    import torch
    from torch import nn

    network = nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 16, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_optimizer(model: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """Returns the optimizer and its schedule for a number of steps."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    return optimizer, schedule


def _tensors(file: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    images, labels = problem.read_images(file, split)
    return torch.from_numpy(problem.normalize(images)), torch.from_numpy(labels.astype(np.int64))


def _accuracy(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(1) for part in inputs.split(1000)])
    return float((predicted == targets).float().mean())
