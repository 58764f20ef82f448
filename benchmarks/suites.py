"""Runs the suites: each reading comes from a process of its own, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from benchmarks import cases, environment, flops, peers
from benchmarks.matrix_products import LOOPS
from benchmarks.problem import Problem

OURS = "jaxtrain"
EAGER = "pytorch"
WARM_CACHE = "jaxtrain, warm cache"
NOT_SELECTED = "not selected with --peers"

# Largest difference of a loss in the first steps from the reference's.
CHECK_TOLERANCE = 1e-4
# Largest difference of the values after the timed sections, where peers draw different dropout
# masks: a part of the reference's value, and a constant.
TOLERANCES = {"loss": (0.3, 0.05), "accuracy": (0.0, 0.02)}
# A reading is repeated, at most twice, if a fixed matrix product takes this much longer before or
# after it than it usually does in this run.
DISTURBED = 1.2
REPETITIONS = 2
# torch.compile compiles a network for up to a minute.
SLOW_COMPILER = "pytorch-compile"
SLOW_COMPILER_ROUNDS = 3

T = TypeVar("T")
# What one process has measured, by case.
Values = dict[str, dict[str, Any]]
# The values of each round, by case and peer.
Readings = dict[str, dict[str, list[dict[str, Any]]]]


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
    """Raised if the losses of a peer differ from the others'."""


class WorkerError(Exception):
    """Raised if a process that measures a peer fails."""


class Probe:
    """Times a fixed matrix product, to notice readings that other processes disturb."""

    def __init__(self) -> None:
        self._matrix = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
        self._earlier = [self._seconds() for _ in range(5)]

    def _seconds(self) -> float:
        started = time.perf_counter()
        for _ in range(3):
            self._matrix @ self._matrix
        return time.perf_counter() - started

    def disturbed(self) -> bool:
        """Returns whether the product takes longer than is tolerated.

        It is compared with its median: on a machine that is always shared, the fastest product is
        an exception, and nearly every reading would be repeated.
        """
        self._earlier.append(self._seconds())
        return self._earlier[-1] > DISTURBED * statistics.median(self._earlier)


def run_suite(suite: str, settings: Settings) -> Iterator[list[Row]]:
    """Checks that the peers compute the same, and measures them.

    Yields:
      All rows of the suite so far, after each round.
    """
    names, missing = [], []
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
                missing.append(Row(suite, "all", name, missing=reason))
    with tempfile.TemporaryDirectory() as scratch:
        compared = [name for name in names if suite != "run" or name in (OURS, EAGER)]
        if len(compared) > 1:
            check(suite, compared, settings, Path(scratch))
        loops = _matrix_products() if suite in ("step", "models") else []
        cache = Path(scratch) / "cache"
        for readings, failed in measure(suite, [*names, *loops], settings, cache):
            failures = [Row(suite, "all", name, missing=why) for name, why in failed.items()]
            yield [*missing, *failures, *_rows(suite, readings, settings)]


def _matrix_products() -> list[str]:
    """Returns the libraries that compute the matrix products alone on this machine."""
    names = list(LOOPS)
    if importlib.util.find_spec("torch") is None:
        names.remove("matrix products, PyTorch")
    if environment.has_gpu():  # the host's BLAS says nothing about a GPU
        names.remove("matrix products, NumPy")
    return names


def check(suite: str, names: Sequence[str], settings: Settings, scratch: Path) -> None:
    """Compares the losses of each peer with eager PyTorch's, jaxtrain's or the first peer's.

    Raises:
      DisagreementError: if a loss differs by more than 1e-4. Of a peer that reports only means over
        groups of steps, the mean of each pass over the data is compared.
    """
    reference = next((name for name in (EAGER, OURS) if name in names), names[0])
    expected: dict[str, np.ndarray] = {}
    for name in sorted(names, key=lambda name: name != reference):
        settings.log(f"{suite}: losses of {peers.label(name)}")
        file = scratch / f"{name}.npz"
        _run_worker(suite, name, settings, "--losses", str(file))
        with np.load(file) as losses:
            found = dict(losses)
        if name == reference:
            expected = found
        for case, values in found.items():
            if case in expected:
                compare(peers.label(name), case, values, expected[case])


def compare(name: str, case: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises DisagreementError unless the losses agree."""
    if found.ndim == 3:
        # The lines of T1 [runs, epochs, 2]. Where a prediction meets its target, the sign of the
        # rounding error decides the next step, so that some runs differ by a learning rate.
        error = np.abs(found - expected)
        difference = max(error.mean(), 0.01 * error.max())
    elif found.shape == expected.shape:
        difference = np.abs(found - expected).max()
    else:  # Keras with several steps per execution: one mean per pass
        sizes = [*[64] * cases.CHECKED_STEPS, cases.CHECKED_PARTIAL]
        means = np.average(expected.reshape(2, -1), axis=1, weights=sizes)
        difference = np.abs(found - means).max()
    if not difference <= CHECK_TOLERANCE:
        raise DisagreementError(
            f"losses of {name} differ by {difference:.1e} from the reference's in {case}; expected "
            f"at most {CHECK_TOLERANCE:g}; leave it out with --peers, or correct it"
        )


def measure(
    suite: str, names: Sequence[str], settings: Settings, cache: Path
) -> Iterator[tuple[Readings, dict[str, str]]]:
    """Yields, after each round, the values of each case, peer and round so far, and the failures.

    The first round compiles with empty caches, so that its compilation times count. A peer that
    fails or computes something else is left out from then on.
    """
    probe = Probe()
    found: Readings = {}
    failed: dict[str, str] = {}
    if suite == "run" and OURS in names:
        _process_values(OURS, settings, cache)  # fills the cache for WARM_CACHE
    for index in range(settings.rounds):
        for name, action in _actions(suite, names, settings, cache).items():
            if name in failed or (name == SLOW_COMPILER and index >= SLOW_COMPILER_ROUNDS):
                continue
            settings.log(f"{suite}: round {index + 1} of {settings.rounds}: {peers.label(name)}")
            try:
                attempts, disturbed = attempt(action, probe, settings)
            except WorkerError as error:
                failed[name] = str(error)
                settings.log(f"{suite}: {peers.label(name)} failed: {error}")
                continue
            for case, each in attempts[-1].items():
                each["disturbed"] = disturbed
                if "compile_seconds" in each:  # a repetition finds its programs in the cache
                    each["compile_seconds"] = attempts[0][case]["compile_seconds"]
                peer = name.removesuffix(", T1")
                found.setdefault(case, {}).setdefault(peer, []).append(each)
        for name, reason in check_ends(suite, found).items():
            failed[name] = reason
            settings.log(f"{suite}: {peers.label(name)} {reason}")
            for by_peer in found.values():
                by_peer.pop(name, None)
        yield found, failed


def attempt(action: Callable[[], T], probe: Probe, settings: Settings) -> tuple[list[T], bool]:
    """Repeats an action while the machine is disturbed, at most `REPETITIONS` times.

    Returns:
      What each attempt has returned, and whether the last one was disturbed.
    """
    attempts: list[T] = []
    for _ in range(1 if settings.cases.quick else 1 + REPETITIONS):
        before = probe.disturbed()
        attempts.append(action())
        disturbed = before or probe.disturbed()
        if not disturbed:
            break
    return attempts, disturbed


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


def check_ends(suite: str, readings: Readings) -> dict[str, str]:
    """Compares what the peers have computed in their timed sections.

    Returns:
      The peers whose optimizers have made another number of updates than was timed, or whose loss
      or test accuracy at the end is far from the reference's, and what is wrong with each.
    """
    wrong: dict[str, str] = {}
    for case, by_peer in readings.items():
        reference = by_peer.get(EAGER) or by_peer.get(OURS) or next(iter(by_peer.values()), [])
        for name, values in by_peer.items():
            for each in values:
                if "updates" in each and each["updates"] != each["expected_updates"]:
                    wrong[name] = (
                        f"has made {each['updates']} updates in {case}; "
                        f"expected {each['expected_updates']}"
                    )
                for what, tolerance in TOLERANCES.items():
                    if what in each and what in reference[0]:
                        expected = reference[0][what]
                        if not abs(each[what] - expected) <= tolerance[0] * expected + tolerance[1]:
                            wrong[name] = (
                                f"ends {case} of the suite {suite} with the {what} "
                                f"{each[what]:.4g}; expected about {expected:.4g}, as the reference"
                            )
    return wrong


def _rows(suite: str, readings: Readings, settings: Settings) -> Iterator[Row]:
    """Yields the rows of all cases and peers."""
    problems = {} if suite in ("sweep", "run") else cases.problems(suite, OURS, settings.cases)
    for case, by_peer in readings.items():
        for name, values in by_peer.items():
            facts: dict[str, Any] = {"disturbed": sum(each["disturbed"] for each in values)}
            for key in ("compile_seconds", "loss", "accuracy"):
                if key in values[0]:
                    facts[key] = values[0][key]
            if "sample" in values[0]:
                facts["extrapolated_from"] = values[0]["sample"]
            if case in problems:
                facts |= _work(suite, problems[case]) | {"products": name in LOOPS}
            yield Row(suite, case, name, [each["seconds"] for each in values], facts)
            if "peak_mib" in values[0]:
                yield Row("memory", case, name, [each["peak_mib"] for each in values])


def _work(suite: str, task: Problem) -> dict[str, Any]:
    """Returns what is trained, and the work of a step or an epoch of a feed-forward network."""
    facts: dict[str, Any] = {
        "network": task.network,
        "batch_size": task.batch_size,
        "examples": task.batch_size if suite == "step" else len(task.images),
    }
    if task.features:
        work = (
            flops.step_work(task.features, task.batch_size)
            if suite == "step"
            else flops.epoch_work(task)
        )
        facts |= {"flops": work.flops, "bytes": work.bytes}
    return facts


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
    """Runs a module on the data of the settings, and returns the last line of its output."""
    flags = []
    if settings.cases.folder is not None:
        flags += ["--folder", str(settings.cases.folder)]
    if settings.cases.quick and module == "benchmarks.worker":
        flags.append("--quick")
    return run_module(module, [*arguments, *flags], cache)


def run_module(module: str, arguments: Sequence[str], cache: Path | None) -> str:
    """Runs a module in a process, and returns the last line of its output."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment.variables(cache),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:]
        raise WorkerError(f"{module} {' '.join(arguments)} failed: {''.join(last)}")
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
