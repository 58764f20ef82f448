"""The suite's command line: python -m benchmarks [--suite …] [--peers …] [--json FILE]."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks import machine, report, suites
from benchmarks.problem import random_images, read_mnist
from jaxtrain._files import make_folder, write_atomically
from jaxtrain.cli import command
from jaxtrain.data.mnist import locate_files
from jaxtrain.errors import InputError

Suite = Literal["step", "epoch", "growth", "run", "sweep", "memory"]
PeerName = Literal[
    "jaxtrain",
    "jaxtrain-steps",
    "pytorch",
    "pytorch-dataloader",
    "pytorch-pixels",
    "pytorch-compile",
    "pytorch-cuda-graphs",
    "nnx",
    "equinox",
    "keras",
    "keras-steps-per-execution",
]


@dataclass(frozen=True)
class Config:
    """Flags of the suite."""

    suite: tuple[Suite, ...] = ("step", "epoch", "growth", "run", "sweep", "memory")
    """What to measure."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Whom to measure; one that is not installed is reported as missing."""
    rounds: int = 9
    """Readings of each, in turns; half as many of sweeps of networks, a third of processes."""
    quick: bool = False
    """A minute's tour on noise instead of MNIST, to see that everything works; not to be quoted."""
    data_dir: Path | None = None
    """Folder of the MNIST files; None takes $JAXTRAIN_DATA_DIR, then the cache, then downloads."""
    json: Path | None = None
    """Where the readings go; None is results.json in the output folder."""
    output_dir: Path = Path("runs/benchmarks")
    """Where the pictures go."""


def run(config: Config) -> dict[str, Any]:
    """Time compiled training steps, epochs and runs against other libraries, in turns."""
    if config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}; expected at least 1")
    for flag, values in {"--suite": config.suite, "--peers": config.peers}.items():
        if not values:
            raise InputError(f"{flag} is empty; expected at least one name, or leave it out")
    file = config.json or config.output_dir / "results.json"
    if file.is_dir():
        raise InputError(f"--json is the folder {file}; expected a file")
    make_folder(config.output_dir, "output folder")  # not after hours of measuring
    make_folder(file.parent, "folder of the readings")
    if config.quick:
        folder, (images, labels) = None, random_images(1280)
    else:
        folder = locate_files("mnist", config.data_dir)
        images, labels = read_mnist(folder, "train")
    if len(config.suite) > 1 and not config.quick:
        results = each_in_its_own_process(config, folder, file)
    else:
        results = measure(config, folder, images, labels, file)
    pictures = report.draw(results, config.output_dir)
    print(report.machine_line(results))
    print(f"results: {', '.join(map(str, [file, *pictures]))}")
    return results


def each_in_its_own_process(config: Config, folder: Path | None, file: Path) -> dict[str, Any]:
    """Measure suite by suite, each undisturbed by the threads that another's peers leave behind."""
    results: dict[str, Any] = {}
    for suite in config.suite:
        with tempfile.TemporaryDirectory() as scratch:
            readings = Path(scratch) / "readings.json"
            command_line = [
                *(sys.executable, "-m", "benchmarks", "--suite", suite, "--peers", *config.peers),
                *("--rounds", str(config.rounds), "--data-dir", str(folder)),
                *("--json", str(readings), "--output-dir", scratch),
            ]
            finished = subprocess.run(command_line, stdout=subprocess.DEVNULL, check=False)
            if finished.returncode:
                sys.exit(finished.returncode)  # it has said why
            found = json.loads(readings.read_text())
        results = {**found, **results, "rows": results.get("rows", []) + found["rows"]}
        write_json(file, results)  # suite by suite: nothing measured is lost
        report.print_suite(results, suite)
    return results


def measure(
    config: Config, folder: Path | None, images: np.ndarray, labels: np.ndarray, file: Path
) -> dict[str, Any]:
    """Measure in this process."""
    machine.same_terms(cached=config.quick)
    names = [name for name in config.peers if not (config.quick and name == suites.SLOW_COMPILER)]
    settings = suites.Settings(
        names=names,
        images=images,
        labels=labels,
        folder=folder,
        rounds=min(2, config.rounds) if config.quick else config.rounds,
        quick=config.quick,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    results: dict[str, Any] = {"machine": machine.describe(), "quick": config.quick, "rows": []}
    for suite in config.suite:
        for row in suites.SUITES[suite](settings):
            results["rows"].append(dataclasses.asdict(row))
        write_json(file, results)
        report.print_suite(results, suite)
    return results


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the readings so far, atomically."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(path, (json.dumps(rounded, indent=1) + "\n").encode())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="keras")
    try:
        command.main(Config, run)
    except suites.DisagreementError as error:
        sys.exit(f"error: {error}")
