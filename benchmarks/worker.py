"""Measures one peer, in a process that imports no other peer's library.

    python -m benchmarks.worker SUITE PEER [--data FILE] [--losses FILE] [--epochs N]

Prints one line of JSON: the measured values by case. With --losses it times nothing and writes the
losses of each case to FILE. With --epochs it trains T2 and tests it after each epoch, and prints
the test accuracy and the peak memory: the suite `run` measures such a process as a whole.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases, peers, problem, sweeps
from benchmarks.problem import Problem, Trainer

# Timed sections per process, after one that warms up. A reading is their median.
SECTIONS = 3
# Least duration of a section of steps, so that waking threads and refilling caches matter little.
SECTION_SECONDS = 0.1


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def train(suite: str, name: str, task: Problem) -> dict[str, Any]:
    """Returns the seconds of a step or an epoch, and what the peer has computed in all sections."""
    trainer = peers.load(name)(task, problem.start(task))
    if suite == "step":
        first = timed(lambda: trainer.steps(1))
        count = max(2, int(SECTION_SECONDS / timed(lambda: trainer.steps(1))))
        seconds = [timed(lambda: trainer.steps(count)) / count for _ in range(SECTIONS)]
        expected = 2 + count * SECTIONS
    else:
        first, *seconds = (timed(trainer.epoch) for _ in range(1 + SECTIONS))
        expected = task.steps * (1 + SECTIONS)
    median = statistics.median(seconds)
    updates = trainer.updates()
    # After the steps on one batch, the loss of its images; after epochs, of another one in training
    # mode, since a batch norm's running statistics make the evaluation of a short training noisy.
    loss = batch_loss(trainer, task) if suite == "step" else trainer.losses().mean()
    return {
        "seconds": median,
        "compile_seconds": max(0.0, first - median),
        "updates": updates,
        "expected_updates": expected,
        "loss": float(loss),
    }


def batch_loss(trainer: Trainer, task: Problem) -> float:
    """Returns the mean loss of the first batch in evaluation mode."""
    logits = trainer.predict(trainer.prepare(task.images[: task.batch_size])).astype(np.float64)
    labels = task.labels[: len(logits), None].astype(int)
    return (np.logaddexp.reduce(logits, 1) - np.take_along_axis(logits, labels, 1)[:, 0]).mean()


def losses_of(name: str, task: Problem) -> np.ndarray:
    """Returns the losses of two passes over the data."""
    trainer = peers.load(name)(task, problem.start(task))
    return np.concatenate([trainer.losses(), trainer.losses()])


def sweep_action(name: str, case: cases.Sweep) -> tuple[Callable[[], np.ndarray], int]:
    """Returns a function that trains the runs of a sweep, and how many of them it trains."""
    # Eager PyTorch trains one run after another, so that a few of them suffice.
    count = min(case.runs, case.sample) if name == "pytorch" else case.runs
    return sweeps.SWEEPS[name](case.task, count), count


def train_sweep(name: str, case: cases.Sweep) -> dict[str, Any]:
    """Returns the seconds that all runs of a sweep take."""
    action, count = sweep_action(name, case)
    action()
    repetitions = max(1, int(SECTION_SECONDS / timed(action)))

    def repeat() -> None:
        for _ in range(repetitions):
            action()

    seconds = statistics.median(timed(repeat) for _ in range(SECTIONS)) / repetitions
    sample = {"extrapolated_from": count} if count < case.runs else {}
    return {"seconds": seconds * case.runs / count, **sample}


def measure(suite: str, name: str, data: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the values of each case."""
    if suite == "sweep":
        for case in cases.sweep_cases(data):
            yield case.name, train_sweep(name, case)
    else:
        for case_name, task in cases.problems(suite, name, data).items():
            yield case_name, train(suite, name, task)


def losses(suite: str, name: str, data: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the losses of each case, without dropout and with a weight decay that shows."""
    if suite == "sweep":
        for case in cases.sweep_cases(data):
            yield case.name, sweep_action(name, cases.checked_sweep(case))[0]()
    else:
        # Those of single steps come from the function that is timed.
        peer = "jaxtrain-steps" if (suite, name) == ("step", "jaxtrain") else name
        for network, task in cases.checked(suite, name, data).items():
            yield network, losses_of(peer, task)


def train_and_test(name: str, data: Path | None, epochs: int) -> dict[str, float]:
    """Trains T2, tests it after each epoch, and returns the last accuracy and the peak memory."""
    task = problem.make("T2", *problem.read_images(data, "train"))
    test_images, labels = problem.read_images(data, "test")
    trainer = peers.load(name)(task, problem.start(task))
    images = trainer.prepare(test_images)
    for _ in range(epochs):
        trainer.epoch()
        accuracy = float((trainer.predict(images).argmax(-1) == labels).mean())
    return {"accuracy": accuracy, "peak_mib": peak_memory_mib()}


def peak_memory_mib() -> float:
    """Returns the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Measures, or computes the losses, and prints or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suite", choices=cases.SUITES)
    parser.add_argument("peer", choices=peers.PEERS)
    parser.add_argument("--data", type=Path, help="images (.npz); without, small cases only")
    parser.add_argument("--losses", type=Path, help="write losses to this .npz file, do not time")
    parser.add_argument("--epochs", type=int, help="train T2 for so many epochs, and test it")
    arguments = parser.parse_args()
    task = (arguments.suite, arguments.peer, arguments.data)
    if arguments.losses:
        np.savez(arguments.losses, **dict[str, Any](losses(*task)))
    elif arguments.epochs:
        print(json.dumps(train_and_test(arguments.peer, arguments.data, arguments.epochs)))
    else:
        print(json.dumps(dict(measure(*task))))


if __name__ == "__main__":
    main()
