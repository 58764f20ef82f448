"""What the process of one peer does, which imports no other peer's library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases, peers, problem, sweeps
from benchmarks.problem import Problem, Trainer, normalize

# `TorchTrainer` of jaxtrain.race, for the peers of PyTorch.
TorchTrainer = Callable[..., Any] | None


def trainers(
    suite: str, name: str, data: Path | None, torch_trainer: TorchTrainer
) -> Iterator[tuple[str, tuple[Callable[[], Trainer], int, int | None]]]:
    """Yields the name of each case, and what `measure` of jaxtrain.race takes."""
    for case, task in cases.problems(suite, name, data).items():
        make = functools.partial(peers.make, name, task, torch_trainer)
        if suite == "step":
            yield case, (functools.partial(_of_one_batch, make, name, task), 1, None)
        else:
            yield case, (make, task.steps, 1)


def measure_all(
    measure: Callable[..., dict[str, Any]],
    suite: str,
    name: str,
    data: Path | None,
    torch_trainer: TorchTrainer,
) -> dict[str, dict[str, Any]]:
    """Returns the values of each case, by `measure` of jaxtrain.race."""
    cases_of_peer = trainers(suite, name, data, torch_trainer)
    return {case: measure(*arguments) for case, arguments in cases_of_peer}


def _of_one_batch(make: Callable[[], Any], name: str, task: Problem) -> Trainer:
    """Returns a trainer whose pass is one step on the first batch.

    Its loss at the end is that of these images.
    """
    made = make()
    return Trainer(
        made.steps,
        lambda: np.array([batch_loss(made, name, task)]),
        made.steps,
        made.predict,
        made.updates,
    )


def batch_loss(trainer: Any, name: str, task: Problem) -> float:
    """Returns the mean loss of the first batch in evaluation mode."""
    images = task.images[: task.batch_size]
    images = images if peers.takes_pixels(name) else normalize(images)
    logits = trainer.predict(images).astype(np.float64)
    labels = task.labels[: len(logits), None].astype(int)
    return (np.logaddexp.reduce(logits, 1) - np.take_along_axis(logits, labels, 1)[:, 0]).mean()


def losses_of(name: str, task: Problem, torch_trainer: TorchTrainer) -> np.ndarray:
    """Returns the losses of two passes over the data."""
    trainer = peers.make(name, task, torch_trainer)
    return np.concatenate([trainer.losses(), trainer.losses()])


def sweep_action(name: str, case: cases.Sweep) -> tuple[Callable[[], np.ndarray], int]:
    """Returns a function that trains the runs of a sweep, and how many of them it trains."""
    # Eager PyTorch trains one run after another, so that a few of them suffice.
    count = min(case.runs, case.sample) if name == "pytorch" else case.runs
    return sweeps.SWEEPS[name](case.task, count), count


def measure_sweeps(
    time_sections: Callable[..., Any], name: str, data: Path | None
) -> dict[str, dict[str, Any]]:
    """Returns the seconds that all runs of each sweep take, by `time_sections` of jaxtrain.race."""
    found = {}
    for case in cases.sweep_cases(data):
        action, count = sweep_action(name, case)

        def repeat(times: int, action: Callable[[], object] = action) -> None:
            for _ in range(times):
                action()

        values, *_ = time_sections(repeat)
        sample = {"extrapolated_from": count} if count < case.runs else {}
        found[case.name] = {"seconds": values["seconds"] * case.runs / count, **sample}
    return found


def losses(
    suite: str, name: str, data: Path | None, torch_trainer: TorchTrainer
) -> dict[str, np.ndarray]:
    """Returns the losses of each case, without dropout and with a weight decay that shows."""
    if suite == "sweep":
        return {
            case.name: sweep_action(name, cases.checked_sweep(case))[0]()
            for case in cases.sweep_cases(data)
        }
    # Those of single steps come from the function that is timed.
    peer = "jaxtrain-steps" if (suite, name) == ("step", "jaxtrain") else name
    return {
        network: losses_of(peer, task, torch_trainer)
        for network, task in cases.checked(suite, name, data).items()
    }


def train_and_test(
    peak_memory_mib: Callable[[], float],
    name: str,
    data: Path | None,
    epochs: int,
    torch_trainer: TorchTrainer,
) -> tuple[float, float]:
    """Trains T2, tests it after each epoch, and returns the last accuracy and the peak memory."""
    task = problem.make("T2", *problem.read_images(data, "train"))
    images, labels = problem.read_images(data, "test")
    images = images if peers.takes_pixels(name) else normalize(images)
    trainer = peers.make(name, task, torch_trainer)
    for _ in range(epochs):
        trainer.train(1)
        accuracy = float((trainer.predict(images).argmax(-1) == labels).mean())
    return accuracy, peak_memory_mib()
