"""Runs the suites: each reading comes from a process of its own, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases, peers, worker
from benchmarks.results import EAGER, EXAMPLE, OURS, WARM_CACHE
from jaxtrain.errors import InputError
from jaxtrain.race import measuring
from jaxtrain.race.processes import call
from jaxtrain.race.turns import Readings, Values, take_turns

# Largest difference of a loss in the first steps from the reference's.
CHECK_TOLERANCE = 1e-4
# Largest difference of the values after the timed sections, where peers draw different dropout
# masks: a part of the reference's value, and a constant.
TOLERANCES = {"loss": (0.3, 0.05), "accuracy": (0.0, 0.02)}
# Suites whose processes reuse freed memory, as those of a race do.
REUSING_MEMORY = ("models", "step")
# torch.compile compiles a network for up to a minute, and PyTorch's MNIST example trains for three.
MOST_ROUNDS = {"pytorch-compile": 3, EXAMPLE: 3}


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
            check(suite, names, settings)
        actions = _actions(suite, names, settings, Path(scratch) / "cache")
        for readings, failed in measure(suite, actions, settings):
            reasons = (missing | failed).items()
            absent = [Row(suite, "all", name, missing=reason) for name, reason in reasons]
            yield [*absent, *_rows(suite, readings)]


def check(suite: str, names: Sequence[str], settings: Settings) -> None:
    """Compares the losses of each peer with eager PyTorch's, jaxtrain's or the first peer's.

    Raises:
      InputError: if a loss differs by more than 1e-4. Of a peer that reports only means over
        groups of steps, the mean of each pass over the data is compared.
    """
    reference = next((name for name in (EAGER, OURS) if name in names), names[0])
    expected: dict[str, np.ndarray] = {}
    for name in sorted(names, key=lambda name: name != reference):
        settings.log(f"{suite}: losses of {peers.label(name)}")
        found = call(worker.losses, suite, name, settings.data, torch_trainer(name))
        if name == reference:
            expected = found
        for case, values in found.items():
            if case in expected:
                compare(peers.label(name), case, values, expected[case])


def compare(name: str, case: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises InputError unless the losses agree."""
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
        raise InputError(
            f"losses of {name} differ by {difference:.1e} from the reference's in {case}; expected "
            f"at most {CHECK_TOLERANCE:g}; leave it out with --peers, or correct it"
        )


def measure(
    suite: str, actions: Mapping[str, Callable[[int], Values]], settings: Settings
) -> Iterator[tuple[Readings, dict[str, str]]]:
    """Yields, after each round, the values of each case, peer and round so far, and the failures.

    The actions are functions from the round to the values that a new process measures.
    """
    return take_turns(
        actions,
        {name: min(settings.rounds, MOST_ROUNDS.get(name, settings.rounds)) for name in actions},
        references=(EAGER, OURS),
        tolerances=TOLERANCES,
        log=lambda text: settings.log(f"{suite}: {text}"),
    )


def torch_trainer(name: str) -> Callable[..., Any] | None:
    """Returns what the processes of PyTorch get, which cannot import jaxtrain without JAX."""
    if not name.startswith("pytorch"):
        return None
    from jaxtrain.race.pytorch import TorchTrainer

    return TorchTrainer


def _actions(
    suite: str, names: Sequence[str], settings: Settings, cache: Path
) -> dict[str, Callable[[int], Values]]:
    """Returns functions that make one reading of each case, by peer."""

    def reading(name: str) -> Callable[[int], Values]:
        task = (suite, name, settings.data, torch_trainer(name))
        action: tuple[Any, ...] = (worker.measure_all, measuring.measure, *task)
        if suite == "sweep":
            action = (worker.measure_sweeps, measuring.time_sections, name, settings.data)
        # The first round compiles with an empty cache, so that its compilation times count.
        return lambda _: call(*action, cache=cache, reuse_memory=suite in REUSING_MEMORY)

    def process(name: str, cache: Path | None = None) -> Callable[[int], Values]:
        return lambda _: _process_values(name, settings, cache)

    if suite != "run":
        return {name: reading(name) for name in names}
    actions = {name: process(name) for name in names}
    if OURS in names:
        _process_values(OURS, settings, cache)  # fills the cache
        actions[WARM_CACHE] = process(OURS, cache)
    return actions


def _rows(suite: str, readings: Readings) -> Iterator[Row]:
    """Yields the rows of all cases and peers."""
    for case, by_peer in readings.items():
        for name, values in by_peer.items():
            kept = ("compile_seconds", "loss", "accuracy", "extrapolated_from")
            facts = {key: values[0][key] for key in kept if key in values[0]}
            yield Row(suite, case, name, [each["seconds"] for each in values], facts)
            if suite == "run":
                yield Row("memory", case, name, [each["peak_mib"] for each in values])


def _process_values(name: str, settings: Settings, cache: Path | None) -> Values:
    """Returns the values of a whole process that trains T2, from its start to its end."""
    epochs = 1 if settings.data is None else 5
    train = (worker.train_and_test, measuring.peak_memory_mib, name, settings.data, epochs)
    started = time.perf_counter()
    accuracy, peak = call(*train, torch_trainer(name), cache=cache)
    seconds = time.perf_counter() - started
    case = f"whole process, T2, {epochs} epoch{'s' * (epochs > 1)}"
    return {case: {"seconds": seconds, "accuracy": accuracy, "peak_mib": peak}}
