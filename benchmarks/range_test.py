"""Compares the learning rate of a range test with 20 rates of a sweep, for T2 on MNIST.

    python -m benchmarks.range_test [--data-dir FOLDER] [--picture FILE]

Prints, for SGD and Adam, the test accuracy after 5 epochs at the suggested rate and at the best of
the 20 rates, and draws the accuracies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.cli import command  # isort: skip  # first: reports missing extras

import jax
import numpy as np

import jaxtrain as jt
from jaxtrain._files import make_folder
from jaxtrain.cli import plots

LOSS = jt.losses.cross_entropy
EPOCHS = 5
# Each range extends beyond the useful rates of T2 on both sides.
OPTIMIZERS = {
    "SGD": (jt.optimizers.sgd, np.geomspace(1e-3, 2, 20)),
    "Adam": (jt.optimizers.adam, np.geomspace(1e-5, 3e-2, 20)),
}


@dataclass(frozen=True)
class Config:
    """Flags of the comparison."""

    data_dir: Path | None = None
    """Folder of the MNIST files; None tries $JAXTRAIN_DATA_DIR, the cache, then a download."""
    picture: Path = Path("runs/benchmarks/range_test.png")
    """File of the picture."""


class Compared(NamedTuple):
    """The range test of one optimizer, and accuracies after training.

    Attributes:
      test: the range test.
      rates: 20 rates, and the suggested one at the end.
      accuracies: the test accuracy after 5 epochs at each of them.
    """

    test: jt.RangeTest
    rates: np.ndarray
    accuracies: np.ndarray


def run(config: Config) -> dict[str, Compared]:
    """Compares the learning rate of a range test with the rates of a sweep, for T2 on MNIST."""
    data = jt.data.load_resolved("mnist", config.data_dir)
    make_folder(config.picture.parent, "folder of the picture")
    found = {}
    for name, (make_optimizer, rates) in OPTIMIZERS.items():
        found[name] = each = compare(data, make_optimizer, rates)
        best = int(np.argmax(each.accuracies[:-1]))
        print(
            f"{name}: {each.accuracies[-1]:.2%} at the suggested rate {each.rates[-1]:.2g}; "
            f"{each.accuracies[best]:.2%} at the best of 20 rates, {each.rates[best]:.2g}"
        )
    draw(found).savefig(config.picture, dpi=120)
    print(f"picture: {config.picture}")
    return found


def compare(data: jt.data.Resolved, make_optimizer: Any, rates: np.ndarray) -> Compared:
    """Runs the range test, and trains at its suggestion and at all rates."""
    mean, std = jt.data.STATISTICS["mnist"]
    model = jt.models.FeedForward(mean=mean, std=std)
    init_key, shuffle_key = jax.random.split(jax.random.key(42))
    inputs = data.train.inputs[:1]
    state = jt.init_state(model, make_optimizer(0.1), inputs, key=init_key)
    test = jt.find_learning_rate(state, data.train, make_optimizer, loss_fn=LOSS, key=shuffle_key)

    def train(learning_rate: jax.Array) -> dict[str, jax.Array]:
        return jt.train(
            jt.with_optimizer(state, make_optimizer(learning_rate)),
            data.train,
            data.test,
            loss_fn=LOSS,
            metric_fns={"accuracy": jt.metrics.accuracy},
            epochs=EPOCHS,
            key=shuffle_key,
        )[1]

    rates = np.append(rates, test.suggestion)
    result = jt.sweep(train, {"learning_rate": rates.tolist()}, at_once=1, callbacks=[])
    return Compared(test, rates, result.final("test_accuracy"))


def draw(found: dict[str, Compared]) -> plots.Figure:
    """Draws, for each optimizer, the losses of the range test above the accuracies."""
    figure = plots.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, len(found), sharex="col")
    for (name, each), (above, below) in zip(found.items(), axes.T, strict=True):
        above.plot(each.test.rates, each.test.smoothed_losses, color=plots.BLUE)
        above.set(xscale="log", ylim=(0, 3), title=name)
        below.plot(each.rates[:-1], each.accuracies[:-1], "o-", color=plots.BLUE, markersize=4)
        for ax in (above, below):
            ax.axvline(each.rates[-1], color=plots.VERMILION, linestyle="--")
        below.plot(each.rates[-1], each.accuracies[-1], "D", color=plots.VERMILION)
        below.set_ylim(0.8, 1)
        below.yaxis.set_major_formatter("{x:.0%}")
        plots.label_axes(above, "", "loss of the range test")
        plots.label_axes(below, "learning rate", f"test accuracy, {EPOCHS} epochs")
    figure.suptitle("T2 on MNIST: the rate that a range test suggests (dashed), and a sweep")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
