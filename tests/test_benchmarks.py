"""The benchmark suite: it counts right, is hard to fool, and its report says what was measured."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from benchmarks import peers, problem, report, suites, timing, work
from benchmarks.__main__ import PeerName
from benchmarks.peers import ours
from benchmarks.problem import PIXELS, Problem

ROOT = Path(__file__).parents[1]


@pytest.fixture
def task() -> Problem:
    """20 batches of T2 on noise, without dropout."""
    return problem.make("T2", *problem.random_images(1280))._replace(dropout_rate=0.0)


def test_flops_of_a_step_by_hand() -> None:
    forward = 2 * 64 * (784 * 256 + 256 * 128 + 128 * 64 + 64 * 10)
    inputs_but_the_first = 2 * 64 * (256 * 128 + 128 * 64 + 64 * 10)
    counted = work.step_work((256, 128, 64, 10), 64)
    assert counted.flops == 2 * forward + inputs_but_the_first


def test_flops_of_a_step_are_those_that_xla_counts() -> None:
    def loss(params: list[jax.Array], inputs: jax.Array) -> jax.Array:
        for kernel in params:
            inputs = inputs @ kernel
        return jnp.sum(inputs**2)

    widths = (PIXELS, 256, 128, 64, 10)
    params = [jnp.zeros(shape) for shape in itertools.pairwise(widths)]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, jnp.zeros((64, PIXELS)))
    counted = work.step_work(widths[1:], 64).flops
    # The rest is the square and the sum.
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=1e-3)


def test_an_epochs_work_counts_the_partial_batch(task: Problem) -> None:
    whole = work.epoch_work(task._replace(images=task.images[:128]))
    longer = work.epoch_work(task._replace(images=task.images[:160]))
    assert longer.flops == whole.flops + work.step_work(task.features, 32).flops


def test_contenders_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    actions = {"A": lambda: calls.append("A"), "B": lambda: calls.append("B")}
    seconds = timing.in_turns(actions, rounds=3)
    assert calls == ["A", "B"] + ["A", "B"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_short_work_is_repeated_and_its_reading_divided() -> None:
    counts: list[int] = []

    def run(count: int) -> None:
        counts.append(count)
        for _ in range(count):
            np.linalg.inv(np.eye(60))

    reading = timing.in_turns({"A": timing.Repeated(run)}, rounds=1)["A"][0]
    assert counts[-1] > 1
    assert reading < timing.READING_SECONDS


def test_ratio_of_medians_and_its_interval() -> None:
    ours = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert timing.speedup(ours, [2 * each for each in ours]).median == pytest.approx(2)
    noisy = [2.0, 2.5, 1.5, 2.2, 1.8]
    low, ratio, high = timing.speedup(ours, noisy)
    assert ratio == statistics.median(noisy) / statistics.median(ours)
    assert low < ratio < high
    # Noise that both share in a round cancels: the interval of a pure factor is that factor.
    drift = [1.0, 3.0, 1.0, 3.0, 1.0]
    low, ratio, high = timing.speedup(drift, [2 * each for each in drift])
    assert (low, ratio, high) == (2, 2, 2)


@pytest.mark.parametrize(
    "name", [name for name in peers.PEERS if name not in ("pytorch-compile", "pytorch-cuda-graphs")]
)
def test_every_peer_computes_the_same(name: str, task: Problem) -> None:
    try:
        make = peers.load(name)
    except peers.MissingError as error:
        pytest.skip(str(error))
    expected = suites.check("pytorch", peers.load("pytorch"), task, None)
    suites.check(name, make, task, expected)


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 0.011}, {"dropout_rate": 0.01}, {"batch_size": 63}, {"weight_decay": 0.05}],
)
def test_a_peer_that_computes_something_else_is_not_timed(change, task: Problem) -> None:
    expected = suites.check("pytorch", peers.load("pytorch"), task, None)

    def make(task: Problem, params: problem.Params) -> problem.Trainer:
        return ours.epoch_compiled(task._replace(**change), params)

    with pytest.raises(suites.DisagreementError, match=r"jaxtrain is .* off the losses"):
        suites.check("jaxtrain", make, task, expected)


def test_a_missing_peer_says_what_installs_it(monkeypatch) -> None:
    absent = peers.Peer("Absent", "absent:make", ("no_such_package",))
    monkeypatch.setitem(peers.PEERS, "absent", absent)
    with pytest.raises(peers.MissingError, match=r"no_such_package is not installed; pip install"):
        peers.load("absent")


def test_its_own_reader_reads_what_the_library_reads(mnist: jt.data.Resolved) -> None:
    folder = jt.data.mnist.locate_files("mnist", None)
    for split, data in (("train", mnist.train), ("t10k", mnist.test)):
        images, labels = problem.read_mnist(folder, split)
        np.testing.assert_array_equal(images, data.inputs)
        np.testing.assert_array_equal(labels, data.targets)


def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    file = tmp_path / "readings.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", file, "--output-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(file.read_text())
    assert results["machine"]["versions"]["jax"] == jax.__version__
    assert {row["suite"] for row in results["rows"]} == set(suites.SUITES)
    for row in results["rows"]:
        assert bool(row["missing"]) != bool(row["readings"])
        assert min(row["readings"], default=1) > 0
    assert any(row["missing"] for row in results["rows"]) == ("missing: " in result.stdout)
    timed = {row["peer"] for row in results["rows"] if row["readings"]}
    assert {"jaxtrain", "pytorch"} <= timed
    for picture in ("step_time", "step_throughput", "epoch_ratios"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_figures_are_those_of_the_committed_readings() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_gpu_has_aims_of_its_own() -> None:
    facts = {"examples": 60000, "batch_size": 64}
    row = {"suite": "epoch", "case": "T2, batch 64", "facts": facts, "missing": None}
    readings = {"jaxtrain": [938 * 40e-6] * 2, "pytorch": [938 * 800e-6] * 2}
    results = {
        "machine": {"device": "NVIDIA H200"},
        "rows": [{**row, "peer": peer, "readings": values} for peer, values in readings.items()],
    }
    _, body = report.target_table(results)
    assert [cells[1:] for cells in body] == [
        ["≤ 30 µs", "40 µs", "**missed**"],
        ["≥ 15 ×", "20 ×", "yes"],
    ]


def test_a_figure_whose_interval_spans_its_aim_is_not_called_reached() -> None:
    row = {"suite": "epoch", "case": "T2, batch 64", "facts": {}, "missing": None}
    readings = {"jaxtrain": [1.0] * 5, "pytorch": [2.0, 2.1, 2.4, 2.5, 2.6]}
    results = {
        "machine": {"device": "cpu"},
        "rows": [{**row, "peer": peer, "readings": values} for peer, values in readings.items()],
    }
    _, [cells] = report.target_table(results)
    assert cells[2].startswith("2.4 ×")
    assert cells[3] == "within noise, its median reaches"


def test_the_flags_know_every_peer() -> None:
    assert set(get_args(PeerName)) == set(peers.PEERS)


def test_a_target_that_is_missed_says_so() -> None:
    row = {"suite": "epoch", "case": "T2, batch 64", "facts": {}, "missing": None}
    readings = {"jaxtrain": [1.0, 1.0], "pytorch": [2.0, 2.0], "keras": [2.0, 2.0]}
    results = {
        "machine": {"device": "cpu"},
        "rows": [{**row, "peer": peer, "readings": values} for peer, values in readings.items()],
    }
    _, body = report.target_table(results)
    assert [cells[1:] for cells in body] == [
        ["≥ 2.3 ×", "2 ×", "**missed**"],
        ["≥ 1.4 ×", "2 ×", "yes"],
    ]


def test_two_machines_stand_side_by_side() -> None:
    row = {"suite": "epoch", "case": "T2, batch 64", "facts": {}, "missing": None}

    def measured(processor: str, **seconds: float) -> dict:
        return {
            "machine": {"device": "cpu", "processor": processor},
            "rows": [{**row, "peer": peer, "readings": [s, s]} for peer, s in seconds.items()],
        }

    every = [measured("A", jaxtrain=1, pytorch=3), measured("B", jaxtrain=1, pytorch=2, keras=2)]
    headings, body = report.machines_table(every)
    assert headings == ["measure", "aim", "A", "B"]
    assert [cells[1:] for cells in body] == [
        ["≥ 2.3 ×", "3 ×: yes", "2 ×: **missed**"],
        ["≥ 1.4 ×", "", "2 ×: yes"],
    ]
