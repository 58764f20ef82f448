"""Defines what each suite trains: the problems, the sweeps, and the versions that are compared."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import flops, linear_regression, peers, problem
from benchmarks.problem import FEATURES, Problem

SUITES = ("step", "models", "growth", "sweep", "run", "speedrun")
STEP_BATCH_SIZES = (1, 16, 64, 256, 1024, 4096)
MODELS = ("T2", "CNN", "ResNet", "LSTM", "ViT")
# T2 trains on all of MNIST, the larger networks on 29 batches of 64 and one of 44.
SUBSET = 1900
# Minimum duration of a timed section, so that waking threads and refilling caches matter little.
SECTION_SECONDS = 0.1
# The losses of 20 batches of 64 images are compared, and of one of 20.
CHECKED_STEPS, CHECKED_PARTIAL = 20, 20
# A decay of 1e-6 does not show in 40 losses; a peer that ignores this one differs by 0.02.
CHECKED_WEIGHT_DECAY = 0.05


class Settings(NamedTuple):
    """What the cases depend on.

    Attributes:
      folder: folder of the MNIST files, or None for random images.
      quick: whether to measure small cases only, to test the suites.
    """

    folder: Path | None
    quick: bool


class Sweep(NamedTuple):
    """Many runs of one problem from different starts.

    Attributes:
      name: the name of the case in tables.
      runs: number of runs.
      peers: the peers that train them.
      problem: the problem of a network, or None for T1's linear regression.
      sample: how many runs a peer trains that trains one after another.
    """

    name: str
    runs: int
    peers: tuple[str, ...]
    problem: Problem | None
    sample: int


@functools.cache
def images(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Returns MNIST's training images and labels, or random ones."""
    if settings.folder is None:
        return problem.random_images(1280)
    return problem.read_mnist(settings.folder, "train")


def problems(suite: str, peer: str, settings: Settings) -> dict[str, Problem]:
    """Returns the problems that a peer trains in the suite `step`, `models` or `growth`."""
    make = {"step": _steps, "models": _models, "growth": _growth}[suite]
    tasks = make(settings)
    if peer not in peers.PEERS:  # matrix products, which only the feed-forward networks count
        return {case: task for case, task in tasks.items() if task.features}
    networks = peers.PEERS[peer].networks if suite == "models" else ()
    return {case: task for case, task in tasks.items() if not networks or task.network in networks}


def _steps(settings: Settings) -> dict[str, Problem]:
    networks = ("T2",) if settings.quick else tuple(FEATURES)
    batch_sizes = (64,) if settings.quick else STEP_BATCH_SIZES
    tasks = [problem.make(n, *images(settings), size) for n in networks for size in batch_sizes]
    return {task.case: task for task in tasks}


def _models(settings: Settings) -> dict[str, Problem]:
    all_images, labels = images(settings)
    tasks = []
    for network in ("T2",) if settings.quick else MODELS:
        count = 100 if settings.quick else None if network == "T2" else SUBSET
        tasks.append(problem.make(network, all_images[:count], labels[:count]))
    return {task.case: task for task in tasks}


def _growth(settings: Settings) -> dict[str, Problem]:
    base = problem.make("T2", *images(settings))
    grown = {f"batch {size}": base._replace(batch_size=size) for size in (64, 256, 1024, 4096)}
    for factor in (2, 4):
        features = (*(factor * width for width in base.features[:-1]), base.features[-1])
        grown[f"width × {factor}"] = base._replace(features=features)
    for part in (4, 2):
        count = len(base.images) // part
        grown[f"{count} examples"] = base._replace(
            images=base.images[:count], labels=base.labels[:count]
        )
    return {"batch 256": grown["batch 256"]} if settings.quick else grown


def checked(suite: str, peer: str, settings: Settings) -> dict[str, Problem]:
    """Returns a version of each network for which all peers must compute the same losses.

    It has 20 batches of 64 images and one of 20, no dropout, and a weight decay that shows.
    """
    tasks = {task.network: task for task in problems(suite, peer, settings).values()}
    first = CHECKED_STEPS * 64 + CHECKED_PARTIAL
    found = {}
    for network, task in tasks.items():
        optimizer = task.optimizer
        if optimizer.weight_decay:
            optimizer = optimizer._replace(weight_decay=CHECKED_WEIGHT_DECAY)
        if network in ("CNN", "ResNet"):  # their rounding errors grow faster than the tolerance
            optimizer = optimizer._replace(learning_rate=0.01 * optimizer.learning_rate)
        found[network] = problem.without_dropout(task)._replace(
            images=np.resize(task.images, (first, 28, 28)),
            labels=np.resize(task.labels, first),
            batch_size=64,
            optimizer=optimizer,
        )
    return found


def steps_per_section(task: Problem) -> int:
    """Returns how many steps are timed at once, by a rough estimate of their duration."""
    return max(
        2,
        int(
            SECTION_SECONDS / (5e-5 + flops.step_work(task.features, task.batch_size).flops / 1e11)
        ),
    )


def sweeps(suite: str, settings: Settings) -> list[Sweep]:
    """Returns the sweeps of the suite `sweep`, or T1's single run of the suite `run`."""
    if suite == "run":
        return [_lines(1, ("jaxtrain", "pytorch"), settings)]
    found = [
        _lines(runs, tuple(linear_regression.RUNS), settings)
        for runs in ((32,) if settings.quick else (32, 1000))
    ]
    task = problem.make("T2", *problem.read_digits())
    names = ("jaxtrain", "pytorch", "pytorch-batched", "pytorch-vmap")
    for runs in (8,) if settings.quick else (8, 64):
        found.append(Sweep(f"{runs} × T2 on digits, {task.steps} steps", runs, names, task, 2))
    return found


def _lines(runs: int, names: tuple[str, ...], settings: Settings) -> Sweep:
    name = f"{runs} × T1, {linear_regression.EPOCHS} epochs"
    return Sweep(name, runs, names, None, 2 if settings.quick else 20)


def checked_sweep(sweep: Sweep) -> Sweep:
    """Returns the sweep with every run trained, no dropout, and a weight decay that shows."""
    sweep = sweep._replace(sample=sweep.runs)
    if sweep.problem is None:
        return sweep
    task = problem.without_dropout(sweep.problem)
    optimizer = task.optimizer._replace(weight_decay=CHECKED_WEIGHT_DECAY)
    return sweep._replace(problem=task._replace(optimizer=optimizer))
