"""Defines the suites: each is a function from settings to the rows that it measures."""

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

from benchmarks import environment, flops, peers, problem, timing
from benchmarks.lower_bound import lower_bounds
from benchmarks.problem import NETWORKS, Problem, Trainer
from benchmarks.timing import Action, Repeated

CHECKED_STEPS = 20
CHECK_TOLERANCE = 1e-4
NOT_SELECTED = "not selected with --peers"
OURS = "jaxtrain"
EAGER = "pytorch"

STEP_BATCH_SIZES = (1, 16, 64, 256, 1024, 4096)
# It compiles for 20 seconds for each shape, so it is timed in the tutorial's case only.
SLOW_COMPILER = "pytorch-compile"
COMPILED_AT = ("T2", 64)
# These take the same step as another peer, and differ in how they train an epoch.
EPOCH_ONLY = {
    *("jaxtrain-steps", "pytorch-dataloader", "pytorch-pixels", "keras-steps-per-execution")
}


@dataclasses.dataclass(frozen=True)
class Row:
    """The readings of one peer in one case.

    Attributes:
      suite: name of the suite.
      case: description of what was trained.
      peer: key of `PEERS`, or name of what else was timed.
      readings: value of each round, in seconds or, in the suite `memory`, in MiB.
      facts: further values by name. `floor` marks rows that time matrix products alone, which
        bound the time of training from below.
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
      images: training images.
      labels: their labels.
      folder: folder of the MNIST files, or None if the images are random.
      rounds: readings per peer.
      quick: whether to run small cases only, to test the suites.
      log: called with a line about what is measured next.
    """

    names: Sequence[str]
    images: np.ndarray
    labels: np.ndarray
    folder: Path | None
    rounds: int
    quick: bool
    log: Callable[[str], object]


class DisagreementError(Exception):
    """Raised if a peer's losses or accuracy differ from the others'."""


def step(settings: Settings) -> Iterator[Row]:
    """Times single training steps, one call each, for each network and batch size."""
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
            yield from _time_peers(
                settings,
                "step",
                task,
                names,
                lambda trainer: Repeated(trainer.steps),
                bound_action=lambda run: Repeated(run),
            )


def epoch(settings: Settings) -> Iterator[Row]:
    """Times one pass over MNIST with T2's network, as each library's users write it."""
    task = problem.make("T2", settings.images, settings.labels)
    yield from _time_peers(
        settings,
        "epoch",
        task,
        settings.names,
        lambda trainer: trainer.epoch,
        bound_action=lambda run: lambda: run(task.steps),
    )


def growth(settings: Settings) -> Iterator[Row]:
    """Times jaxtrain's epoch as batch size, layer width and number of examples grow."""
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
        yield Row("growth", "all", OURS, missing=NOT_SELECTED)
        return
    settings.log(f"growth: {', '.join(grown)}")
    make = peers.load(OURS)
    actions = {case: make(task, problem.start(task)).epoch for case, task in grown.items()}
    bounds = {case: min(_lower_bounds(task), default=None) for case, task in grown.items()}
    for case, readings in timing.time_interleaved(actions, settings.rounds).items():
        work = flops.epoch_work(grown[case])
        facts = {"flops": work.flops, "bytes": work.bytes, "floor_seconds": bounds[case]}
        yield Row("growth", case, OURS, readings, facts)


def run(settings: Settings) -> Iterator[Row]:
    """Times T1's 200 epochs, and whole processes that train T2."""
    yield from _linear_regressions(settings, "run", (1,))
    epochs = 1 if settings.quick else 5
    yield from _processes(settings, "run", epochs)


def sweep(settings: Settings) -> Iterator[Row]:
    """Times many linear regressions, and many networks, in one call."""
    yield from _linear_regressions(settings, "sweep", (32,) if settings.quick else (1, 32, 1000))
    if OURS not in settings.names:
        yield Row("sweep", "T2 networks", OURS, missing=NOT_SELECTED)
        return
    from benchmarks import network_sweep

    count = 20 * 64 if settings.quick else 100 * 64
    task = problem.make("T2", settings.images[:count], settings.labels[:count])
    at_once = network_sweep.jaxtrain_sweep(task)
    one_by_one = network_sweep.pytorch_sweep(task) if _is_available(settings, EAGER) else None
    if one_by_one is None:
        yield Row("sweep", "T2 networks", EAGER, missing=_reason_missing(settings, EAGER))
    else:
        checked = task._replace(
            dropout_rate=0.0, images=task.images[:1280], labels=task.labels[:1280]
        )
        ours = network_sweep.jaxtrain_sweep(checked)(2)()
        theirs = network_sweep.pytorch_sweep(checked)(2)()
        difference = np.abs(ours - theirs).max()
        if not difference <= CHECK_TOLERANCE:
            raise DisagreementError(
                f"losses of jaxtrain's sweep of networks differ by {difference:.1e} from eager "
                f"PyTorch's; expected at most {CHECK_TOLERANCE:g}"
            )
    for size in (8,) if settings.quick else (1, 8, 64):
        case = f"{size} × T2 network, {task.steps} steps"
        settings.log(f"sweep: {case}")
        actions: dict[str, Action] = {OURS: at_once(size)}
        if one_by_one is not None:
            # The runs are independent, so the time of two can be extrapolated.
            actions[EAGER] = one_by_one(min(size, 2))
        factors = {OURS: 1.0, EAGER: size / min(size, 2)}
        rounds = max(1, settings.rounds // 2)
        for name, readings in timing.time_interleaved(actions, rounds).items():
            facts = {} if factors[name] == 1 else {"extrapolated_from": min(size, 2)}
            yield Row("sweep", case, name, [factors[name] * each for each in readings], facts)


def memory(settings: Settings) -> Iterator[Row]:
    """Measures the peak resident memory of processes that train T2."""
    for row in _processes(settings, "memory", 1 if settings.quick else 2):
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
    """Compares the losses of two passes with the reference's.

    Args:
      name: key of the peer in `PEERS`.
      make: function that makes its trainer.
      task: the problem, with 20 batches and without dropout.
      expected: losses of the reference, or None if this peer is the reference.

    Returns:
      The losses of both passes.

    Raises:
      DisagreementError: if a loss differs from the reference's by more than 1e-4; for a peer that
        reports only means over groups of steps, if such a mean does.
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
                f"losses of {peers.PEERS[name].label} differ by {difference:.1e} from the "
                f"reference's in {task.steps} steps of {task.network}, batch {task.batch_size}; "
                f"expected at most {CHECK_TOLERANCE:g}; leave it out with --peers, or correct it"
            )
    return np.concatenate(passes)


def _time_peers(
    settings: Settings,
    suite: str,
    task: Problem,
    names: Iterable[str],
    action: Callable[[Trainer], Action],
    bound_action: Callable[[Callable[[int], None]], Action],
) -> Iterator[Row]:
    """Checks the losses of each peer, then times the peers and the lower bounds, interleaved."""
    case = f"{task.network}, batch {task.batch_size}"
    first = CHECKED_STEPS * task.batch_size
    checked = task._replace(
        images=np.resize(task.images, (first, 28, 28)),
        labels=np.resize(task.labels, first),
        dropout_rate=0.0,
    )
    reference = EAGER if _installed(EAGER) else OURS
    settings.log(f"{suite}: {case}: reference losses of {peers.PEERS[reference].label}")
    expected = check(reference, peers.load(reference), checked, None)
    actions: dict[str, Action] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        settings.log(f"{suite}: {case}: {peers.PEERS[name].label}")
        try:
            make = peers.load(name)
            check(name, make, checked, expected)
            actions[name] = action(make(task, problem.start(task)))
            facts[name] = {"first_seconds": _first_seconds(actions[name])}
        except peers.MissingError as error:
            yield Row(suite, case, name, missing=str(error))
            continue
    bounds = {name: bound_action(run) for name, run in lower_bounds(task).items()}
    settings.log(f"{suite}: {case}: {settings.rounds} interleaved rounds")
    work = flops.epoch_work(task) if suite == "epoch" else _step_work(task)
    for name, readings in timing.time_interleaved({**actions, **bounds}, settings.rounds).items():
        of_work = {
            "network": task.network,
            "batch_size": task.batch_size,
            "examples": task.batch_size if suite == "step" else len(task.images),
            "flops": work.flops,
            "bytes": work.bytes,
            "floor": name in bounds,
        }
        yield Row(suite, case, name, readings, {**facts.get(name, {}), **of_work})
    del actions
    gc.collect()


def _first_seconds(action: Action) -> float:
    """Returns the seconds of one call; a first call includes compilation."""
    started = time.perf_counter()
    if isinstance(action, Repeated):
        action.run(1)
    else:
        action()
    return time.perf_counter() - started


def _step_work(task: Problem) -> flops.Work:
    return flops.step_work(task.features, task.batch_size)


def _lower_bounds(task: Problem) -> list[float]:
    """Returns the seconds of an epoch's matrix products in each library, the best of three."""
    return [
        min(_first_seconds(functools.partial(run, task.steps)) for _ in range(3))
        for run in lower_bounds(task).values()
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


def _is_available(settings: Settings, name: str) -> bool:
    """Returns whether a peer is selected and installed."""
    return name in settings.names and _installed(name)


def _reason_missing(settings: Settings, name: str) -> str:
    """Returns why a peer is not available."""
    if name not in settings.names:
        return NOT_SELECTED
    try:
        peers.load(name)
    except peers.MissingError as error:
        return str(error)
    raise AssertionError(f"{name} is available")


def _linear_regressions(settings: Settings, suite: str, counts: Iterable[int]) -> Iterator[Row]:
    """Times T1's 200 epochs: from many starts in one call, and one start after another."""
    from benchmarks import linear_regression

    if OURS not in settings.names:
        yield Row(suite, "T1", OURS, missing=NOT_SELECTED)
        return
    ours = linear_regression.jaxtrain_runs()
    eager = linear_regression.pytorch_runs() if _is_available(settings, EAGER) else None
    if eager is None:
        yield Row(suite, "T1", EAGER, missing=_reason_missing(settings, EAGER))
    if eager is not None:
        starts = linear_regression.starts(3)
        difference = np.abs(ours(starts) - eager(starts)).max()
        if not difference <= CHECK_TOLERANCE:
            raise DisagreementError(
                f"jaxtrain's losses of T1 differ by {difference:.1e} from eager PyTorch's; "
                f"expected at most {CHECK_TOLERANCE:g}"
            )
    for count in counts:
        case = f"{count} × T1, {linear_regression.EPOCHS} epochs"
        settings.log(f"{suite}: {case}")
        starts = linear_regression.starts(count)
        sample = min(count, 3 if settings.quick else 20)
        actions: dict[str, Action] = {
            OURS: Repeated(functools.partial(_repeat, functools.partial(ours, starts)))
        }
        if eager is not None:
            actions[EAGER] = functools.partial(eager, starts[:sample])
        for name, readings in timing.time_interleaved(actions, settings.rounds).items():
            factor = count / sample if name == EAGER else 1.0
            facts = {} if factor == 1 else {"extrapolated_from": sample}
            yield Row(suite, case, name, [factor * each for each in readings], facts)


def _processes(settings: Settings, suite: str, epochs: int) -> Iterator[Row]:
    """Trains each peer in a process of its own; in `run`, jaxtrain also with a warm cache."""
    case = f"whole process, T2, {epochs} epoch{'s' * (epochs > 1)}"
    names = settings.names
    if settings.quick:
        names = [name for name in names if name in (OURS, EAGER)]
    runnable = []
    for name in names:
        if name in (SLOW_COMPILER, "pytorch-cuda-graphs"):
            yield Row(suite, case, name, missing="timed in step and epoch only")
        elif _installed(name):
            runnable.append(name)
        else:
            yield Row(suite, case, name, missing=_reason_missing(settings, name))
    rounds = max(1, settings.rounds // 3)
    results: dict[str, list[tuple[float, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        # In `run`, a first round that is not counted fills JAX's cache and the file cache.
        for _ in range(rounds + (suite == "run" and not settings.quick)):
            for name in runnable:
                settings.log(f"{suite}: {case}: {peers.PEERS[name].label}")
                # A quick run has no first round to fill the cache.
                cold = cache if settings.quick else None
                results.setdefault(name, []).append(_train_process(settings, name, epochs, cold))
                if name == OURS and suite == "run":
                    warm = _train_process(settings, name, epochs, cache)
                    results.setdefault(f"{name}, warm cache", []).append(warm)
    accuracies: dict[str, float] = {}
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
        raise DisagreementError(
            f"test accuracies differ: {accuracies}; expected them within 0.02 of each other"
        )


def _train_process(
    settings: Settings, name: str, epochs: int, cache: str | None
) -> tuple[float, dict[str, float]]:
    """Returns the wall-clock seconds of one process, and the values that it prints."""
    command = [sys.executable, "-m", "benchmarks.training_process", name, "--epochs", str(epochs)]
    if settings.folder is not None:
        command += ["--folder", str(settings.folder)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    # The settings of `environment.equalize`, for a process that imports one library only.
    variables |= {"OMP_NUM_THREADS": str(environment.cores())}
    if environment.has_gpu():
        variables |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if cache is not None:
        variables |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    started = time.perf_counter()
    result = subprocess.run(
        command,
        env=variables,
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
