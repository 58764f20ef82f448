"""Tests the benchmarks: what the peers compute, the checks of it, and the tables of the report."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
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
    results,
    speedrun,
    suites,
    sweeps,
    worker,
)
from benchmarks.problem import Problem

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
    return worker.losses_of("pytorch", task)


@pytest.mark.parametrize("name", TRAINED)
def test_every_peer_computes_the_losses_of_pytorch_and_makes_the_updates_that_are_timed(
    name: str, task: Problem, pytorch_losses: np.ndarray
) -> None:
    if reason := peers.reason_missing(name):
        pytest.skip(reason)
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases by it
        trainer = peers.load(name)(task, problem.start(task))
        # Ten classes, not trained yet.
        assert worker.batch_loss(trainer, task) == pytest.approx(math.log(10), rel=0.05)
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
    found = worker.losses_of("pytorch", task._replace(**change))
    with pytest.raises(suites.DisagreementError, match=r"losses of .* differ by"):
        suites.compare("pytorch", "T2", found, pytorch_losses)


def test_pytorch_that_trains_each_batch_three_times_is_rejected(monkeypatch) -> None:
    torch_reference = pytest.importorskip("benchmarks.torch_reference")
    slices = torch_reference.slices
    monkeypatch.setattr(
        torch_reference,
        "slices",
        lambda *arguments: itertools.chain.from_iterable([each] * 3 for each in slices(*arguments)),
    )
    (task,) = cases.problems("models", "pytorch", None).values()
    found = worker.train("models", "pytorch", task)
    wrong = suites.check_ends("models", {"T2": {"pytorch": [found]}})
    assert wrong == {"pytorch": "has made 24 updates in T2; expected 8"}


def test_a_peer_that_computes_something_else_or_fails_is_left_out() -> None:
    calls = []

    def reading(name: str, loss: float | None, _: int) -> dict:
        calls.append(name)
        if loss is None:
            raise suites.WorkerError("benchmarks.worker models nnx failed: MemoryError")
        return {"T2": {"seconds": 1.0, "loss": loss}}

    losses = {"pytorch": 0.2, "jaxtrain": 0.21, "keras": 0.9, "nnx": None}
    actions = {name: functools.partial(reading, name, loss) for name, loss in losses.items()}
    settings = suites.Settings(list(losses), None, 2, str)
    *_, (found, failed) = suites.measure("models", actions, settings)
    assert calls == ["pytorch", "jaxtrain", "keras", "nnx", "pytorch", "jaxtrain"]
    assert {name: len(each) for name, each in found["T2"].items()} == {"pytorch": 2, "jaxtrain": 2}
    assert "expected about 0.2" in failed["keras"]
    assert failed["nnx"].endswith("MemoryError")


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
        with pytest.raises(suites.DisagreementError):
            suites.compare("PyTorch", "sweep", found + 1e-3, expected)


def test_speedup_is_the_ratio_of_medians_with_a_paired_interval() -> None:
    ours, noisy = [1.0, 1.1, 0.9, 1.05, 0.95], [2.0, 2.5, 1.5, 2.2, 1.8]
    low, ratio, high = results.speedup(ours, noisy)
    assert ratio == statistics.median(noisy) / statistics.median(ours)
    assert low < ratio < high
    # Noise that both share in a round cancels.
    drift = [1.0, 3.0, 1.0, 3.0, 1.0]
    assert results.speedup(drift, [2 * each for each in drift]) == (2, 2, 2)


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
    code = f"""
import sys
from benchmarks import peers, worker
for name, others in {libraries}.items():
    peers.load(name)
    print(*set(others.split()) & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.slow
def test_quick_run_measures_a_suite(tmp_path: Path) -> None:
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

    def run_module(module, arguments, cache) -> str:
        if module == "experiments.speedrun":
            assert arguments[arguments.index("--dataset") + 1] == "digits"
            folder = Path(arguments[arguments.index("--output-dir") + 1])
            summary = {"train_seconds": 1.0, "compile_seconds": 1.0}
            summary |= {"test_accuracies": [0.95], "test_accuracy": 0.95}
            (folder / "summary.json").write_text(json.dumps(summary))
            return ""
        with np.load(arguments[arguments.index("--data") + 1]) as arrays:
            for part, split in zip(jt.data.load("digits"), ("train", "test"), strict=True):
                np.testing.assert_array_equal(arrays[f"{split}_images"], part.inputs)
                np.testing.assert_array_equal(arrays[f"{split}_labels"], part.targets)
        return json.dumps({"seconds": 1.0, "accuracy": accuracy})

    monkeypatch.setattr(speedrun, "run_module", run_module)
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
