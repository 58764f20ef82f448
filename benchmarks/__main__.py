"""The command `python -m benchmarks`, which runs the suites and writes their results."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtrain.cli import command  # isort: skip  # first: reports missing extras

from benchmarks import cases, environment, figures, speedrun, suites, tables
from jaxtrain._files import make_folder, write_atomically
from jaxtrain.data.mnist import locate_files
from jaxtrain.errors import InputError

Suite = Literal["step", "models", "growth", "sweep", "run", "speedrun"]
PeerName = Literal[
    "jaxtrain",
    "jaxtrain-steps",
    "jax-scan",
    "jax-vmap",
    "pytorch",
    "pytorch-dataloader",
    "pytorch-pixels",
    "pytorch-compile",
    "pytorch-cuda-graphs",
    "pytorch-batched",
    "pytorch-vmap",
    "nnx",
    "equinox",
    "keras",
    "keras-steps-per-execution",
]


@dataclass(frozen=True)
class Config:
    """Flags of the benchmarks."""

    suite: tuple[Suite, ...] = get_args(Suite)
    """Suites to run."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Peers to measure; one that is not installed is reported as missing."""
    rounds: int = 5
    """Readings of each peer, each from a process of its own (3 of torch.compile)."""
    quick: bool = False
    """Check in two minutes that the suites run, on random images; the times are meaningless."""
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
    folder = None if config.quick else locate_files("mnist", config.data_dir)
    results = measure(config, folder, file)
    written = figures.draw(results, config.output_dir)
    print(tables.machine_line(results))
    print(f"results: {', '.join(map(str, [file, *written]))}")
    return results


def measure(config: Config, folder: Path | None, file: Path) -> dict[str, Any]:
    """Measures every suite, and writes and prints what has been measured after each."""
    settings = suites.Settings(
        names=config.peers,
        cases=cases.Settings(folder, config.quick),
        rounds=1 if config.quick else config.rounds,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    results: dict[str, Any] = {"machine": environment.describe(), "quick": config.quick, "rows": []}
    for suite in config.suite:
        earlier = results["rows"]
        run_suite = speedrun.run_suite if suite == "speedrun" else partial(suites.run_suite, suite)
        for rows in run_suite(settings):
            results["rows"] = [*earlier, *map(dataclasses.asdict, rows)]
            write_json(file, results)  # an interruption loses only the current round
        for measured in dict.fromkeys(row.suite for row in rows):
            tables.print_suite(results, measured)
    return results


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the results atomically, with six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(path, (json.dumps(rounded, indent=1) + "\n").encode())


if __name__ == "__main__":
    try:
        command.main(Config, run)
    except (suites.DisagreementError, suites.WorkerError) as error:
        sys.exit(f"error: {error}")
