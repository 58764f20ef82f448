"""Trains T2 with one peer, in a process that the suite `run` measures from its start to its end.

    python -m benchmarks.training_process PEER [--folder FOLDER] [--epochs 5]

Prints test accuracy and peak memory as one line of JSON. Imports no other peer's library.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

from benchmarks import peers, problem


def peak_memory_mib() -> float:
    """Returns the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Trains T2 and tests it after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=peers.PEERS)
    parser.add_argument("--folder", type=Path, help="of the MNIST files; without, random images")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    if arguments.folder is None:
        train, test = problem.random_images(1280), problem.random_images(1280)
    else:
        train = problem.read_mnist(arguments.folder, "train")
        test = problem.read_mnist(arguments.folder, "t10k")
    task = problem.make("T2", *train)
    trainer = peers.load(arguments.peer)(task, problem.start(task))
    images, labels = trainer.prepare(test[0]), test[1]
    for _ in range(arguments.epochs):
        trainer.epoch()
        accuracy = float((trainer.predict(images).argmax(-1) == labels).mean())
    print(json.dumps({"accuracy": accuracy, "peak_mib": peak_memory_mib()}))


if __name__ == "__main__":
    main()
