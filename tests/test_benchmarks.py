"""Tests the benchmarks: what the peers compute, the checks of it, and the tables of the report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtrain as jt
from benchmarks import (
    cases,
    peers,
    problem,
    report,
    speedrun,
    suites,
    sweeps,
    worker,
)
from benchmarks.problem import Problem
from jaxtrain.race import processes

ROOT = Path(__file__).parents[1]
# torch.compile needs a minute and a C++ compiler.
TRAINED = [name for name, peer in peers.PEERS.items() if peer.make and name != "pytorch-compile"]


@pytest.fixture(scope="module")
def task() -> Problem:
    """Returns the version of T2 whose losses are compared."""
    return cases.checked("models", "jaxtrain", None)["T2"]


@pytest.fixture(scope="module")
def pytorch_losses(task: Problem) -> np.ndarray:
    """Returns the losses of eager PyTorch, or skips the test where PyTorch is not installed."""
    pytest.importorskip("torch")
    return losses_of("pytorch", task)


def make(name: str, task: Problem):
    return peers.make(name, task, suites.torch_trainer(name))


def losses_of(name: str, task: Problem) -> np.ndarray:
    return worker.losses_of(name, task, suites.torch_trainer(name))


@pytest.mark.parametrize("name", TRAINED)
def test_every_peer_computes_the_losses_of_pytorch_and_makes_the_updates_that_are_timed(
    name: str, task: Problem, pytorch_losses: np.ndarray
) -> None:
    if reason := peers.reason_missing(name):
        pytest.skip(reason)
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases by it
        trainer = make(name, task)
        # Ten classes, not trained yet.
        assert worker.batch_loss(trainer, name, task) == pytest.approx(math.log(10), rel=0.05)
        found = np.concatenate([trainer.losses(), trainer.losses()])
        suites.compare(name, "T2", found, pytorch_losses)
        assert trainer.updates() == 2 * task.steps
        if "step" in peers.PEERS[name].suites:
            trainer.steps(3)
            assert trainer.updates() == 2 * task.steps + 3


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": problem.Optimizer("sgd", 0.011, weight_decay=cases.CHECKED_WEIGHT_DECAY)},
        {"optimizer": problem.Optimizer("sgd", 0.01, weight_decay=0.0)},
        {"dropout_rates": (0.01,) * 3},
        {"batch_size": 63},
    ],
    ids=["learning rate", "no weight decay", "dropout", "batch size"],
)
def test_a_peer_with_other_losses_is_rejected(
    change: dict, task: Problem, pytorch_losses: np.ndarray
) -> None:
    found = losses_of("pytorch", task._replace(**change))
    with pytest.raises(jt.errors.InputError, match=r"losses of .* differ by"):
        suites.compare("pytorch", "T2", found, pytorch_losses)


@pytest.mark.parametrize(
    ("task", "runs"), [(sweeps.line()._replace(epochs=20), 3), (sweeps.network(), 2)]
)
def test_every_way_to_train_many_runs_computes_the_same_losses(
    task: sweeps.Task, runs: int
) -> None:
    pytest.importorskip("torch")
    task = task._replace(dropout_rates=(0.0,) * len(task.dropout_rates))
    expected, *others = (train(task, runs)() for train in sweeps.SWEEPS.values())
    for found in others:
        suites.compare("PyTorch", "sweep", found, expected)
        with pytest.raises(jt.errors.InputError):
            suites.compare("PyTorch", "sweep", found + 1e-3, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "libraries",
    [
        {"pytorch": "jax jaxtrain keras equinox"},
        # One after the other in one process.
        {
            "equinox": "torch jaxtrain keras flax",
            "nnx": "torch jaxtrain keras",
            "jaxtrain": "torch keras",
            "keras": "torch",
        },
    ],
)
def test_a_worker_imports_no_other_peers_library(libraries: dict[str, str]) -> None:
    if reasons := [peers.reason_missing(name) for name in libraries if peers.reason_missing(name)]:
        pytest.skip(reasons[0])
    trainers = {name: suites.torch_trainer(name) for name in libraries}

    def imported() -> list[str]:  # travels with its code, since this module imports jaxtrain
        found: list[str] = []
        for name, others in libraries.items():
            (task,) = cases.problems("models", name, None).values()
            peers.make(name, task, trainers[name])
            found += set(others.split()) & set(sys.modules)
        return found

    assert processes.call(imported) == []


@pytest.mark.slow
def test_quick_run_measures_a_suite(tmp_path: Path) -> None:
    pytest.importorskip("cloudpickle")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--peers", "jaxtrain", "pytorch"]
    command += ["--suite", "step", "--output-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["versions"]["jax"] == jax.__version__
    assert {row["suite"] for row in found["rows"]} == {"step"}
    for row in found["rows"]:
        assert bool(row["missing"]) != bool(row["readings"])
        assert min(row["readings"], default=1) > 0
    assert any(row["peer"] == "jaxtrain" and row["readings"] for row in found["rows"])


@pytest.mark.parametrize(("accuracy", "is_missing"), [(0.94, False), (0.125, True)])
def test_a_quick_speedrun_trains_both_sides_on_the_same_images(
    monkeypatch, accuracy: float, is_missing: bool
) -> None:
    """A side that ends with another accuracy did other work, and has no time to compare."""

    def call(function, *arguments) -> dict:
        if function is speedrun.run_recipe:
            is_quick, *_ = arguments
            assert is_quick
            return {"seconds": 1.0, "compile_seconds": 1.0, "accuracy": 0.95}
        with np.load(arguments[0]) as arrays:
            for part, split in zip(jt.data.load("digits"), ("train", "test"), strict=True):
                np.testing.assert_array_equal(arrays[f"{split}_images"], part.inputs)
                np.testing.assert_array_equal(arrays[f"{split}_labels"], part.targets)
        return {"seconds": 1.0, "compile_seconds": 0.0, "accuracy": accuracy}

    monkeypatch.setattr(speedrun, "call", call)
    settings = suites.Settings(["jaxtrain", "pytorch"], None, 1, lambda text: None)
    (rows,) = speedrun.run_suite(settings)
    assert [row.readings for row in rows if not row.missing] == [[1.0]] * (2 - is_missing)
    reasons = [row.missing for row in rows if row.missing]
    assert len(reasons) == is_missing
    assert all("accuracy 0.125; expected about 0.95" in reason for reason in reasons)


def test_the_report_writes_the_committed_tables(monkeypatch) -> None:
    """README's table, and those of docs/benchmarks.md."""
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    report.main()


def test_the_report_notices_a_table_that_was_edited(tmp_path: Path, monkeypatch) -> None:
    edited = tmp_path / "README.md"
    edited.write_text(report.README.read_text().replace("| ResNet with batch norm |", "| ResNet |"))
    monkeypatch.setattr(report, "README", edited)
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: README\.md; run"):
        report.main()
