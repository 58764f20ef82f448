"""Defines what each suite trains: the problems, the sweeps, and the versions that are compared."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import peers, problem, sweeps
from benchmarks.problem import FEATURES, Problem

SUITES = ("step", "models", "sweep", "run", "speedrun")
STEP_BATCH_SIZES = (1, 16, 64, 256, 1024, 4096)
MODELS = ("T2", "CNN", "ResNet", "LSTM", "ViT")
# T2 trains on all of MNIST, the larger networks on 29 batches of 64 and one of 44.
SUBSET = 1900
# The losses of 20 batches of 64 images are compared, and of one of 20.
CHECKED_STEPS, CHECKED_PARTIAL = 20, 20
# A decay of 1e-6 does not show in 40 losses; a peer that ignores this one differs by 0.02.
CHECKED_WEIGHT_DECAY = 0.05


class Sweep(NamedTuple):
    """Many runs of one task from different starts."""

    name: str
    runs: int
    task: sweeps.Task
    sample: int  # runs of a peer that trains one after another


def problems(suite: str, peer: str, data: Path | None) -> dict[str, Problem]:
    """Returns the problems that a peer trains in the suite `step` or `models`.

    Without a file of images, it is one small network on random ones, to test the suites.
    """
    images, labels = problem.read_images(data, "train")
    if data is None:
        few = 64 if suite == "step" else 100
        tasks = [problem.make("T2", images[:few], labels[:few])]
    elif suite == "step":
        sizes = STEP_BATCH_SIZES
        tasks = [problem.make(name, images, labels, size) for name in FEATURES for size in sizes]
    else:
        counts = {name: None if name == "T2" else SUBSET for name in MODELS}
        tasks = [problem.make(name, images[:n], labels[:n]) for name, n in counts.items()]
    networks = peers.PEERS[peer].networks if suite == "models" else ()
    return {task.case: task for task in tasks if not networks or task.network in networks}


def checked(suite: str, peer: str, data: Path | None) -> dict[str, Problem]:
    """Returns a version of each network for which all peers must compute the same losses.

    It has 20 batches of 64 images and one of 20, no dropout, and a weight decay that shows.
    """
    tasks = {task.network: task for task in problems(suite, peer, data).values()}
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


def sweep_cases(data: Path | None) -> list[Sweep]:
    """Returns the sweeps: of T1, also a single run, and of T2's network on digits."""
    line, network = sweeps.line(), sweeps.network()
    steps = -(-len(network.inputs) // network.batch_size)
    few = 2 if data is None else 20
    found = [
        Sweep(f"{runs} × T1, {line.epochs} epochs", runs, line, few)
        for runs in ((32,) if data is None else (1, 32, 1000))
    ]
    for runs in (8,) if data is None else (8, 64):
        found.append(Sweep(f"{runs} × T2 on digits, {steps} steps", runs, network, 2))
    return found


def checked_sweep(sweep: Sweep) -> Sweep:
    """Returns the sweep with every run trained, no dropout, and a weight decay that shows."""
    task = sweep.task
    if task.test is None:
        optimizer = task.optimizer._replace(weight_decay=CHECKED_WEIGHT_DECAY)
        rates = (0.0,) * len(task.dropout_rates)
        task = task._replace(optimizer=optimizer, dropout_rates=rates)
    return sweep._replace(sample=sweep.runs, task=task)
