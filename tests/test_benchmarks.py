"""Tests the benchmarks: counts, timing, the comparison of losses, and the report."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from benchmarks import (
    cases,
    flops,
    peers,
    problem,
    readings,
    report,
    suites,
    tables,
    timing,
    worker,
)
from benchmarks.__main__ import PeerName, Suite
from benchmarks.problem import PIXELS, Problem

ROOT = Path(__file__).parents[1]
QUICK = cases.Settings(None, quick=True)
TRAINED = [
    name
    for name, peer in peers.PEERS.items()
    if peer.make and name not in ("pytorch-compile", "pytorch-cuda-graphs")
]


@pytest.fixture
def task() -> Problem:
    """Returns the version of T2 whose losses are compared."""
    return cases.checked("models", "jaxtrain", QUICK)["T2"]


@pytest.fixture
def pytorch_losses(task: Problem) -> np.ndarray:
    """Returns the losses of eager PyTorch, or skips the test where PyTorch is not installed."""
    pytest.importorskip("torch")
    return worker.losses_of("pytorch", task)


def ends(**values: dict) -> dict:
    """Returns readings of one case, as `suites.check_ends` takes them, by peer."""
    return {"T2": {name: [each] for name, each in values.items()}}


def test_flops_of_a_step_equal_a_count_by_hand() -> None:
    forward = 2 * 64 * (784 * 256 + 256 * 128 + 128 * 64 + 64 * 10)
    input_gradients = 2 * 64 * (256 * 128 + 128 * 64 + 64 * 10)
    counted = flops.step_work((256, 128, 64, 10), 64)
    assert counted.flops == 2 * forward + input_gradients


def test_flops_of_a_step_equal_xlas_count() -> None:
    def loss(params: list[jax.Array], inputs: jax.Array) -> jax.Array:
        for kernel in params:
            inputs = inputs @ kernel
        return jnp.sum(inputs**2)

    widths = (PIXELS, 256, 128, 64, 10)
    params = [jnp.zeros(shape) for shape in itertools.pairwise(widths)]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, jnp.zeros((64, PIXELS)))
    counted = flops.step_work(widths[1:], 64).flops
    # XLA also counts the square and the sum.
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=1e-3)


def test_work_of_an_epoch_includes_the_partial_batch(task: Problem) -> None:
    full = flops.epoch_work(task._replace(images=task.images[:128]))
    longer = flops.epoch_work(task._replace(images=task.images[:160]))
    assert longer.flops == full.flops + flops.step_work(task.features, 32).flops


def test_rounds_are_interleaved_after_a_warm_up() -> None:
    calls: list[str] = []
    actions = {"A": lambda: calls.append("A"), "B": lambda: calls.append("B")}
    seconds = timing.time_interleaved(actions, rounds=3)
    assert calls == ["A", "B"] + ["A", "B"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_short_actions_are_repeated_and_their_readings_divided() -> None:
    counts: list[int] = []

    def run(count: int) -> None:
        counts.append(count)
        for _ in range(count):
            np.linalg.inv(np.eye(60))

    reading = timing.time_interleaved({"A": timing.Repeated(run)}, rounds=1)["A"][0]
    assert counts[-1] > 1
    assert reading < timing.READING_SECONDS


def test_speedup_is_the_ratio_of_medians_with_a_paired_interval() -> None:
    ours = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert timing.speedup(ours, [2 * each for each in ours]).median == pytest.approx(2)
    noisy = [2.0, 2.5, 1.5, 2.2, 1.8]
    low, ratio, high = timing.speedup(ours, noisy)
    assert ratio == statistics.median(noisy) / statistics.median(ours)
    assert low < ratio < high
    # Noise that both share in a round cancels.
    drift = [1.0, 3.0, 1.0, 3.0, 1.0]
    low, ratio, high = timing.speedup(drift, [2 * each for each in drift])
    assert (low, ratio, high) == (2, 2, 2)


@pytest.mark.parametrize("name", TRAINED)
def test_every_peer_computes_the_losses_of_pytorch(
    name: str, task: Problem, pytorch_losses: np.ndarray
) -> None:
    if reason := peers.reason_missing(name):
        pytest.skip(reason)
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases by it
        suites.compare(name, "T2", worker.losses_of(name, task), pytorch_losses)


@pytest.mark.parametrize("network", ["CNN", "ResNet", "LSTM", "ViT"])
def test_jaxtrain_computes_the_losses_of_pytorch_for_every_model(network: str) -> None:
    pytest.importorskip("torch")
    task = problem.without_dropout(problem.make(network, *problem.random_images(20), 16))
    found = [worker.losses_of(name, task) for name in ("jaxtrain", "pytorch")]
    assert len(found[0]) == 4
    np.testing.assert_allclose(*found, rtol=1e-5)


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
@pytest.mark.parametrize("name", ["jaxtrain", "pytorch"])
def test_a_peer_with_other_losses_is_rejected(
    name: str, change: dict, task: Problem, pytorch_losses: np.ndarray
) -> None:
    found = worker.losses_of(name, task._replace(**change))
    with pytest.raises(suites.DisagreementError, match=r"losses of .* differ by"):
        suites.compare(name, "T2", found, pytorch_losses)


@pytest.mark.parametrize("name", TRAINED)
def test_every_peer_makes_the_updates_that_are_timed(name: str) -> None:
    if reason := peers.reason_missing(name):
        pytest.skip(reason)
    (task,) = cases.problems("models", name, QUICK).values()
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases by it
        trainer = peers.load(name)(task, problem.start(task))
        # Ten classes, not trained yet.
        assert worker.batch_loss(trainer, task) == pytest.approx(math.log(10), rel=0.05)
        trainer.epoch()
        assert trainer.updates() == task.steps
        if "step" in peers.PEERS[name].suites:
            trainer.steps(3)
            assert trainer.updates() == task.steps + 3


def test_pytorch_that_trains_each_batch_three_times_is_rejected(monkeypatch) -> None:
    torch_reference = pytest.importorskip("benchmarks.torch_reference")
    slices = torch_reference.slices
    monkeypatch.setattr(
        torch_reference,
        "slices",
        lambda *arguments: itertools.chain.from_iterable([each] * 3 for each in slices(*arguments)),
    )
    (task,) = cases.problems("models", "pytorch", QUICK).values()
    found = worker.train("models", "pytorch", task)
    wrong = suites.check_ends("models", ends(pytorch=found))
    assert wrong == {"pytorch": "has made 24 updates in T2; expected 8"}


def test_a_peer_that_ends_with_another_loss_or_accuracy_is_rejected() -> None:
    close = ends(pytorch={"loss": 0.2}, jaxtrain={"loss": 0.22})
    assert not suites.check_ends("models", close)
    far = ends(pytorch={"loss": 0.2}, jaxtrain={"loss": 0.4})
    assert (
        "ends T2 of the suite models with the loss 0.4;"
        in (suites.check_ends("models", far)["jaxtrain"])
    )
    far = ends(pytorch={"accuracy": 0.955}, jaxtrain={"accuracy": 0.93})
    assert "with the accuracy 0.93;" in suites.check_ends("run", far)["jaxtrain"]


def test_a_peer_that_computes_something_else_is_left_out_of_the_next_rounds(monkeypatch) -> None:
    calls = []

    def reading(name: str, loss: float) -> dict:
        calls.append(name)
        return {"T2": {"seconds": 1.0, "loss": loss}}

    losses = {"pytorch": 0.2, "jaxtrain": 0.21, "keras": 0.9}
    actions = {name: functools.partial(reading, name, loss) for name, loss in losses.items()}
    monkeypatch.setattr(suites, "_actions", lambda *arguments: actions)
    settings = suites.Settings(list(losses), QUICK, 2, str)
    *_, (found, failed) = suites.measure("models", list(losses), settings, Path())
    assert calls == ["pytorch", "jaxtrain", "keras", "pytorch", "jaxtrain"]
    assert {name: len(values) for name, values in found["T2"].items()} == {
        "pytorch": 2,
        "jaxtrain": 2,
    }
    assert "expected about 0.2" in failed["keras"]


@pytest.mark.parametrize("name", ["pytorch", "pytorch-batched", "pytorch-vmap", "jax-vmap"])
def test_every_way_to_train_many_runs_computes_the_same_losses(name: str) -> None:
    pytest.importorskip("torch")
    settings = suites.Settings([], QUICK, 1, print)
    expected = dict(worker.losses("sweep", "jaxtrain", settings.cases))
    found = dict(worker.losses("sweep", name, settings.cases))
    assert len(found) == (1 if name == "jax-vmap" else 2)
    for case, losses in found.items():
        suites.compare(name, case, losses, expected[case])
        with pytest.raises(suites.DisagreementError):
            suites.compare(name, case, losses + 1e-3, expected[case])


def test_disturbed_readings_are_repeated_at_most_twice(monkeypatch) -> None:
    probes, seconds = iter([False, True] * 3 + [False, False]), iter(range(1, 5))
    monkeypatch.setattr(suites.Probe, "__init__", lambda self: None)
    monkeypatch.setattr(suites.Probe, "disturbed", lambda self: next(probes))
    actions = {"jaxtrain": lambda: {"case": {"seconds": next(seconds)}}}
    monkeypatch.setattr(suites, "_actions", lambda *arguments: actions)
    settings = suites.Settings(["jaxtrain"], cases.Settings(None, quick=False), 2, str)
    *_, (found, _) = suites.measure("models", ["jaxtrain"], settings, Path())
    assert found == {
        "case": {
            "jaxtrain": [{"seconds": 3, "disturbed": True}, {"seconds": 4, "disturbed": False}]
        }
    }


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("pytorch", "jax jaxtrain keras equinox"),
        ("nnx", "torch jaxtrain keras equinox"),
        ("equinox", "torch jaxtrain keras flax"),
        ("keras", "torch jaxtrain equinox flax"),
        ("jaxtrain", "torch keras"),
        ("jax-scan", "torch keras"),
    ],
)
def test_a_worker_imports_no_other_peers_library(name: str, others: str) -> None:
    if reason := peers.reason_missing(name):
        pytest.skip(reason)
    code = (
        f"import sys; from benchmarks import peers, worker; peers.load({name!r}); "
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(others.split()) & set(result.stdout.split())


def test_a_worker_that_fails_is_a_row_that_says_why(monkeypatch) -> None:
    def fail() -> suites.Values:
        raise suites.WorkerError("benchmarks.worker models nnx failed: MemoryError")

    actions = {"jaxtrain": lambda: {"T2": {"seconds": 1.0}}, "nnx": fail}
    monkeypatch.setattr(suites, "_actions", lambda *arguments: actions)
    settings = suites.Settings(["jaxtrain", "nnx"], QUICK, 2, str)
    *_, (found, failed) = suites.measure("models", ["jaxtrain", "nnx"], settings, Path())
    assert failed == {"nnx": "benchmarks.worker models nnx failed: MemoryError"}
    assert len(found["T2"]["jaxtrain"]) == 2


def test_error_of_a_missing_peer_names_the_command_that_installs_it(monkeypatch) -> None:
    absent = peers.Peer("Absent", "absent:make", ("no_such_package",), ("models",))
    monkeypatch.setitem(peers.PEERS, "absent", absent)
    with pytest.raises(
        peers.MissingError, match="no_such_package is not installed; run pip install"
    ):
        peers.load("absent")


def test_mnist_reader_agrees_with_the_library(mnist: jt.data.Resolved) -> None:
    folder = jt.data.mnist.locate_files("mnist", None)
    for split, data in (("train", mnist.train), ("t10k", mnist.test)):
        images, labels = problem.read_mnist(folder, split)
        np.testing.assert_array_equal(images, data.inputs)
        np.testing.assert_array_equal(labels, data.targets)


def test_quick_run_measures_every_suite(tmp_path: Path) -> None:
    file = tmp_path / "readings.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", file, "--output-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(file.read_text())
    assert results["machine"]["versions"]["jax"] == jax.__version__
    assert {row["suite"] for row in results["rows"]} == {*cases.SUITES, "memory"}
    assert "×" not in result.stdout.replace("× T", "")  # no ratio of single readings
    for row in results["rows"]:
        assert bool(row["missing"]) != bool(row["readings"])
        assert min(row["readings"], default=1) > 0
    assert any(row["missing"] for row in results["rows"]) == ("missing: " in result.stdout)
    timed = {row["peer"] for row in results["rows"] if row["readings"]}
    assert "jaxtrain" in timed
    torch = importlib.util.find_spec("torch") is not None
    assert ("pytorch" in timed) == torch
    figures = ["step_time", "step_throughput", *["epoch_ratios"] * torch]  # a ratio needs a peer
    for figure in figures:
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_committed_pages_are_those_that_the_report_writes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name, results in report.load_all(report.RESULTS).items():
        for figure, suite in report.FIGURE_SUITES.items():
            if readings.rows_of(results, suite):
                assert (report.IMAGES / f"{name}_{figure}.png").exists()


def test_check_fails_for_a_page_that_was_edited(tmp_path: Path, monkeypatch) -> None:
    page, readme = tmp_path / "docs" / "benchmarks.md", tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\n{report.END}\nafter\n")
    page.parent.mkdir()
    for name, value in {"ROOT": tmp_path, "PAGE": page, "README": readme}.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "docs" / "images")
    monkeypatch.setattr(report, "draw", lambda *arguments: None)

    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: README\.md, docs/benchmarks\.md"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report"])
    report.main()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    report.main()
    page.write_text(page.read_text() + "edited")
    with pytest.raises(SystemExit, match=r"error: out of date: docs/benchmarks\.md"):
        report.main()


def epoch_results(
    seconds: dict[str, list[float]], facts: dict | None = None, **machine: str
) -> dict[str, Any]:
    """Returns results of the suite `models` with these readings of T2."""
    row = {"suite": "models", "case": "T2, batch 64", "facts": facts or {}, "missing": None}
    return {
        "machine": {"device": "cpu", "processor": "CPU", **machine},
        "rows": [{**row, "peer": peer, "readings": values} for peer, values in seconds.items()],
    }


def test_verdicts_compare_the_readings_with_the_aims() -> None:
    seconds = {"jaxtrain": [1.0, 1.0], "pytorch": [2.0, 2.0], "nnx": [2.0, 2.0]}
    _, rows = tables.target_table([epoch_results(seconds)])
    assert [cells[1:] for cells in rows] == [
        ["≥ 2.6 ×", "2 ×: **missed**"],
        ["≥ 1.7 ×", "2 ×: reached"],
    ]


def test_an_aim_inside_the_interval_is_within_noise() -> None:
    seconds = {"jaxtrain": [1.0] * 5, "pytorch": [2.0, 2.1, 2.7, 2.8, 2.9]}
    _, [cells] = tables.target_table([epoch_results(seconds)])
    assert cells[2].startswith("2.7 × (")
    assert cells[2].endswith(": within noise, median reached")


def test_fewer_than_five_readings_have_no_interval() -> None:
    low, ratio, high = timing.speedup([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 7.0, 9.0])
    assert low == ratio == high == 5.5 / 2.5


def test_a_gpu_has_aims_of_its_own() -> None:
    facts = {"examples": 60000, "batch_size": 64}
    seconds = {"jaxtrain": [938 * 40e-6] * 2, "pytorch": [938 * 800e-6] * 2}
    headings, rows = tables.target_table([epoch_results(seconds, facts, device="NVIDIA H200")])
    assert headings[2] == "NVIDIA H200"
    assert [cells[1:] for cells in rows] == [
        ["≤ 30 µs", "40 µs: **missed**"],
        ["≥ 15 ×", "20 ×: reached"],
    ]


def test_each_machine_has_a_column() -> None:
    one = epoch_results({"jaxtrain": [1, 1], "pytorch": [3, 3]}, processor="A")
    other = epoch_results({"jaxtrain": [1, 1], "pytorch": [2, 2], "nnx": [2, 2]}, processor="B")
    headings, rows = tables.target_table([one, other])
    assert headings == ["measure", "aim", "A", "B"]
    assert [cells[1:] for cells in rows] == [
        ["≥ 2.6 ×", "3 ×: reached", "2 ×: **missed**"],
        ["≥ 1.7 ×", "", "2 ×: reached"],
    ]


def test_sweeps_are_compared_with_the_fastest_way_in_pytorch() -> None:
    seconds = {"jaxtrain": 1.0, "pytorch": 900.0, "pytorch-batched": 4.0, "pytorch-vmap": 5.0}
    results = epoch_results({name: [value] * 5 for name, value in seconds.items()}, cores="2")
    for row in results["rows"]:
        row.update(suite="sweep", case="1000 × T1, 200 epochs")
    _, [cells] = tables.target_table([results])
    assert cells[1:] == ["≥ 3 ×", "4 ×: reached"]
    _, [cells] = tables.summary_table(results)
    assert cells == [
        "1,000 runs of T1",
        "1 s",
        "4 s (PyTorch, one batched tensor)",
        "4 ×",
        "CPU, 2 cores",
    ]


def test_ranking_counts_wins_and_the_lost_cases_are_listed() -> None:
    seconds = {
        "T2, batch 1": {"jaxtrain": 1.0, "keras": 2.0, "matrix products, XLA": 0.1},
        "T2, batch 16": {"jaxtrain": 3.0, "keras": 2.0, "jax-scan": 0.5},
        "T2, batch 64": {"jaxtrain": 5.0, "keras": 3.0, "equinox": 2.0},
    }
    rows = [
        {
            "suite": "step",
            "case": case,
            "peer": peer,
            "readings": [value] * 3,
            "facts": {"products": peer.startswith("matrix")},
        }
        for case, values in seconds.items()
        for peer, value in values.items()
    ]
    text = report.ranking({"rows": rows})
    assert "jaxtrain is the fastest library in 1 of 3 cases of `step` and `models`" in text
    assert text.endswith("; in the worst, `step: T2, batch 64`, Equinox is 2.5 × as fast.")
    assert report.ranking({"rows": rows[:2]}).endswith("in 1 of 1 cases of `step` and `models`.")
    assert tables.slower_table({"rows": rows}).rows == [
        ["step", "T2, batch 16", "Keras 3 on JAX", "3 s", "2 s", "0.667 ×"],
        ["step", "T2, batch 64", "Equinox", "5 s", "2 s", "0.4 ×"],
    ]


def test_flags_list_every_peer_and_suite() -> None:
    assert set(get_args(PeerName)) == set(peers.PEERS)
    assert get_args(Suite) == cases.SUITES
