"""Tutorial T2: a feed-forward network learns MNIST, each epoch one compiled program."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxtrain as jt
from jaxtrain._arguments import check_integer
from jaxtrain.cli import command, devices, flags, plots, resuming, runs, tables
from jaxtrain.cli.tables import Comparison
from jaxtrain.training.sources import num_steps

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}

# Epochs and learning rate of each data set. Those of MNIST are the tutorial's; on digits (1,437
# training images, 23 steps per epoch) they would end near chance.
DEFAULTS = {
    "mnist": (5, 0.01),
    "fashion_mnist": (5, 0.01),
    "kmnist": (5, 0.01),
    "digits": (60, 0.05),
}

IMAGES_SHOWN, MISTAKES_SHOWN = 30, 20

# PyTorch 2.13's test accuracy after each epoch, shuffled and in stored order: the middle of the
# range over five seeds, which lies within TOLERANCES of it.
REFERENCE = {
    True: (0.8641, 0.9114, 0.9277, 0.93975, 0.94815),
    False: (0.85865, 0.9090, 0.92745, 0.93955, 0.94795),
}
REFERENCE_LOSS = 0.17  # after the fifth: 0.166 to 0.174
TOLERANCES = (0.012, 0.006, 0.006, 0.005, 0.004)
LOSS_TOLERANCE = 0.008


@dataclass(frozen=True)
class Config(flags.DatasetFlags, flags.TrainingFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/mnist")
    epochs: int | None = None
    """Passes over the training data; None means 5, or 60 on digits."""
    batch_size: int = 64
    """Training examples per step."""
    test_batch_size: int = 1000
    """Test examples at a time."""
    learning_rate: float | None = None
    """None means 0.01 (0.05 on digits) for sgd, and torch.optim's default for other optimizers."""
    find_learning_rate: bool = False
    """Take the learning rate that a range test suggests, and draw the test."""
    weight_decay: float | None = None
    """Weight decay, as in torch.optim; None means 1e-6, or 0 for rprop and lbfgs."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    optimizer: flags.OptimizerName = "sgd"
    """The optimizer, as in torch.optim."""
    validation: float = 0.0
    """Fraction of the training data held out for validation, evaluated after every epoch."""
    patience: int | None = None
    """Stop after this many epochs without a better validation loss; keep the best parameters."""
    gamma: float | None = None
    """Multiply the learning rate by this after every epoch (StepLR); None leaves it constant."""
    dropout: float = 0.2
    """Fraction of hidden units dropped in training."""
    seed: int = 42
    """Seed of the initial parameters, the order of examples and the dropout."""
    devices: int = 1
    """Divide each batch over this many devices; without GPUs, parts of the processor."""
    shuffle: bool = True
    """Shuffle the examples every epoch; else use their stored order."""
    log_interval: int = 100
    profile: Path | None = None
    """Trace some steps into this folder, for Perfetto and TensorBoard."""


def run(config: Config) -> dict[str, Any]:
    """Trains the T2 network (784-256-128-64-10, ReLU, dropout) and tests it after each epoch."""
    if config.patience is not None and not config.validation:
        raise jt.errors.InputError(
            f"--patience is {config.patience} without validation data; expected --validation 0.1, "
            "for example"
        )
    if config.find_learning_rate and config.learning_rate is not None:
        raise jt.errors.InputError(
            f"--learning-rate is {config.learning_rate} with --find-learning-rate; expected one of "
            "the two"
        )
    with command.run_folder(config) as folder:
        data = command.load_images(config)
        config = with_defaults(config, data.name)
        start = make_start(config, data)
        found = None
        if config.find_learning_rate:
            found = find_learning_rate(config, start)
            # Two digits, so that --learning-rate with the printed rate repeats the run.
            config = replace(config, learning_rate=float(f"{found.suggestion:.2g}"))
            optimizer = make_optimizer(config, len(start.train_data))
            start = start._replace(state=jt.with_optimizer(start.state, optimizer))
        folder.config = config
        state, history = train(config, data, start, folder)

        if found is not None:
            folder.write_picture("range_test.png", found.plot())
            columns = {"learning_rate": found.rates, "loss": found.losses}
            folder.write_table("range_test.csv", columns)
        logits = jt.predict(state, data.test.inputs, batch_size=config.test_batch_size)
        folder.write_model(state)
        write_pictures(folder, data, history, logits)
        comparisons = compare(config, data, history)
        kept = kept_epoch(config, history)
        summary = folder.write_summary(
            experiment="mnist",
            dataset=data.name,
            notice=data.notice,
            epochs=len(history["epoch"]),
            seed=config.seed,
            learning_rate=config.learning_rate,
            train_loss=None if kept is None else history["train_loss"][kept],
            **({} if config.patience is None or kept is None else {"best_epoch": kept + 1}),
            test_loss=LOSS(logits, data.test.targets).mean().item(),
            test_accuracy=METRICS["accuracy"](logits, data.test.targets).mean().item(),
            figures=comparisons,
        )
    print_result(data, summary)
    tables.print_comparisons(
        "T2: PyTorch's figures, middle of five seeds", comparisons, config.output_dir
    )
    return summary


def kept_epoch(config: Config, history: jt.History) -> int | None:
    """Returns the index of the epoch that is kept: the best with --patience, else the last."""
    if not len(history["epoch"]):
        return None
    if config.patience is not None:
        return int(history["validation_loss"].argmin())
    return len(history["epoch"]) - 1


def with_defaults(config: Config, dataset: str) -> Config:
    """Returns the configuration with the data set's defaults for flags that are None."""
    epochs, learning_rate = DEFAULTS[dataset]
    if config.optimizer != "sgd":  # torch.optim's default
        signature = inspect.signature(getattr(jt.optimizers, config.optimizer))
        learning_rate = signature.parameters["learning_rate"].default
    if config.optimizer == "lbfgs" and config.dropout:
        raise jt.errors.InputError(
            f"--dropout is {config.dropout} with --optimizer lbfgs; expected --dropout 0, since "
            "its line search compares losses of the same function"
        )
    weight_decay = 0.0 if config.optimizer in ("rprop", "lbfgs") else 1e-6
    return replace(
        config,
        epochs=epochs if config.epochs is None else config.epochs,
        learning_rate=learning_rate if config.learning_rate is None else config.learning_rate,
        weight_decay=weight_decay if config.weight_decay is None else config.weight_decay,
    )


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      state: the initial state, with the optimizer of the flags.
      train_data: the training data.
      validation_data: the held-out part of the training data, or None.
      shuffle_key: PRNG key of the shuffle, or None for the stored order.
    """

    state: jt.TrainState
    train_data: jt.Dataset
    validation_data: jt.Dataset | None
    shuffle_key: jax.Array | None


def make_start(config: Config, data: jt.data.Resolved) -> Start:
    """Returns the state and the data of a run; the configuration has its defaults filled in."""
    mean, std = jt.data.STATISTICS[data.name]
    model = jt.models.FeedForward(dropout_rate=config.dropout, mean=mean, std=std)
    key = flags.seed_key(config.seed)
    init_key, shuffle_key = jax.random.split(key)
    train_data, validation_data = data.train, None
    if config.validation:
        train_data, validation_data = data.train.split(
            config.validation, jax.random.fold_in(key, 2)
        )
    optimizer = make_optimizer(config, len(train_data))
    state = jt.init_state(model, optimizer, train_data.inputs[:1], key=init_key)
    return Start(state, train_data, validation_data, shuffle_key if config.shuffle else None)


def find_learning_rate(config: Config, start: Start) -> jt.RangeTest:
    """Returns the range test of the learning rate, with the optimizer of the flags."""
    return jt.find_learning_rate(
        start.state,
        start.train_data,
        functools.partial(make_optimizer, config, len(start.train_data)),
        loss_fn=LOSS,
        batch_size=config.batch_size,
        key=start.shuffle_key,
    )


def train(
    config: Config, data: jt.data.Resolved, start: Start, folder: runs.RunFolder
) -> tuple[jt.TrainState, jt.History]:
    """Trains the network on the data."""
    assert config.epochs is not None
    callbacks: list[jt.callbacks.Callback] = []
    if config.patience is not None:
        callbacks.append(jt.callbacks.early_stopping(config.patience))
    if config.profile is not None:
        callbacks.append(jt.callbacks.profile(config.profile))
    return jt.fit(
        start.state,
        start.train_data,
        data.test,
        validation=start.validation_data,
        loss_fn=LOSS,
        metric_fns=METRICS,
        epochs=config.epochs,
        batch_size=config.batch_size,
        test_batch_size=config.test_batch_size,
        key=start.shuffle_key,
        callbacks=[
            *callbacks,
            *command.reporting(folder, config.log_interval),
            *resuming.checkpoint_callbacks(config, dataset=data.name),
        ],
        mesh=devices.make_mesh(config.devices),
    )


def make_optimizer(config: Config, examples: int, rate: Any = None) -> optax.GradientTransformation:
    """Returns the optimizer that the flags describe, at another learning rate if one is given."""
    assert config.learning_rate is not None
    if rate is None:
        rate = config.learning_rate
        if config.gamma is not None:
            check_integer(config.batch_size, "batch_size", minimum=1)
            steps = num_steps(examples, config.batch_size)
            rate = jt.optimizers.step_lr(rate, 1, config.gamma, steps_per_epoch=steps)
    optimizer = jt.optimizers.make(
        config.optimizer, rate, weight_decay=config.weight_decay, momentum=config.momentum
    )
    return flags.with_safeguards(optimizer, config.safety)


def write_pictures(
    folder: runs.RunFolder, data: jt.data.Resolved, history: jt.History, logits: jax.Array
) -> None:
    """Draws the learning curves, predictions, mistakes and the confusion matrix."""
    title = f"{data.name}: {len(data.test.targets)} test images"
    images, labels = np.asarray(data.test.inputs), np.asarray(data.test.targets)
    predicted = np.asarray(logits.argmax(axis=-1))
    mistakes = np.flatnonzero(predicted != labels)[:MISTAKES_SHOWN]
    groups = [("the first test images: predicted class", np.arange(min(IMAGES_SHOWN, len(labels))))]
    if len(mistakes):
        groups.append(("the first mistakes: ✗ predicted class, true class", mistakes))
    if len(history["epoch"]):
        folder.write_picture("learning_curves.png", plots.learning_curves(history, data.name))
    if "validation_loss" in history and len(history["epoch"]):
        folder.write_picture("overfitting.png", plots.generalization_gap(history, data.name))
    folder.write_picture(
        "predictions.png",
        plots.prediction_grid(
            [(heading, images[at], labels[at], predicted[at]) for heading, at in groups]
        ),
    )
    sums, finish = jt.metrics.confusion_matrix
    counts = np.asarray(finish(sums(logits, data.test.targets))).astype(int)
    folder.write_picture("confusion_matrix.png", plots.confusion_matrix(counts, title))


def compare(config: Config, data: jt.data.Resolved, history: jt.History) -> list[Comparison]:
    """Returns PyTorch's figures beside ours; none on other data or with other flags."""
    names = [
        *("epochs", "batch_size", "learning_rate", "weight_decay", "momentum", "optimizer"),
        *("validation", "patience", "gamma", "dropout"),
    ]
    tutorial = with_defaults(Config(), "mnist")
    if data.name != "mnist" or not flags.has_defaults(config, *names, defaults=tutorial):
        return []
    order = "shuffled" if config.shuffle else "stored order"
    rows = [
        Comparison(f"{order}, epoch {epoch}: test accuracy", original, float(ours), tolerance)
        for epoch, (original, ours, tolerance) in enumerate(
            zip(REFERENCE[config.shuffle], history["test_accuracy"], TOLERANCES, strict=True), 1
        )
    ]
    loss = float(history["test_loss"][-1])
    return [*rows, Comparison(f"{order}, test loss", REFERENCE_LOSS, loss, LOSS_TOLERANCE)]


def print_result(data: jt.data.Resolved, summary: dict[str, Any]) -> None:
    """Prints the result."""
    tables.print_table(
        "T2: a feed-forward network",
        {
            "data set": data.name + ("" if data.notice is None else " (this is not MNIST)"),
            "epochs": str(summary["epochs"])
            + (f", best {summary['best_epoch']}" if "best_epoch" in summary else ""),
            "learning rate": f"{summary['learning_rate']:g}"
            + (", from the range test" if "range_test.png" in summary["pictures"] else ""),
            "test loss": f"{summary['test_loss']:.4f}",
            "test accuracy": tables.accuracy_text(summary["test_accuracy"], len(data.test)),
            "compiling": f"{summary['compile_seconds']:.1f} s",
            "training": f"{summary['train_seconds']:.1f} s on {summary['device']}",
        },
    )


if __name__ == "__main__":
    command.main(Config, run)
