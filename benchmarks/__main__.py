"""The command `python -m benchmarks`, which runs the suites and writes their results."""

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

from benchmarks import environment, figures, suites, tables
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
    """Flags of the benchmarks."""

    suite: tuple[Suite, ...] = ("step", "epoch", "growth", "run", "sweep", "memory")
    """Suites to run."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Peers to measure; one that is not installed is reported as missing."""
    rounds: int = 9
    """Readings of each peer; sweeps of networks take half as many, processes a third."""
    quick: bool = False
    """Check in a minute that every suite runs, on random images; the times mean nothing."""
    data_dir: Path | None = None
    """Folder of the MNIST files; by default $JAXTRAIN_DATA_DIR, the cache, or a download."""
    json: Path | None = None
    """File of the results; by default results.json in the output folder."""
    output_dir: Path = Path("runs/benchmarks")
    """Folder of the figures."""


def run(config: Config) -> dict[str, Any]:
    """Time the training steps, epochs and runs of jaxtrain and of other libraries."""
    if config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}; expected at least 1")
    for flag, values in {"--suite": config.suite, "--peers": config.peers}.items():
        if not values:
            raise InputError(f"{flag} is empty; expected at least one name, or no flag")
    file = config.json or config.output_dir / "results.json"
    if file.is_dir():
        raise InputError(f"--json is the folder {file}; expected a file")
    make_folder(config.output_dir, "output folder")  # fails before the suites, not after them
    make_folder(file.parent, "folder of the results")
    if config.quick:
        folder, (images, labels) = None, random_images(1280)
    else:
        folder = locate_files("mnist", config.data_dir)
        images, labels = read_mnist(folder, "train")
    if len(config.suite) > 1 and not config.quick:
        results = measure_in_processes(config, folder, file)
    else:
        results = measure(config, folder, images, labels, file)
    written = figures.draw(results, config.output_dir)
    print(tables.machine_line(results))
    print(f"results: {', '.join(map(str, [file, *written]))}")
    return results


def measure_in_processes(config: Config, folder: Path | None, file: Path) -> dict[str, Any]:
    """Measures each suite in a process of its own, free of the threads of earlier suites."""
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
                sys.exit(finished.returncode)  # the process has printed the error
            found = json.loads(readings.read_text())
        results = {**found, **results, "rows": results.get("rows", []) + found["rows"]}
        write_json(file, results)  # an interruption loses only the current suite
        tables.print_suite(results, suite)
    return results


def measure(
    config: Config, folder: Path | None, images: np.ndarray, labels: np.ndarray, file: Path
) -> dict[str, Any]:
    """Measures every suite in this process."""
    environment.equalize(use_cache=config.quick)
    names = [name for name in config.peers if not (config.quick and name == suites.SLOW_COMPILER)]
    settings = suites.Settings(
        names=names,
        images=images,
        labels=labels,
        folder=folder,
        rounds=min(2, config.rounds) if config.quick else config.rounds,
        quick=config.quick,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    results: dict[str, Any] = {"machine": environment.describe(), "quick": config.quick, "rows": []}
    for suite in config.suite:
        for row in suites.SUITES[suite](settings):
            results["rows"].append(dataclasses.asdict(row))
        write_json(file, results)
        tables.print_suite(results, suite)
    return results


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the results atomically, with six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(path, (json.dumps(rounded, indent=1) + "\n").encode())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="keras")
    try:
        command.main(Config, run)
    except suites.DisagreementError as error:
        sys.exit(f"error: {error}")
