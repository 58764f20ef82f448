"""The command `python -m benchmarks`, which runs the suites and writes their results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jaxtrain as jt
from benchmarks import cases, problem, report, speedrun, suites
from benchmarks.figures import epoch_ratios
from benchmarks.peers import PEERS
from jaxtrain.race.machine import describe
from jaxtrain.race.processes import ProcessError

QUICK_PEERS = ("jaxtrain", "pytorch")


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Time training steps, epochs and runs of jaxtrain and of other libraries.",
    )
    add = parser.add_argument
    add("--suite", nargs="+", choices=cases.SUITES, default=cases.SUITES, help="suites to run")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="peers to measure")
    add("--rounds", type=int, default=5, help="readings of each peer (3 of torch.compile)")
    add("--quick", action="store_true", help="check that the suites run, on random images")
    add("--data-dir", type=Path, help="folder of the MNIST files; by default as `jt.data.load`")
    add("--json", type=Path, help="file of the results; by default in the output folder")
    add("--output-dir", type=Path, default=Path("runs/benchmarks"), help="folder of the figures")
    return parser.parse_args()


def main() -> None:
    """Measures the suites; writes and prints the results after each, and draws figures."""
    flags = parse()
    file = flags.json or flags.output_dir / "results.json"
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    machine = describe() | {"commit": commit()}
    results: dict[str, Any] = {"machine": machine, "quick": flags.quick, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        settings = suites.Settings(
            names=[name for name in flags.peers if not flags.quick or name in QUICK_PEERS],
            data=None
            if flags.quick
            else problem.write_images(Path(scratch), "mnist", flags.data_dir),
            rounds=1 if flags.quick else max(1, flags.rounds),
            log=lambda text: print(text, file=sys.stderr, flush=True),
        )
        for suite in flags.suite:
            earlier = results["rows"]
            if suite == "speedrun":
                run_suite = partial(speedrun.run_suite, data_dir=flags.data_dir)
            else:
                run_suite = partial(suites.run_suite, suite)
            for rows in run_suite(settings):
                results["rows"] = [*earlier, *map(dataclasses.asdict, rows)]
                write(file, results)  # an interruption loses only the current round
            for measured in dict.fromkeys(row.suite for row in rows):
                print(report.console_table(results, measured))
    if (figure := epoch_ratios(results)) is not None:
        figure.savefig(flags.output_dir / "epoch_ratios.png", dpi=120)
    print(report.software(results))
    print(f"results: {file}")


def commit() -> str | None:
    """Returns the commit, with "-dirty" if files differ from it, or None outside a git clone."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the results with six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    path.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ProcessError, jt.errors.InputError) as error:
        sys.exit(f"error: {error}")
