"""Compares the test accuracy of T2 on MNIST over five seeds with PyTorch's, and with bfloat16's.

python -m benchmarks.accuracy [--data-dir FOLDER]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

import jaxtrain as jt
from benchmarks import torch_reference
from benchmarks.problem import MEAN, PIXELS, STD
from jaxtrain.cli.command import report_errors

SEEDS = (42, 1, 2, 3, 4)
ORDERS = ("shuffled", "stored")
EPOCHS = 5


def jaxtrain_correct(
    data: jt.data.Resolved, precision: Literal["float32", "bfloat16"] = "float32"
) -> np.ndarray:
    """Returns the numbers of correct test predictions [orders, seeds, epochs]."""
    model: Any = jt.models.FeedForward(mean=MEAN, std=STD)
    if precision == "bfloat16":
        model = jt.mixed_precision(model, precision)
    optimizer = jt.optimizers.sgd(0.01, weight_decay=1e-6)

    def run(order: str, seed: jax.Array) -> tuple[jt.TrainState, dict[str, jax.Array]]:
        init_key, shuffle_key = jax.random.split(jax.random.key(seed))
        return jt.train(
            jt.init_state(model, optimizer, data.train.inputs[:1], key=init_key),
            data.train,
            data.test,
            loss_fn=jt.losses.cross_entropy,
            metric_fns={"accuracy": jt.metrics.accuracy},
            epochs=EPOCHS,
            key=shuffle_key if order == "shuffled" else None,
        )

    result = jt.sweep(run, {"order": ORDERS, "seed": SEEDS})
    return np.rint(result["test_accuracy"] * len(data.test)).astype(int)


def pytorch_correct(data: jt.data.Resolved) -> np.ndarray:
    """Returns those of the tutorial's network and loop in PyTorch."""
    return np.array([[_pytorch_run(data, order, seed) for seed in SEEDS] for order in ORDERS])


def _pytorch_run(data: jt.data.Resolved, order_name: str, seed: int) -> list[int]:
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
        order = torch.randperm(len(inputs)) if order_name == "shuffled" else None
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
    correct_by_library: dict[str, Callable[[jt.data.Resolved], np.ndarray]] = {
        "jaxtrain": jaxtrain_correct,
        "jaxtrain, bfloat16": functools.partial(jaxtrain_correct, precision="bfloat16"),
        "PyTorch": pytorch_correct,
    }
    for library, correct in correct_by_library.items():
        for order, counts in zip(ORDERS, correct(data), strict=True):
            for seed, epochs in zip(SEEDS, counts, strict=True):
                table.add_row(library, order, str(seed), *map(str, epochs))
            last = counts[:, -1]
            spread = f"{last.mean():.0f} ± {last.std(ddof=1):.0f}"
            table.add_row(library, order, "all", "", "", "", "", spread)
            table.add_section()
    Console(highlight=False, width=90).print(table)


if __name__ == "__main__":
    with report_errors():
        main()
