"""Runs the suites: each reading comes from a process of its own, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases, environment, flops, peers, timing
from benchmarks.matrix_products import product_loops
from benchmarks.problem import Problem

OURS = "jaxtrain"
EAGER = "pytorch"
WARM_CACHE = "jaxtrain, warm cache"
NOT_SELECTED = "not selected with --peers"

# Largest difference of a loss in the first steps from the reference's.
CHECK_TOLERANCE = 1e-4
# Largest difference of the loss after the timed sections, where peers draw different dropout masks:
# a part of the reference's loss, and a constant.
LOSS_TOLERANCE = (0.3, 0.05)
ACCURACY_TOLERANCE = (0.0, 0.02)
# A reading is repeated, at most twice, if a fixed matrix product takes this much longer before or
# after it than the fastest one so far.
DISTURBED = 1.2
REPETITIONS = 2
# torch.compile compiles a network for up to a minute.
SLOW_COMPILER = "pytorch-compile"
SLOW_COMPILER_ROUNDS = 3

Values = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """The readings of one peer in one case.

    Attributes:
      suite: name of the suite, or `memory`.
      case: description of what was trained.
      peer: key of `PEERS`, or name of what else was timed.
      readings: value of each round, in seconds or, for `memory`, in MiB.
      facts: further values by name. `products` marks rows that time matrix products alone.
      missing: reason why there are no readings.
    """

    suite: str
    case: str
    peer: str
    readings: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str | None = None


class Settings(NamedTuple):
    """The settings that the suites share.

    Attributes:
      names: peers to measure.
      cases: what the cases depend on.
      rounds: readings per peer.
      log: called with a line about what is measured next.
    """

    names: Sequence[str]
    cases: cases.Settings
    rounds: int
    log: Callable[[str], object]


class DisagreementError(Exception):
    """Raised if a peer has computed something else than the others."""


class Probe:
    """Times a fixed matrix product, to notice readings that other processes disturb."""

    def __init__(self) -> None:
        self._matrix = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
        self._fastest = min(self._seconds() for _ in range(5))

    def _seconds(self) -> float:
        started = time.perf_counter()
        for _ in range(3):
            self._matrix @ self._matrix
        return time.perf_counter() - started

    def disturbed(self) -> bool:
        """Returns whether the product takes longer than is tolerated."""
        seconds = self._seconds()
        self._fastest = min(self._fastest, seconds)
        return seconds > DISTURBED * self._fastest


def run_suite(suite: str, settings: Settings) -> Iterator[Row]:
    """Checks that the peers compute the same, measures them, and yields the rows of a suite."""
    names = []
    for name, peer in peers.PEERS.items():
        if suite in peer.suites:
            reason = peers.reason_missing(name) if name in settings.names else NOT_SELECTED
            if name == "pytorch-cuda-graphs" and reason is None and not environment.has_gpu():
                reason = "CUDA graphs need an NVIDIA GPU"
            if settings.cases.quick and name not in (OURS, EAGER):
                reason = "not measured in a quick run"
            if reason is None:
                names.append(name)
            else:
                yield Row(suite, "all", name, missing=reason)
    with tempfile.TemporaryDirectory() as scratch:
        compared = [name for name in names if suite != "run" or name in (OURS, EAGER)]
        if len(compared) > 1:
            check(suite, compared, settings, Path(scratch))
        readings = measure(suite, names, settings, Path(scratch) / "cache")
    check_ends(suite, readings)
    yield from _rows(suite, readings, settings)
    yield from _product_rows(suite, settings)


def check(suite: str, names: Sequence[str], settings: Settings, scratch: Path) -> None:
    """Compares the losses of each peer with eager PyTorch's, or jaxtrain's in its absence.

    Raises:
      DisagreementError: if a loss differs by more than 1e-4. Of a peer that reports only means over
        groups of steps, the mean of each pass over the data is compared.
    """
    reference = EAGER if EAGER in names else OURS
    expected: dict[str, np.ndarray] = {}
    for name in sorted(names, key=lambda name: name != reference):
        settings.log(f"{suite}: losses of {peers.label(name)}")
        file = scratch / f"{name}.npz"
        _run_worker(suite, name, settings, "--check", "--losses", str(file))
        with np.load(file) as losses:
            found = dict(losses)
        if name == reference:
            expected = found
        for case, values in found.items():
            if case in expected:
                compare(peers.label(name), case, values, expected[case])


def compare(name: str, case: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises DisagreementError unless the losses agree."""
    if "T1" in case:
        # Where a prediction meets its target, the sign of the rounding error decides the next step,
        # so the last digits of some runs differ by multiples of the learning rate.
        runs = min(len(found), len(expected))
        error = np.abs(found[:runs] - expected[:runs])
        difference = max(error.mean(), 0.01 * error.max())
    elif found.shape == expected.shape or found.ndim == 2:
        difference = np.abs(found[: len(expected)] - expected[: len(found)]).max()
    else:
        sizes = [*[64] * cases.CHECKED_STEPS, cases.CHECKED_PARTIAL]
        means = np.average(expected.reshape(2, -1), axis=1, weights=sizes)
        difference = np.abs(found.reshape(2, -1).mean(axis=1) - means).max()
    if not difference <= CHECK_TOLERANCE:
        raise DisagreementError(
            f"losses of {name} differ by {difference:.1e} from the reference's in {case}; expected "
            f"at most {CHECK_TOLERANCE:g}; leave it out with --peers, or correct it"
        )


def measure(
    suite: str, names: Sequence[str], settings: Settings, cache: Path
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the values of each case, peer and round.

    The first round compiles with empty caches, so that its compilation times count.
    """
    probe = Probe()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for index in range(settings.rounds):
        for name, action in _actions(suite, names, settings, cache).items():
            if SLOW_COMPILER in name and index >= SLOW_COMPILER_ROUNDS:
                continue
            settings.log(f"{suite}: round {index + 1} of {settings.rounds}: {peers.label(name)}")
            for _ in range(1 if settings.cases.quick else 1 + REPETITIONS):
                before = probe.disturbed()
                values = action()
                disturbed = before or probe.disturbed()
                if not disturbed:
                    break
            for case, each in values.items():
                each["disturbed"] = disturbed
                peer = name.removesuffix(", T1")
                found.setdefault(case, {}).setdefault(peer, []).append(each)
    return found


def _actions(
    suite: str, names: Sequence[str], settings: Settings, cache: Path
) -> dict[str, Callable[[], Values]]:
    """Returns functions that make one reading of each case, by peer."""
    worker = functools.partial(_worker_values, suite, settings, cache)
    if suite != "run":
        return {name: functools.partial(worker, name) for name in names}
    actions: dict[str, Callable[[], Values]] = {}
    for name in names:
        if name in (OURS, EAGER):  # T1, in a process that is not timed as a whole
            actions[f"{name}, T1"] = functools.partial(worker, name)
        actions[name] = functools.partial(_process_values, name, settings, None)
        if name == OURS:
            actions[WARM_CACHE] = functools.partial(_process_values, name, settings, cache)
    return actions


def check_ends(suite: str, readings: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> None:
    """Compares what the peers have computed in their timed sections.

    Raises:
      DisagreementError: if a peer's optimizer has made another number of updates than was timed, or
        if its loss or test accuracy at the end is far from eager PyTorch's.
    """
    for case, by_peer in readings.items():
        reference = by_peer.get(EAGER, by_peer.get(OURS, []))
        for name, values in by_peer.items():
            for each in values:
                if "updates" in each and each["updates"] != each["expected_updates"]:
                    raise DisagreementError(
                        f"{peers.label(name)} has made {each['updates']} updates in {case}; "
                        f"expected {each['expected_updates']}"
                    )
                for what, tolerance in (
                    ("loss", LOSS_TOLERANCE),
                    ("accuracy", ACCURACY_TOLERANCE),
                ):
                    if what in each and reference:
                        expected = reference[0][what]
                        allowed = tolerance[0] * expected + tolerance[1]
                        if not abs(each[what] - expected) <= allowed:
                            raise DisagreementError(
                                f"{peers.label(name)} ends {case} of the suite {suite} with the "
                                f"{what} {each[what]:.4g}; expected about {expected:.4g}, as the "
                                "reference"
                            )


def _rows(
    suite: str,
    readings: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]],
    settings: Settings,
) -> Iterator[Row]:
    """Yields the rows of all cases and peers."""
    problems = {} if suite in ("sweep", "run") else cases.problems(suite, OURS, settings.cases)
    for case, by_peer in readings.items():
        for name, values in by_peer.items():
            facts: dict[str, Any] = {"disturbed": sum(each["disturbed"] for each in values)}
            for key in ("first_seconds", "loss", "accuracy"):
                if key in values[0]:
                    facts[key] = values[0][key]
            if "sample" in values[0] and name == EAGER:
                facts["extrapolated_from"] = values[0]["sample"]
            if case in problems:
                facts |= _work(suite, problems[case])
            yield Row(suite, case, name, [each["seconds"] for each in values], facts)
            if "peak_mib" in values[0]:
                yield Row("memory", case, name, [each["peak_mib"] for each in values])


def _work(suite: str, task: Problem) -> dict[str, Any]:
    """Returns what is trained, and the work of a step or an epoch of a feed-forward network."""
    facts: dict[str, Any] = {
        "network": task.network,
        "batch_size": task.batch_size,
        "examples": task.batch_size if suite == "step" else len(task.images),
        "products": False,
    }
    if task.features:
        work = (
            flops.step_work(task.features, task.batch_size)
            if suite == "step"
            else flops.epoch_work(task)
        )
        facts |= {"flops": work.flops, "bytes": work.bytes}
    return facts


def _product_rows(suite: str, settings: Settings) -> Iterator[Row]:
    """Times the matrix products of the feed-forward networks alone, in this process."""
    if suite not in ("step", "models"):
        return
    environment.equalize()
    for case, task in cases.problems(suite, OURS, settings.cases).items():
        if task.features:
            settings.log(f"{suite}: matrix products of {case}")
            actions = {name: timing.Repeated(run) for name, run in product_loops(task).items()}
            steps = 1 if suite == "step" else task.steps
            facts = {**_work(suite, task), "products": True}
            for name, seconds in timing.time_interleaved(actions, settings.rounds).items():
                yield Row(suite, case, name, [steps * each for each in seconds], facts)


def _worker_values(suite: str, settings: Settings, cache: Path, name: str) -> Values:
    """Returns the values of each case that a new process measures."""
    return json.loads(_run_worker(suite, name, settings, cache=cache))


def _run_worker(
    suite: str, name: str, settings: Settings, *flags: str, cache: Path | None = None
) -> str:
    """Runs the worker of a peer, and returns the last line that it prints."""
    return _run("benchmarks.worker", [suite, name, *flags], settings, cache)


def _process_values(name: str, settings: Settings, cache: Path | None) -> Values:
    """Returns the values of a whole process that trains T2, from its start to its end."""
    epochs = 1 if settings.cases.quick else 5
    started = time.perf_counter()
    printed = json.loads(
        _run("benchmarks.training_process", [name, "--epochs", str(epochs)], settings, cache)
    )
    seconds = time.perf_counter() - started
    case = f"whole process, T2, {epochs} epoch{'s' * (epochs > 1)}"
    return {case: {"seconds": seconds, **printed}}


def _run(module: str, arguments: Sequence[str], settings: Settings, cache: Path | None) -> str:
    """Runs a module in a process, and returns the last line of its output."""
    command = [sys.executable, "-m", module, *arguments]
    if settings.cases.folder is not None:
        command += ["--folder", str(settings.cases.folder)]
    if settings.cases.quick and module == "benchmarks.worker":
        command.append("--quick")
    result = subprocess.run(
        command,
        env=environment.variables(cache),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
