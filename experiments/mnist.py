"""Tutorial T2: a feed-forward network learns MNIST, each epoch one compiled program."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

import jaxtrain as jt
from jaxtrain.cli import command, devices, flags, plots, tables
from jaxtrain.cli.tables import Comparison

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}
# PyTorch 2.13's test accuracy after each epoch, shuffled and in stored order: the middle of the
# range over five seeds, which lies within the tolerances of it; and its test loss, 0.166 to 0.174.
REFERENCE = {
    True: (0.8641, 0.9114, 0.9277, 0.93975, 0.94815),
    False: (0.85865, 0.9090, 0.92745, 0.93955, 0.94795),
}
TOLERANCES = (0.012, 0.006, 0.006, 0.005, 0.004)
REFERENCE_LOSS, LOSS_TOLERANCE = 0.17, 0.008


@dataclass(frozen=True)
class Config(flags.DatasetFlags, flags.OptimizerFlags, flags.TrainingFlags):
    """Flags of this experiment; the defaults are the tutorial's."""

    output_dir: Path = Path("runs/mnist")
    epochs: int | None = None
    """Passes over the training data; None means 5, or 60 on digits."""
    batch_size: int = 64
    """Training examples per step."""
    find_learning_rate: bool = False
    """Take the learning rate that a range test suggests, and draw the test."""
    validation: float = 0.0
    """Fraction of the training data held out for validation, evaluated after every epoch."""
    patience: int | None = None
    """Stop after this many epochs without a better validation loss; keep the best parameters."""
    dropout: float = 0.2
    """Fraction of hidden units dropped in training."""
    seed: int = 42
    """Seed of the initial parameters, the order of examples and the dropout."""
    devices: int = 1
    """Divide each batch over this many devices; without GPUs, parts of the processor."""
    shuffle: bool = True
    """Shuffle the examples every epoch; else use their stored order."""
    log_interval: int = 100


def run(config: Config) -> dict[str, Any]:
    """Trains the T2 network (784-256-128-64-10, ReLU, dropout) and tests it after each epoch."""
    with command.run_folder(config) as folder:
        data = command.load_images(config)
        config = folder.config = with_defaults(config, data.name)
        key = flags.seed_key(config.seed)
        init_key, shuffle_key = jax.random.split(key)
        train, validation = data.train, None
        if config.validation:
            train, validation = train.split(config.validation, jax.random.fold_in(key, 2))
        order = shuffle_key if config.shuffle else None
        steps: dict[str, Any] = {"loss_fn": LOSS, "batch_size": config.batch_size, "key": order}

        mean, std = jt.data.STATISTICS[data.name]
        model = jt.models.FeedForward(dropout_rate=config.dropout, mean=mean, std=std)
        optimizer = functools.partial(flags.make_optimizer, config, len(train))
        state = jt.init_state(model, optimizer(), train.inputs[:1], key=init_key)
        if config.find_learning_rate:
            found = jt.find_learning_rate(state, train, optimizer, **steps)
            # Two digits, so that --learning-rate with the printed rate repeats the run.
            config = folder.config = replace(config, learning_rate=float(f"{found.suggestion:.2g}"))
            state = jt.with_optimizer(state, flags.make_optimizer(config, len(train)))

        stopping = [] if config.patience is None else [jt.callbacks.early_stopping(config.patience)]
        progress = jt.callbacks.progress(config.log_interval)
        assert config.epochs is not None
        command.verify_step(config, state, train[: config.batch_size], LOSS)
        state, history = jt.fit(
            state,
            train,
            data.test,
            validation=validation,
            metric_fns=METRICS,
            epochs=config.epochs,
            callbacks=[*stopping, *folder.callbacks(known={"dataset": data.name}), progress],
            mesh=devices.make_mesh(config.devices),
            **steps,
        )

        folder.write_model(state)
        logits = jt.predict(state, data.test.inputs)
        pictures = plots.of_classifier(data.name, history, data.test, logits)
        if config.find_learning_rate:
            pictures["range_test.png"] = found.plot()
        for name, picture in pictures.items():
            folder.write_picture(name, picture)
        kept = -1 if config.patience is None else int(history["validation_loss"].argmin())
        figures = compare(config, data.name, history)
        summary = folder.write_summary(
            "mnist",
            dataset=data.name,
            notice=data.notice,
            epochs=len(history["epoch"]),
            seed=config.seed,
            learning_rate=config.learning_rate,
            train_loss=history["train_loss"][kept],
            test_loss=float(history["test_loss"][kept]),
            test_accuracy=float(history["test_accuracy"][kept]),
            figures=figures,
        )
        rows = {
            "data set": data.name + ("" if data.notice is None else " (this is not MNIST)"),
            "learning rate": f"{config.learning_rate:g}",
            "test loss": f"{summary['test_loss']:.4f}",
            "test accuracy": tables.accuracy_text(summary["test_accuracy"], len(data.test)),
        }
        tables.print_table("T2: a feed-forward network", rows | tables.times(summary))
        tables.print_comparisons("T2: PyTorch's figures, middle of five seeds", figures)
    return summary


def with_defaults(config: Config, dataset: str) -> Config:
    """Returns the flags with the defaults of the data set; MNIST's would not suffice on digits."""
    epochs, rate = (60, 0.05) if dataset == "digits" else (5, 0.01)
    config = replace(config, epochs=epochs if config.epochs is None else config.epochs)
    flags.check(config, "epochs", minimum=1)
    return flags.with_optimizer_defaults(config, rate)


def compare(config: Config, dataset: str, history: jt.History) -> list[Comparison]:
    """Returns PyTorch's figures beside ours; none on other data or with other flags."""
    names = ["epochs", "batch_size", "learning_rate", "weight_decay", "momentum", "optimizer"]
    names += ["validation", "patience", "gamma", "dropout"]
    defaults = with_defaults(Config(), "mnist")
    if dataset != "mnist" or not flags.has_defaults(config, *names, defaults=defaults):
        return []
    order = "shuffled" if config.shuffle else "stored order"
    epochs = zip(REFERENCE[config.shuffle], history["test_accuracy"], TOLERANCES, strict=True)
    rows = [
        Comparison(f"{order}, epoch {epoch}: test accuracy", original, float(ours), tolerance)
        for epoch, (original, ours, tolerance) in enumerate(epochs, 1)
    ]
    loss = float(history["test_loss"][-1])
    return [*rows, Comparison(f"{order}, test loss", REFERENCE_LOSS, loss, LOSS_TOLERANCE)]


if __name__ == "__main__":
    command.main(Config, run)
