"""Trains the T2 network at several learning rates and seeds: a table, and a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jaxtrain as jt
from jaxtrain.cli import command, flags, runs, tables

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}
EPOCHS = {"digits": 20}  # 3 on larger data sets
COLUMNS = ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Config(flags.DatasetFlags, flags.ExperimentFlags):
    """Flags of this experiment."""

    output_dir: Path = Path("runs/sweep")
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD."""
    seeds: int = 3
    """Number of runs at each rate, with the seeds 0, 1, …."""
    epochs: int | None = None
    """Passes over the training images; None means 3, or 20 on digits."""
    batch_size: int = 64
    """Examples per step."""
    at_once: int | None = None
    """Runs to train at once; None finds out how many pay off."""
    checkpoint_dir: Path | None = None
    """Keep finished runs here; the same command then resumes after an interruption."""


def run(config: Config) -> dict[str, Any]:
    """Trains the T2 network (784-256-128-64-10) at each learning rate from several seeds."""
    flags.check(config, "seeds", minimum=1)
    flags.check_rates(config)
    if config.epochs is not None:
        flags.check(config, "epochs", minimum=1)
    with command.run_folder(config) as folder:
        data = command.load_images(config)
        result = sweep(config, data, folder)
        result.to_csv(folder.path / "history.csv")
        result.save(folder.path / "sweep.safetensors")
        table = result.table(COLUMNS, over="seed")
        best = result.best("validation_loss")  # an error if all runs have diverged
        assert best.state is not None
        folder.write_model(best.state)
        folder.write_picture("heat_map.png", result.heat_map("test_accuracy", x="seed"))
        folder.write_picture(
            "learning_rates.png", result.line_plot("test_accuracy", x="learning_rate", over="seed")
        )
        summary = folder.write_summary(
            "sweep",
            dataset=data.name,
            notice=data.notice,
            epochs=len(best.history["epoch"]),
            **best.configuration,
            train_loss=best.history["train_loss"][-1],
            test_loss=best.history["test_loss"][-1],
            test_accuracy=best.history["test_accuracy"][-1],
            runs=len(result.configurations),
            table=table.frame.to_dict("records"),
        )
        print(f"T2 on {data.name}, {summary['epochs']} epochs, mean ± deviation over seeds:")
        print(table)
        rows = {
            "learning rate": f"{best.configuration['learning_rate']:g}",
            "seed": str(best.configuration["seed"]),
            "test accuracy": tables.accuracy_text(summary["test_accuracy"], len(data.test)),
        }
        tables.print_table("best by validation loss", rows)
    return summary


def sweep(config: Config, data: jt.data.Resolved, folder: runs.RunFolder) -> jt.sweeps.SweepResult:
    """Trains all runs; a tenth of the training images is held out for validation."""
    mean, std = jt.data.STATISTICS[data.name]
    model = jt.models.FeedForward(mean=mean, std=std)
    train_data, validation_data = data.train.split(0.1, jax.random.key(0))
    epochs = EPOCHS.get(data.name, 3) if config.epochs is None else config.epochs

    def run(learning_rate: jax.Array, seed: jax.Array) -> tuple[jt.TrainState, dict]:
        init_key, shuffle_key = jax.random.split(jax.random.key(seed))
        optimizer = jt.optimizers.sgd(learning_rate, weight_decay=1e-6)
        state = jt.init_state(model, optimizer, train_data.inputs[:1], key=init_key)
        return jt.train(
            state,
            train_data,
            data.test,
            validation=validation_data,
            loss_fn=LOSS,
            metric_fns=METRICS,
            epochs=epochs,
            batch_size=config.batch_size,
            key=shuffle_key,
        )

    return jt.sweep(
        run,
        {"learning_rate": config.learning_rates, "seed": range(config.seeds)},
        at_once="auto" if config.at_once is None else config.at_once,
        checkpoint=config.checkpoint_dir,
        callbacks=[*folder.callbacks(), jt.callbacks.progress(1)],
    )


if __name__ == "__main__":
    command.main(Config, run)
