"""Compares the test accuracy of T2 on MNIST over five seeds with PyTorch's, shuffled and not.

python -m benchmarks.accuracy [--data-dir FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import jaxtrain as jt
from benchmarks import torch_reference
from benchmarks.problem import MEAN, PIXELS, STD
from experiments import mnist
from jaxtrain.cli.command import report_errors
from jaxtrain.cli.runs import RunFolder

SEEDS = (42, 1, 2, 3, 4)
EPOCHS = 5


def jaxtrain_correct(data: jt.data.Resolved, seed: int, shuffle: bool) -> list[int]:
    """Returns the number of correct test predictions after each of T2's five epochs."""
    with tempfile.TemporaryDirectory() as scratch:
        config = mnist.Config(seed=seed, shuffle=shuffle, epochs=EPOCHS, log_interval=0)
        config = mnist.with_defaults(config, data.name)
        _, history = mnist.train(config, data, RunFolder(scratch, config))
    return [round(accuracy * len(data.test)) for accuracy in history["test_accuracy"]]


def pytorch_correct(data: jt.data.Resolved, seed: int, shuffle: bool) -> list[int]:
    """Returns those of the tutorial's network and loop in PyTorch."""
    torch.manual_seed(seed)
    tensors = [
        (
            torch_reference.normalised(np.asarray(part.inputs), MEAN, STD),
            torch.from_numpy(np.asarray(part.targets).astype(np.int64)),
        )
        for part in (data.train, data.test)
    ]
    (inputs, targets), (test_inputs, test_targets) = tensors
    model = torch_reference.feed_forward((256, 128, 64, 10), PIXELS, 0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=1e-6)
    counts = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs)) if shuffle else None
        batches = torch_reference.slices(inputs, targets, 64, order)
        torch_reference.train_steps(model, optimizer, batches, cross_entropy)
        model.eval()
        with torch.inference_mode():
            counts.append(int((model(test_inputs).argmax(1) == test_targets).sum()))
    return counts


def main() -> None:
    """Trains with each library, order and seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    arguments = parser.parse_args()
    data = jt.data.load_resolved("mnist", arguments.data_dir)
    table = Table(title="correct predictions of 10,000", title_justify="left")
    for heading in ("library", "order", "seed", "epoch 1", "2", "3", "4", "5"):
        table.add_column(heading, justify="right")
    for library, correct in (("jaxtrain", jaxtrain_correct), ("PyTorch", pytorch_correct)):
        for order in ("shuffled", "stored"):
            counts = {seed: correct(data, seed, order == "shuffled") for seed in SEEDS}
            for seed, epochs in counts.items():
                table.add_row(library, order, str(seed), *map(str, epochs))
            last = [epochs[-1] for epochs in counts.values()]
            spread = f"{statistics.mean(last):.0f} ± {statistics.stdev(last):.0f}"
            table.add_row(library, order, "all", "", "", "", "", spread)
            table.add_section()
    Console(highlight=False).print(table)


if __name__ == "__main__":
    with report_errors():
        main()
