"""The measurements: each suite is a function from settings to rows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine, peers, problem, timing, work
from benchmarks.problem import NETWORKS, Problem, Trainer
from benchmarks.timing import Action, Repeated

CHECKED_STEPS = 20
CHECK_TOLERANCE = 1e-4
NOT_ASKED = "not among --peers"
OURS = "jaxtrain"
EAGER = "pytorch"

STEP_BATCH_SIZES = (1, 16, 64, 256, 1024, 4096)
# It compiles anew for each shape, 20 seconds a time; it is timed where the tutorial trains.
SLOW_COMPILER = "pytorch-compile"
COMPILED_AT = ("T2", 64)
# These differ from their sibling only in how they make an epoch.
EPOCH_ONLY = {
    *("jaxtrain-steps", "pytorch-dataloader", "pytorch-pixels", "keras-steps-per-execution")
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One peer in one case.

    Attributes:
      suite: which suite.
      case: what was trained, in words.
      peer: a key of `PEERS`, or what else was timed.
      readings: the value of each round (seconds, or MiB in the suite `memory`).
      facts: whatever else belongs to it, by name.
      missing: why there are no readings.
    """

    suite: str
    case: str
    peer: str
    readings: list[float] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str | None = None


class Settings(NamedTuple):
    """What the suites share.

    Attributes:
      names: peers to time.
      images: training images.
      labels: their labels.
      folder: of the MNIST files; None where the images are noise.
      rounds: readings of each contender.
      quick: whether to be done in a minute, for a test of the suite itself.
      say: called with what is measured next.
    """

    names: Sequence[str]
    images: np.ndarray
    labels: np.ndarray
    folder: Path | None
    rounds: int
    quick: bool
    say: Callable[[str], object]


class DisagreementError(Exception):
    """A peer computes something else than the reference, so its time means nothing."""


def step(settings: Settings) -> Iterator[Row]:
    """One training step, a call each, by network and batch size."""
    networks = ("T2",) if settings.quick else tuple(NETWORKS)
    batch_sizes = (64,) if settings.quick else STEP_BATCH_SIZES
    for network in networks:
        for batch_size in batch_sizes:
            task = problem.make(network, settings.images, settings.labels, batch_size)
            names = [
                name
                for name in settings.names
                if name not in EPOCH_ONLY
                and (name != SLOW_COMPILER or (network, batch_size) == COMPILED_AT)
            ]
            yield from _in_turns(
                settings,
                "step",
                task,
                names,
                lambda trainer: Repeated(trainer.steps),
                floor=lambda run: Repeated(run),
            )


def epoch(settings: Settings) -> Iterator[Row]:
    """One pass over MNIST with T2's network, as each library's users write it."""
    task = problem.make("T2", settings.images, settings.labels)
    yield from _in_turns(
        settings,
        "epoch",
        task,
        settings.names,
        lambda trainer: trainer.epoch,
        floor=lambda run: lambda: run(task.steps),
    )


def growth(settings: Settings) -> Iterator[Row]:
    """Seconds of an epoch of ours as batch size, width and data grow, beside the counted work."""
    base = problem.make("T2", settings.images, settings.labels)
    examples = len(base.images)
    grown = {f"batch {size}": base._replace(batch_size=size) for size in (64, 256, 1024, 4096)}
    for factor in (2, 4):
        features = (*(factor * width for width in base.features[:-1]), base.features[-1])
        grown[f"width × {factor}"] = base._replace(features=features)
    for part in (4, 2):
        count = examples // part
        grown[f"{count} examples"] = base._replace(
            images=base.images[:count], labels=base.labels[:count]
        )
    if settings.quick:
        grown = {"batch 256": grown["batch 256"]}
    if OURS not in settings.names:
        yield Row("growth", "all", OURS, missing=NOT_ASKED)
        return
    settings.say(f"growth: {', '.join(grown)}")
    make = peers.load(OURS)
    actions = {case: make(task, problem.start(task)).epoch for case, task in grown.items()}
    floors = {case: min(_floor(task), default=None) for case, task in grown.items()}
    for case, readings in timing.in_turns(actions, settings.rounds).items():
        counted = work.epoch_work(grown[case])
        facts = {"flops": counted.flops, "bytes": counted.bytes, "floor_seconds": floors[case]}
        yield Row("growth", case, OURS, readings, facts)


def run(settings: Settings) -> Iterator[Row]:
    """T1's 200 epochs, and a whole process that trains T2 from a cold start."""
    yield from _lines(settings, "run", (1,))
    epochs = 1 if settings.quick else 5
    yield from _whole_runs(settings, "run", epochs)


def sweep(settings: Settings) -> Iterator[Row]:
    """Many linear regressions, and many networks, trained at once."""
    yield from _lines(settings, "sweep", (32,) if settings.quick else (1, 32, 1000))
    if OURS not in settings.names:
        yield Row("sweep", "T2 networks", OURS, missing=NOT_ASKED)
        return
    from benchmarks import networks

    count = 20 * 64 if settings.quick else 100 * 64
    task = problem.make("T2", settings.images[:count], settings.labels[:count])
    at_once = networks.at_once(task)
    one_by_one = networks.one_by_one(task) if _has(settings, EAGER) else None
    if one_by_one is None:
        yield Row("sweep", "T2 networks", EAGER, missing=_why_not(settings, EAGER))
    else:
        quiet = task._replace(
            dropout_rate=0.0, images=task.images[:1280], labels=task.labels[:1280]
        )
        difference = np.abs(networks.at_once(quiet)(2)() - networks.one_by_one(quiet)(2)()).max()
        if not difference <= CHECK_TOLERANCE:
            raise DisagreementError(f"a sweep's losses are {difference:.1e} off those one by one")
    for size in (8,) if settings.quick else (1, 8, 64):
        case = f"{size} × T2 network, {task.steps} steps"
        settings.say(f"sweep: {case}")
        actions: dict[str, Action] = {OURS: at_once(size)}
        if one_by_one is not None:
            # Nothing is shared between runs, so a few stand for all.
            actions[EAGER] = one_by_one(min(size, 2))
        factors = {OURS: 1.0, EAGER: size / min(size, 2)}
        rounds = max(1, settings.rounds // 2)
        for name, readings in timing.in_turns(actions, rounds).items():
            facts = {} if factors[name] == 1 else {"extrapolated_from": min(size, 2)}
            yield Row("sweep", case, name, [factors[name] * each for each in readings], facts)


def memory(settings: Settings) -> Iterator[Row]:
    """Peak resident memory of a process that trains T2 and does nothing else."""
    for row in _whole_runs(settings, "memory", 1 if settings.quick else 2):
        if not row.missing:
            row = dataclasses.replace(row, readings=row.facts.pop("each_peak_mib"))
        yield row


SUITES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "step": step,
    "epoch": epoch,
    "growth": growth,
    "run": run,
    "sweep": sweep,
    "memory": memory,
}


def check(name: str, make: peers.Make, task: Problem, expected: np.ndarray | None) -> np.ndarray:
    """Train twice over 20 batches without dropout and compare the losses.

    Args:
      name: the peer.
      make: makes its trainer.
      task: the problem, cut to its first 20 batches and without dropout.
      expected: the reference's losses; None if this is the reference.

    Returns:
      The losses of both passes.

    Raises:
      DisagreementError: a loss, or the mean of a group of steps where a peer tells no more, is
        further than 1e-4 from the reference's.
    """
    trainer = make(task, problem.start(task))
    passes = [trainer.losses(), trainer.losses()]
    if expected is not None:
        if len(passes[0]) == task.steps:
            difference = np.abs(np.concatenate(passes) - expected).max()
        else:
            means = [np.mean(losses) for losses in passes]
            difference = np.abs(means - expected.reshape(2, -1).mean(axis=1)).max()
        if not difference <= CHECK_TOLERANCE:
            raise DisagreementError(
                f"{peers.PEERS[name].label} is {difference:.1e} off the losses of "
                f"{task.steps} steps of {task.network}, batch {task.batch_size}; expected at most "
                f"{CHECK_TOLERANCE:g}, so its time is not comparable"
            )
    return np.concatenate(passes)


def _in_turns(
    settings: Settings,
    suite: str,
    task: Problem,
    names: Iterable[str],
    action: Callable[[Trainer], Action],
    floor: Callable[[Callable[[int], None]], Action],
) -> Iterator[Row]:
    """Check every peer against the others, then time them and the floor in turns."""
    case = f"{task.network}, batch {task.batch_size}"
    first = CHECKED_STEPS * task.batch_size
    checked = task._replace(
        images=np.resize(task.images, (first, 28, 28)),
        labels=np.resize(task.labels, first),
        dropout_rate=0.0,
    )
    reference = EAGER if _installed(EAGER) else OURS
    settings.say(f"{suite}: {case}: losses of {peers.PEERS[reference].label} to check against")
    expected = check(reference, peers.load(reference), checked, None)
    actions: dict[str, Action] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        settings.say(f"{suite}: {case}: {peers.PEERS[name].label}")
        try:
            make = peers.load(name)
            check(name, make, checked, expected)
            actions[name] = action(make(task, problem.start(task)))
            facts[name] = {"first_seconds": _first_seconds(actions[name])}
        except peers.MissingError as error:
            yield Row(suite, case, name, missing=str(error))
            continue
    floors = {name: floor(run) for name, run in work.floors(task).items()}
    settings.say(f"{suite}: {case}: {settings.rounds} rounds in turns")
    counted = work.epoch_work(task) if suite == "epoch" else _step_work(task)
    for name, readings in timing.in_turns({**actions, **floors}, settings.rounds).items():
        of_work = {
            "network": task.network,
            "batch_size": task.batch_size,
            "examples": task.batch_size if suite == "step" else len(task.images),
            "flops": counted.flops,
            "bytes": counted.bytes,
            "floor": name in floors,
        }
        yield Row(suite, case, name, readings, {**facts.get(name, {}), **of_work})
    del actions
    gc.collect()


def _first_seconds(action: Action) -> float:
    """The first call, in which a compiler compiles."""
    started = time.perf_counter()
    if isinstance(action, Repeated):
        action.run(1)
    else:
        action()
    return time.perf_counter() - started


def _step_work(task: Problem) -> work.Work:
    return work.step_work(task.features, task.batch_size)


def _floor(task: Problem) -> list[float]:
    """Seconds of an epoch's matrix products by each BLAS, at their best of three."""
    return [
        min(_first_seconds(functools.partial(run, task.steps)) for _ in range(3))
        for run in work.floors(task).values()
    ]


def _repeat(action: Callable[[], object], times: int) -> None:
    for _ in range(times):
        action()


def _installed(name: str) -> bool:
    try:
        peers.load(name)
    except peers.MissingError:
        return False
    return True


def _has(settings: Settings, name: str) -> bool:
    """Whether a peer is asked for and installed."""
    return name in settings.names and _installed(name)


def _why_not(settings: Settings, name: str) -> str:
    """Why `_has` says no."""
    if name not in settings.names:
        return NOT_ASKED
    try:
        peers.load(name)
    except peers.MissingError as error:
        return str(error)
    raise AssertionError(name)


def _lines(settings: Settings, suite: str, counts: Iterable[int]) -> Iterator[Row]:
    """T1's 200 epochs from many starts at once, against one after another."""
    from benchmarks import lines

    if OURS not in settings.names:
        yield Row(suite, "T1", OURS, missing=NOT_ASKED)
        return
    ours, eager = lines.ours(), lines.eager() if _has(settings, EAGER) else None
    if eager is None:
        yield Row(suite, "T1", EAGER, missing=_why_not(settings, EAGER))
    if eager is not None:
        starts = lines.starts(3)
        difference = np.abs(ours(starts) - eager(starts)).max()
        if not difference <= CHECK_TOLERANCE:
            raise DisagreementError(
                f"T1's losses are {difference:.1e} apart; expected at most 1e-4"
            )
    for count in counts:
        case = f"{count} × T1, {lines.EPOCHS} epochs"
        settings.say(f"{suite}: {case}")
        starts = lines.starts(count)
        sample = min(count, 3 if settings.quick else 20)
        actions: dict[str, Action] = {
            OURS: Repeated(functools.partial(_repeat, functools.partial(ours, starts)))
        }
        if eager is not None:
            actions[EAGER] = functools.partial(eager, starts[:sample])
        for name, readings in timing.in_turns(actions, settings.rounds).items():
            factor = count / sample if name == EAGER else 1.0
            facts = {} if factor == 1 else {"extrapolated_from": sample}
            yield Row(suite, case, name, [factor * each for each in readings], facts)


def _whole_runs(settings: Settings, suite: str, epochs: int) -> Iterator[Row]:
    """Each peer in a process of its own; JAX's, in `run`, with a cold and a warm cache, too."""
    case = f"whole process, T2, {epochs} epoch{'s' * (epochs > 1)}"
    names = settings.names
    if settings.quick:
        names = [name for name in names if name in (OURS, EAGER)]
    runnable = []
    for name in names:
        if name in (SLOW_COMPILER, "pytorch-cuda-graphs"):
            yield Row(suite, case, name, missing="timed in step and epoch")
        elif _installed(name):
            runnable.append(name)
        else:
            yield Row(suite, case, name, missing=_why_not(settings, name))
    rounds = max(1, settings.rounds // 3)
    results: dict[str, list[tuple[float, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        # A first round, not counted, fills the cache and the system's file cache.
        for _ in range(rounds + (suite == "run" and not settings.quick)):
            for name in runnable:
                settings.say(f"{suite}: {case}: {peers.PEERS[name].label}")
                cold = cache if settings.quick else None  # then it is the cold run that fills it
                results.setdefault(name, []).append(_child(settings, name, epochs, cold))
                if name == OURS and suite == "run":
                    warm = _child(settings, name, epochs, cache)
                    results.setdefault(f"{name}, warm cache", []).append(warm)
    accuracies = {}
    for name, measured in results.items():
        counted = measured[-rounds:]
        facts: dict[str, Any] = {
            key: statistics.median(each[1][key] for each in counted) for key in counted[0][1]
        }
        accuracies[name] = facts["accuracy"]
        if suite == "memory":
            facts["each_peak_mib"] = [each[1]["peak_mib"] for each in counted]
        yield Row(suite, case, name, [seconds for seconds, _ in counted], facts)
    if (
        settings.folder
        and accuracies
        and max(accuracies.values()) > min(accuracies.values()) + 0.02
    ):
        raise DisagreementError(f"the runs end at different accuracies: {accuracies}")


def _child(
    settings: Settings, name: str, epochs: int, cache: str | None
) -> tuple[float, dict[str, float]]:
    """Wall seconds of one process, and what it says."""
    command = [sys.executable, "-m", "benchmarks.whole_run", name, "--epochs", str(epochs)]
    if settings.folder is not None:
        command += ["--folder", str(settings.folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    # The terms of `machine.same_terms`, for a process that may not import both libraries.
    environment |= {"OMP_NUM_THREADS": str(machine.cores())}
    if machine.has_gpu():
        environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    started = time.perf_counter()
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    seconds = time.perf_counter() - started
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    with contextlib.suppress(json.JSONDecodeError):
        return seconds, json.loads(result.stdout.splitlines()[-1])
    raise RuntimeError(f"{' '.join(command)} printed no result:\n{result.stdout}")
