"""Compares the test accuracy on MNIST over five seeds with PyTorch's, shuffled and not.

python -m benchmarks.accuracy [--data-dir FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from rich.console import Console
from rich.table import Table

import jaxtrain as jt
from experiments import mnist
from jaxtrain.cli.command import report_errors
from jaxtrain.cli.runs import RunFolder

SEEDS = (42, 1, 2, 3, 4)

# Mean number of correct answers (of 10,000) over the same seeds, PyTorch 2.13 on a CPU.
REFERENCE = {"shuffled": 9483, "stored": 9476}


def correct_answers(data: jt.data.Resolved, seed: int, shuffle: bool) -> list[int]:
    """Returns the number of correct test answers after each of T2's five epochs."""
    with tempfile.TemporaryDirectory() as scratch:
        config = mnist.Config(seed=seed, shuffle=shuffle, log_interval=0)
        config = mnist.with_defaults(config, data.name)
        _, history = mnist.train(config, data, RunFolder(scratch, config))
    return [round(accuracy * len(data.test)) for accuracy in history["test_accuracy"]]


def main() -> None:
    """Trains with each seed and order, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    arguments = parser.parse_args()
    data = jt.data.load_resolved("mnist", arguments.data_dir)
    table = Table(title="correct test answers of 10,000", title_justify="left")
    for heading in ("order", "seed", "epoch 1", "2", "3", "4", "5", "mean", "PyTorch"):
        table.add_column(heading, justify="right")
    for order, reference in REFERENCE.items():
        counts = {seed: correct_answers(data, seed, order == "shuffled") for seed in SEEDS}
        for seed, epochs in counts.items():
            table.add_row(order, str(seed), *map(str, epochs))
        mean = statistics.mean(epochs[-1] for epochs in counts.values())
        table.add_row(order, "", "", "", "", "", "", f"{mean:.1f}", str(reference))
        table.add_section()
    Console(highlight=False).print(table)


if __name__ == "__main__":
    with report_errors():
        main()
