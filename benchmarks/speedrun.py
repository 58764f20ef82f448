"""The suite `speedrun`: MNIST to 99 % test accuracy, by our recipe and by PyTorch's example.

    python -m benchmarks.speedrun PEER [--seed 0] [--folder FOLDER]

trains with one peer in eager PyTorch, and prints its reading as one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import problem, torch_reference
from benchmarks.peers import reason_missing
from benchmarks.suites import (
    EAGER,
    NOT_SELECTED,
    OURS,
    Probe,
    Row,
    Settings,
    WorkerError,
    attempt,
    run_module,
)

if TYPE_CHECKING:
    import torch

CASE = "MNIST to 99 %"
RECIPE = f"{EAGER}, the same recipe"
EXAMPLE = f"{EAGER}, its MNIST example"
SEEDS = 20
TARGET = 0.99
EXAMPLE_EPOCHS = 14
# The example trains for minutes.
EXAMPLE_ROUNDS = 3
# The recipe of `experiments/speedrun.py`, which PyTorch's process does not import.
BATCH_SIZE, LEARNING_RATE, WARMUP, LABEL_SMOOTHING = 16, 0.005, 0.2, 0.1

Reading = dict[str, Any]
Data = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def run_suite(settings: Settings) -> Iterator[list[Row]]:
    """Trains by each recipe, in turns and each time in a new process.

    Yields:
      All rows so far, after each round. The facts of a row are the test accuracies of its seeds,
      and the seconds of compiling and of the process.
    """
    actions: dict[str, Callable[[int], Reading]] = {
        OURS: lambda _: _ours(settings, seeds=1),
        RECIPE: functools.partial(_pytorch, settings, RECIPE),
        EXAMPLE: functools.partial(_pytorch, settings, EXAMPLE),
    }
    missing: dict[str, str] = {}
    for name in actions:
        peer = OURS if name == OURS else EAGER
        reason = reason_missing(peer) if peer in settings.names else NOT_SELECTED
        if settings.cases.quick and name == EXAMPLE:
            reason = "not measured in a quick run"
        if reason is not None:
            missing[name] = reason
    probe = Probe()
    readings: dict[str, list[Reading]] = {name: [] for name in actions if name not in missing}
    accuracies: list[float] = []
    if OURS in readings:
        settings.log(f"speedrun: {SEEDS} seeds")
        try:
            accuracies = _ours(settings, seeds=1 if settings.cases.quick else SEEDS)["accuracies"]
        except WorkerError as error:
            missing[OURS] = str(error)
            del readings[OURS]
    for index in range(settings.rounds):
        for name in list(readings):
            if name == EXAMPLE and index >= EXAMPLE_ROUNDS:
                continue
            settings.log(f"speedrun: round {index + 1} of {settings.rounds}: {name}")
            try:
                attempts, disturbed = attempt(
                    functools.partial(actions[name], index), probe, settings
                )
            except WorkerError as error:
                missing[name] = str(error)
                del readings[name]
                continue
            readings[name].append(attempts[-1] | {"disturbed": disturbed})
        yield [
            *(Row("speedrun", CASE, name, missing=reason) for name, reason in missing.items()),
            *(_row(name, found, accuracies) for name, found in readings.items()),
        ]


def _row(name: str, readings: list[Reading], ours: list[float]) -> Row:
    facts = {
        "accuracies": ours if name == OURS else [each["accuracy"] for each in readings],
        "compile_seconds": [each["compile_seconds"] for each in readings],
        "process_seconds": [each["process_seconds"] for each in readings],
        "disturbed": sum(each["disturbed"] for each in readings),
    }
    if name == EXAMPLE:
        facts["epochs"] = [each["epochs"] for each in readings]
    return Row("speedrun", CASE, name, [each["seconds"] for each in readings], facts)


def _ours(settings: Settings, *, seeds: int) -> Reading:
    """Runs `experiments/speedrun.py` with the seeds 0 to `seeds - 1`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--seeds", str(seeds), "--output-dir", folder, "--no-compilation-cache"]
        if settings.cases.folder is None:
            arguments += ["--dataset", "digits"]
        else:
            arguments += ["--dataset", "mnist", "--data-dir", str(settings.cases.folder)]
        started = time.perf_counter()
        run_module("experiments.speedrun", arguments, None)
        seconds = time.perf_counter() - started
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "seconds": summary["train_seconds"] / seeds,
        "compile_seconds": summary["compile_seconds"],
        "process_seconds": seconds,
        "accuracies": summary["test_accuracies"],
    }


def _pytorch(settings: Settings, name: str, seed: int) -> Reading:
    """Trains in eager PyTorch, in a process."""
    folder = settings.cases.folder
    flags = [] if folder is None else ["--folder", str(folder)]
    started = time.perf_counter()
    printed = run_module("benchmarks.speedrun", [name, "--seed", str(seed), *flags], None)
    seconds = time.perf_counter() - started
    return json.loads(printed) | {"compile_seconds": 0.0, "process_seconds": seconds}


def train_recipe(data: Data, seed: int) -> Reading:
    """Trains by the recipe of `experiments/speedrun.py`; the time includes the test."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(seed)
    (inputs, targets), test = map(_tensors, data)
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
    return {"seconds": time.perf_counter() - started, "accuracy": accuracy}


def train_example(data: Data, seed: int) -> Reading:
    """Trains as PyTorch's MNIST example until its test accuracy first exceeds 99 %.

    Uses the example's network, optimizer, schedule and batch size, but tensors in memory in place
    of a DataLoader.
    """
    import torch
    from torch.nn import functional as F

    from benchmarks.networks import torch as networks

    torch.manual_seed(seed)
    (inputs, targets), test = map(_tensors, data)
    model = _channels_last(networks.ConvNet((0.25, 0.5)))
    optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    started = time.perf_counter()
    epochs, accuracy = 0, 0.0
    while accuracy <= TARGET and epochs < EXAMPLE_EPOCHS:
        batches = torch_reference.slices(inputs, targets, 64, torch.randperm(len(inputs)))
        torch_reference.train_steps(model, optimizer, batches, F.cross_entropy)
        schedule.step()
        epochs, accuracy = epochs + 1, _accuracy(model, *test)
    return {"seconds": time.perf_counter() - started, "accuracy": accuracy, "epochs": epochs}


def make_network() -> torch.nn.Module:
    """Returns the network of `experiments/speedrun.py`."""
    from torch import nn

    network = nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 16, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    return _channels_last(network)


def _channels_last(network: torch.nn.Module) -> torch.nn.Module:
    """Returns the network in the memory format in which it trains faster."""
    import torch

    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_optimizer(model: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """Returns the optimizer and its schedule for a number of steps."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    return optimizer, schedule


def _tensors(part: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    images, labels = part
    return torch.from_numpy(problem.normalize(images)), torch.from_numpy(labels.astype(np.int64))


def _accuracy(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(1) for part in inputs.split(1000)])
    return float((predicted == targets).float().mean())


def main() -> None:
    """Trains with one peer, and prints its reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=(RECIPE, EXAMPLE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the MNIST files; without, random images")
    arguments = parser.parse_args()
    if arguments.folder is None:
        data = problem.random_images(640), problem.random_images(640)
    else:
        folder = arguments.folder
        data = problem.read_mnist(folder, "train"), problem.read_mnist(folder, "t10k")
    train = train_recipe if arguments.peer == RECIPE else train_example
    print(json.dumps(train(data, arguments.seed)))


if __name__ == "__main__":
    main()
