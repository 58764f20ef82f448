"""Runs the suites: each reading comes from a process of its own, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases, environment, peers
from benchmarks.results import EAGER, EXAMPLE, OURS, WARM_CACHE

# Largest difference of a loss in the first steps from the reference's.
CHECK_TOLERANCE = 1e-4
# Largest difference of the values after the timed sections, where peers draw different dropout
# masks: a part of the reference's value, and a constant.
TOLERANCES = {"loss": (0.3, 0.05), "accuracy": (0.0, 0.02)}
# torch.compile compiles a network for up to a minute, and PyTorch's MNIST example trains for three.
MOST_ROUNDS = {"pytorch-compile": 3, EXAMPLE: 3}

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
      facts: further values by name.
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
      data: file of the images; None measures small cases on random images, to test the suites.
      rounds: readings per peer.
      log: called with a line about what is measured next.
    """

    names: Sequence[str]
    data: Path | None
    rounds: int
    log: Callable[[str], object]


class DisagreementError(Exception):
    """Raised if the losses of a peer differ from the others'."""


class WorkerError(Exception):
    """Raised if a process that measures a peer fails."""


def run_suite(suite: str, settings: Settings) -> Iterator[list[Row]]:
    """Checks that the peers compute the same, and measures them.

    Yields:
      All rows of the suite so far, after each round.
    """
    names, missing = [], {}
    for name in settings.names:
        if suite in peers.PEERS[name].suites:
            reason = peers.reason_missing(name)
            if reason is None:
                names.append(name)
            else:
                missing[name] = reason
    with tempfile.TemporaryDirectory() as scratch:
        if len(names) > 1 and suite != "run":  # whole processes are compared by their accuracy
            check(suite, names, settings, Path(scratch))
        actions = _actions(suite, names, settings, Path(scratch) / "cache")
        for readings, failed in measure(suite, actions, settings):
            reasons = (missing | failed).items()
            absent = [Row(suite, "all", name, missing=reason) for name, reason in reasons]
            yield [*absent, *_rows(suite, readings)]


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
        _run_worker(suite, name, settings, None, "--losses", str(file))
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
    suite: str, actions: Mapping[str, Callable[[int], Values]], settings: Settings
) -> Iterator[tuple[Readings, dict[str, str]]]:
    """Yields, after each round, the values of each case, peer and round so far, and the failures.

    A peer that fails or computes something else is left out from then on. The actions are functions
    from the round to the values that a new process measures.
    """
    found: Readings = {}
    failed: dict[str, str] = {}
    for index in range(settings.rounds):
        for name, action in actions.items():
            if name in failed or index >= MOST_ROUNDS.get(name, settings.rounds):
                continue
            settings.log(f"{suite}: round {index + 1} of {settings.rounds}: {peers.label(name)}")
            try:
                for case, values in action(index).items():
                    found.setdefault(case, {}).setdefault(name, []).append(values)
            except WorkerError as error:
                failed[name] = str(error)
                settings.log(f"{suite}: {peers.label(name)} failed: {error}")
        for name, reason in check_ends(suite, found).items():
            failed[name] = reason
            settings.log(f"{suite}: {peers.label(name)} {reason}")
        for by_peer in found.values():
            for name in failed:
                by_peer.pop(name, None)
        yield found, failed


def _actions(
    suite: str, names: Sequence[str], settings: Settings, cache: Path
) -> dict[str, Callable[[int], Values]]:
    """Returns functions that make one reading of each case, by peer."""

    def worker(name: str) -> Callable[[int], Values]:
        # The first round compiles with an empty cache, so that its compilation times count.
        return lambda _: json.loads(_run_worker(suite, name, settings, cache))

    def process(name: str, cache: Path | None = None) -> Callable[[int], Values]:
        return lambda _: _process_values(name, settings, cache)

    if suite != "run":
        return {name: worker(name) for name in names}
    actions = {name: process(name) for name in names}
    if OURS in names:
        _process_values(OURS, settings, cache)  # fills the cache
        actions[WARM_CACHE] = process(OURS, cache)
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


def _rows(suite: str, readings: Readings) -> Iterator[Row]:
    """Yields the rows of all cases and peers."""
    for case, by_peer in readings.items():
        for name, values in by_peer.items():
            kept = ("compile_seconds", "loss", "accuracy", "extrapolated_from")
            facts = {key: values[0][key] for key in kept if key in values[0]}
            yield Row(suite, case, name, [each["seconds"] for each in values], facts)
            if "peak_mib" in values[0]:
                yield Row("memory", case, name, [each["peak_mib"] for each in values])


def _process_values(name: str, settings: Settings, cache: Path | None) -> Values:
    """Returns the values of a whole process that trains T2, from its start to its end."""
    epochs = 1 if settings.data is None else 5
    started = time.perf_counter()
    printed = _run_worker("run", name, settings, cache, "--epochs", str(epochs))
    seconds = time.perf_counter() - started
    case = f"whole process, T2, {epochs} epoch{'s' * (epochs > 1)}"
    return {case: {"seconds": seconds, **json.loads(printed)}}


def _run_worker(suite: str, name: str, settings: Settings, cache: Path | None, *flags: str) -> str:
    """Runs the worker of a peer, and returns the last line that it prints."""
    data = [] if settings.data is None else ["--data", str(settings.data)]
    return run_module("benchmarks.worker", [suite, name, *data, *flags], cache)


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
