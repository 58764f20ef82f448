"""Tutorial T1: a line is fitted by gradient descent on the mean absolute error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

import jaxtrain as jt
from jaxtrain import command, plots, progress, runs
from jaxtrain.checks import check_whole
from jaxtrain.fit import EpochDone, Event, History

LOSS = jt.losses.mean_absolute_error

# The line behind the data, and what torch.randn(1) gives twice after torch.manual_seed(42).
WEIGHT, BIAS = 0.7, 0.3
PUBLISHED_WEIGHT, PUBLISHED_BIAS = 0.33669036626815796, 0.12880940735340118


@dataclass(frozen=True)
class Config:
    """Flags of this experiment; the defaults are the tutorial's."""

    epochs: int = 200
    """Steps of gradient descent, each on all training points."""
    learning_rate: float = 0.01
    """Factor of the gradient in each step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """The solver, as in torch.optim."""
    start: Literal["published", "random"] = "published"
    """published: the tutorial's weight and bias. random: a normal draw from the seed."""
    seed: int = 42
    """Decides a random start."""
    device: command.Device = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    log_interval: int = 10
    """A line every so many epochs; 0 is quiet."""
    output_dir: Path = Path("runs/linear_regression")
    """Where results go."""


def run(config: Config) -> dict[str, Any]:
    """Fit y = weight · x + bias to 40 points of y = 0.7 x + 0.3 and test it on the next 10."""
    command.select_device(config.device)
    with runs.RunFolder(config.output_dir, config) as folder:
        train_data, test_data = jt.data.line(WEIGHT, BIAS)
        before, after, history = train(config, train_data, test_data, folder)
        final = jt.evaluate(after, test_data, LOSS)
        write_pictures(folder, train_data, test_data, before, after, history)
        summary = folder.write_summary(
            experiment="linear_regression",
            dataset="line",
            epochs=len(history["epoch"]),
            seed=config.seed,
            train_loss=history["train_loss"][-1] if len(history["epoch"]) else None,
            test_loss=float(final["loss"]),
            weight=after.params["weight"].item(),
            bias=after.params["bias"].item(),
        )
    print_table(config, summary)
    return summary


def train(
    config: Config, train_data: jt.Dataset, test_data: jt.Dataset, folder: runs.RunFolder
) -> tuple[jt.TrainState, jt.TrainState, History]:
    """Fit the line; returns the state before and after, and the history."""
    optimizer = jt.optimizers.OPTIMIZERS[config.optimizer](config.learning_rate)
    before = jt.init_state(
        jt.models.LinearRegression(),
        optimizer,
        train_data.inputs[:1],
        key=command.seed_key(config.seed),
    )
    if config.start == "published":
        start = {"weight": jnp.array([[PUBLISHED_WEIGHT]]), "bias": jnp.array([PUBLISHED_BIAS])}
        before = before.replace(params=start)

    check_whole(config.log_interval, "log_interval", least=0)
    with progress.console(
        log_interval=config.log_interval, epoch_interval=config.log_interval
    ) as show:

        def report(event: Event) -> None:
            if isinstance(event, EpochDone):
                params = event.state.params
                folder.record(event, weight=params["weight"].item(), bias=params["bias"].item())
            else:
                folder.record(event)
            show(event)

        after, history = jt.fit(
            before,
            train_data,
            test_data,
            loss_fn=LOSS,
            epochs=config.epochs,
            batch_size=train_data.num_examples,
            log_interval=0,
            report=report,
        )
    return before, after, history


def write_pictures(
    folder: runs.RunFolder,
    train_data: jt.Dataset,
    test_data: jt.Dataset,
    before: jt.TrainState,
    after: jt.TrainState,
    history: History,
) -> None:
    """Draw the loss curves, and the data with the line before and after training."""
    inputs = jnp.concatenate([train_data.inputs, test_data.inputs])
    if len(history["epoch"]):
        curves = plots.learning_curves(history, "linear regression: mean absolute error")
        folder.write_picture("learning_curves.png", curves)
    folder.write_picture(
        "fit.png",
        plots.line_fit(
            train_data,
            test_data,
            before=jt.predict(before, inputs),
            after=jt.predict(after, inputs),
            title=f"y = {WEIGHT:g} x + {BIAS:g}, fitted",
        ),
    )


def print_table(config: Config, summary: dict[str, Any]) -> None:
    """Print the result beside the tutorial's, and where it lies."""
    train_loss = summary["train_loss"]
    command.print_summary(
        "T1: linear regression",
        {
            "epochs": str(summary["epochs"]),
            "train loss (MAE)": "none" if train_loss is None else f"{train_loss:.7f}",
            "test loss (MAE)": f"{summary['test_loss']:.7f}",
            "weight": f"{summary['weight']:.4f}, true {WEIGHT:g}",
            "bias": f"{summary['bias']:.4f}, true {BIAS:g}",
            "the original, 200 epochs": "weight 0.6990, bias 0.3093",
            "compiling": f"{summary['compile_seconds']:.1f} s",
            "training": f"{summary['train_seconds']:.2f} s on {summary['device']}",
        },
        config.output_dir,
    )


if __name__ == "__main__":
    command.main(Config, run)
