"""Measures the cases of a suite with one peer, in a process that imports no other peer's library.

    python -m benchmarks.worker SUITE PEER [--quick] [--folder FOLDER] [--losses FILE]

Prints one line of JSON: the measured values by case. With --losses it times nothing and writes the
losses of each case to FILE.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    cases,
    linear_regression,
    matrix_products,
    network_sweep,
    peers,
    problem,
)
from benchmarks.problem import Problem, Trainer

# Timed sections per process, after one that warms up. A reading is their median.
SECTIONS = 3


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def train(suite: str, name: str, task: Problem) -> dict[str, Any]:
    """Returns the seconds of a step or an epoch, and what the peer has computed in all sections."""
    trainer = peers.load(name)(task, problem.start(task))
    if suite == "step":
        count = divisor = cases.steps_per_section(task)
        section: Callable[[], object] = functools.partial(trainer.steps, count)
    else:
        count, divisor, section = task.steps, 1, trainer.epoch
    seconds = [timed(section) for _ in range(1 + SECTIONS)]
    median = statistics.median(seconds[1:])
    updates = trainer.updates()
    # After the steps on one batch, the loss of its images; after epochs, of another one in training
    # mode, since a batch norm's running statistics make the evaluation of a short training noisy.
    loss = batch_loss(trainer, task) if suite == "step" else trainer.losses().mean()
    return {
        "seconds": median / divisor,
        "compile_seconds": max(0.0, seconds[0] - median),
        "updates": updates,
        "expected_updates": count * (1 + SECTIONS),
        "loss": float(loss),
    }


def batch_loss(trainer: Trainer, task: Problem) -> float:
    """Returns the mean loss of the first batch in evaluation mode."""
    logits = trainer.predict(trainer.prepare(task.images[: task.batch_size])).astype(np.float64)
    labels = task.labels[: len(logits), None].astype(int)
    return (np.logaddexp.reduce(logits, 1) - np.take_along_axis(logits, labels, 1)[:, 0]).mean()


def multiply(suite: str, name: str, task: Problem) -> dict[str, Any]:
    """Returns the seconds of the matrix products of a step or an epoch alone."""
    loop = matrix_products.LOOPS[name](task)
    count = cases.steps_per_section(task) if suite == "step" else task.steps
    loop(count)
    seconds = statistics.median(timed(functools.partial(loop, count)) for _ in range(SECTIONS))
    return {"seconds": seconds / count if suite == "step" else seconds}


def losses_of(name: str, task: Problem) -> np.ndarray:
    """Returns the losses of two passes over the data."""
    trainer = peers.load(name)(task, problem.start(task))
    return np.concatenate([trainer.losses(), trainer.losses()])


def sweep_action(name: str, case: cases.Sweep) -> tuple[Callable[[], np.ndarray], int]:
    """Returns a function that trains the runs of a sweep, and how many of them it trains."""
    # Eager PyTorch trains one run after another, so that a few of them suffice.
    count = min(case.runs, case.sample) if name == "pytorch" else case.runs
    if case.problem is None:
        runs = linear_regression.RUNS[name]()
        starts = linear_regression.starts(count)
        return lambda: runs(starts), count
    return network_sweep.SWEEPS[name](case.problem)(count), count


def train_sweep(name: str, case: cases.Sweep) -> dict[str, Any]:
    """Returns the seconds that all runs of a sweep take."""
    action, count = sweep_action(name, case)
    action()
    repetitions = max(1, int(cases.SECTION_SECONDS / timed(action)))

    def repeat() -> None:
        for _ in range(repetitions):
            action()

    seconds = statistics.median(timed(repeat) for _ in range(SECTIONS)) / repetitions
    return {
        "seconds": seconds * case.runs / count,
        **({"sample": count} if count < case.runs else {}),
    }


def measure(suite: str, name: str, settings: cases.Settings) -> Iterator[tuple[str, dict]]:
    """Yields the values of each case."""
    if suite in ("sweep", "run"):
        for case in cases.sweeps(suite, settings):
            if name in case.peers:
                yield case.name, train_sweep(name, case)
        return
    run = multiply if name in matrix_products.LOOPS else train
    for case_name, task in cases.problems(suite, name, settings).items():
        yield case_name, run(suite, name, task)


def losses(suite: str, name: str, settings: cases.Settings) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the losses of each case, without dropout and with a weight decay that shows."""
    if suite in ("sweep", "run"):
        for case in cases.sweeps(suite, settings):
            if name in case.peers:
                yield case.name, sweep_action(name, cases.checked_sweep(case))[0]()
        return
    if suite == "step" and name == "jaxtrain":
        name = "jaxtrain-steps"  # its losses come from the function that is timed
    for network, task in cases.checked(suite, name, settings).items():
        yield network, losses_of(name, task)


def main() -> None:
    """Measures, or computes the losses, and prints or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suite", choices=cases.SUITES)
    parser.add_argument("peer", choices=[*peers.PEERS, *matrix_products.LOOPS])
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--folder", type=Path, help="of the MNIST files; without, random images")
    parser.add_argument("--losses", type=Path, help="write losses to this .npz file, do not time")
    arguments = parser.parse_args()
    settings = cases.Settings(arguments.folder, arguments.quick)
    if arguments.losses:
        found: dict[str, Any] = dict(losses(arguments.suite, arguments.peer, settings))
        np.savez(arguments.losses, **found)
        return
    print(json.dumps(dict(measure(arguments.suite, arguments.peer, settings))))


if __name__ == "__main__":
    main()
