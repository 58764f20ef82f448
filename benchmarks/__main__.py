"""The suite's command line: python -m benchmarks [--suite …] [--peers …] [--json FILE]."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks import machine, report, suites
from benchmarks.problem import random_images, read_mnist
from jaxtrain import command
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
    check_writable(config.output_dir, file.parent)  # now, not when hours are measured
    if config.quick:
        folder, (images, labels) = None, random_images(1280)
    else:
        folder = locate_files("mnist", config.data_dir)
        images, labels = read_mnist(folder, "train")
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
        write_json(file, results)  # suite by suite: nothing measured is lost
        report.print_suite(results, suite)
    pictures = report.draw(results, config.output_dir)
    print(report.machine_line(results))
    print(f"results: {', '.join(map(str, [file, *pictures]))}")
    return results


def check_writable(*folders: Path) -> None:
    """Make the folders and see that files can be written there.

    Raises:
      InputError: they cannot.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"the output folder {folder} cannot be written ({error.strerror}); expected one "
                "that can, by --output-dir or --json"
            ) from error


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the readings so far, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    partial.write_text(json.dumps(rounded, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="keras")
    try:
        command.main(Config, run)
    except suites.DisagreementError as error:
        sys.exit(f"error: {error}")
