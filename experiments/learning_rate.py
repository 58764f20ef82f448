"""Tutorial T4: many learning rates at once, from too slow to diverging."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # until the flags are read, Ctrl-C ends the process at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jaxtrain as jt
from jaxtrain._arguments import check_integer
from jaxtrain._extras import needs_extra
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.cli.tables import Comparison
from jaxtrain.optimizers import Minimum, Stop

LOSS = jt.losses.squared_error_sum
RATES = (0.0003, 0.003, 0.01, 0.025, 0.04, 0.05)


@dataclass(frozen=True)
class Config(flags.ExperimentFlags):
    """Flags of this experiment; the tutorial's rate is 0.025."""

    output_dir: Path = Path("runs/learning_rate")
    learning_rates: tuple[float, ...] = RATES
    """Learning rates, all trained at once under vmap."""
    optimizer: flags.OptimizerName = "sgd"
    """The solver, as in torch.optim."""
    max_steps: int = 1000
    """Largest number of steps per rate."""
    threshold: float = 0.105
    """Stop when the sum of squared errors falls below this."""
    seed: int = 42
    """Seed of the data, 20 noisy points of y = 3 x + 1 with x in 0 … 1."""


def run(config: Config) -> dict[str, Any]:
    """Minimizes the sum of squared errors at each rate until a threshold, limit or divergence."""
    flags.check_seed(config.seed)
    check_integer(config.max_steps, "max_steps", minimum=1, maximum=10**6)
    if not 0 <= config.threshold <= 1e6:
        raise jt.errors.InputError(
            f"--threshold is {config.threshold}; expected a number from 0 to 1e6"
        )
    if not config.learning_rates:
        raise jt.errors.InputError(
            "--learning-rates is empty; expected at least one, such as 0.025"
        )
    for rate in config.learning_rates:
        jt.optimizers.make(config.optimizer, rate)  # checks the rate: under vmap it has no value
    with command.run_folder(config) as folder:
        data = jt.data.noisy_line(20, 3.0, 1.0, 0.08, seed=config.seed, width=1.0)
        result = descend(config, data)
        folder.start()
        rates = np.array(config.learning_rates)
        stops = [Stop(stop).message for stop in result.stop.tolist()]
        folder.write_table(
            "history.csv",
            {
                "learning_rate": rates,
                "steps": np.asarray(result.steps),
                "train_loss": np.asarray(result.loss),
                "stop": stops,
            },
        )
        folder.write_picture("learning_rates.png", draw(config, result))
        ours, theirs = logistic_regression(config.seed)
        comparisons = compare(config, result, ours, theirs)
        best = int(np.argmin(np.where(np.isfinite(result.loss), result.loss, np.inf)))
        summary = folder.write_summary(
            experiment="learning_rate",
            dataset="noisy_line",
            epochs=int(result.steps.max()),
            seed=config.seed,
            train_loss=result.loss[best],
            test_loss=None,
            weight=result.params["weight"][best].item(),
            bias=result.params["bias"][best].item(),
            learning_rates=list(config.learning_rates),
            stops=stops,
            figures=comparisons,
        )
    rows = {
        f"rate {rate:g}": f"{stop} after {steps} steps, loss {loss:.6g}"
        for rate, stop, steps, loss in zip(rates, stops, result.steps, result.loss, strict=True)
    }
    tables.print_table("T4: learning rates", rows)
    tables.print_comparisons("T4: figures", comparisons, config.output_dir)
    return summary


def descend(config: Config, data: jt.Dataset) -> Minimum:
    """Descends at all rates at once; each field of the result has a leading axis over them."""
    model = jt.models.LinearRegression()
    start = {"weight": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}

    def loss(params: Any) -> jax.Array:
        predictions: Any = model.apply({"params": params}, data.inputs)
        return LOSS(predictions, data.targets).sum()

    def one(learning_rate: ArrayLike) -> Minimum:
        return jt.minimize(
            loss,
            start,
            jt.optimizers.make(config.optimizer, learning_rate),
            max_steps=config.max_steps,
            loss_threshold=config.threshold,
        )

    rates = config.learning_rates
    result = jt.sweep(one, {"learning_rate": rates}, at_once=len(rates), callbacks=[])
    return result.outputs


def logistic_regression(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes the log loss of 200 points of two overlapping classes.

    Returns:
      (w₁, w₂, b) by L-BFGS here, and by `LogisticRegression(C=inf)`, which has no penalty.
    """
    with needs_extra("experiments"):
        from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(seed)
    inputs = random.normal(size=(200, 2)).astype(np.float32)
    noise = random.logistic(size=200)
    labels = (inputs @ np.array([1.5, -1.0]) + 0.5 + noise > 0).astype(np.float32)
    model = jt.models.LinearRegression()

    def log_loss(params: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, jnp.asarray(inputs))
        return jt.losses.sigmoid_binary_cross_entropy(logits, jnp.asarray(labels)[:, None]).mean()

    start = {"weight": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
    params = jax.jit(
        lambda params: jt.minimize(
            log_loss, params, jt.optimizers.lbfgs(), max_steps=100, gradient_tolerance=1e-6
        )
    )(start).params
    fitted = LogisticRegression(C=np.inf, tol=1e-8).fit(inputs, labels)
    ours = np.concatenate([np.ravel(params["weight"]), np.ravel(params["bias"])])
    return ours, np.concatenate([np.ravel(fitted.coef_), np.ravel(fitted.intercept_)])


def compare(
    config: Config, result: Minimum, ours: np.ndarray, theirs: np.ndarray
) -> list[Comparison]:
    """Returns the tutorial's figures, and scikit-learn's, beside ours."""
    params = {"w": jnp.zeros(())}
    updates, _ = jt.optimizers.sgd(0.01).update(
        {"w": jnp.array(2.5)}, jt.optimizers.sgd(0.01).init(params), params
    )
    rows = [Comparison("step of gradient 2.5 at rate 0.01", 0.025, -updates["w"].item(), 1e-8)]
    expected = flags.has_defaults(config, "optimizer", "max_steps", "threshold", "seed")
    if expected and 0.025 in config.learning_rates:
        at = config.learning_rates.index(0.025)
        converged = float(result.stop[at] == Stop.LOSS_THRESHOLD)
        rows.append(Comparison("rate 0.025 reaches the threshold (1: yes)", 1.0, converged, 0.0))
    names = ("w1", "w2", "b")
    return rows + [
        Comparison(f"log loss: {name}, scikit-learn's and ours", float(a), float(b), 1e-3)
        for name, a, b in zip(names, theirs, ours, strict=True)
    ]


def draw(config: Config, result: Minimum) -> plots.Figure:
    """Draws the loss of each rate against the step; a diverging one leaves the axes, dashed."""
    figure = plots.Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    colors = [plots.GREY, plots.SKY, plots.BLUE, plots.GREEN, plots.ORANGE, plots.VERMILION]
    markers = "osDv^P"
    ceiling = 10 * float(result.losses[0, 0])
    for index, rate in enumerate(config.learning_rates):
        losses = np.asarray(result.losses[index])
        shown = np.isfinite(losses)
        stop = Stop(int(result.stop[index]))
        diverges = stop == Stop.LOSS_NOT_FINITE or losses[shown][-1] > losses[0]
        outcome = "diverges" if diverges else f"{stop.message}, step {result.steps[index]}"
        ax.plot(
            np.flatnonzero(shown) + 1,
            losses[shown],
            color=colors[index % len(colors)],
            linestyle="--" if diverges else "-",
            marker=markers[index % len(markers)],
            markevery=(0.08, 0.17),
            markersize=5,
            label=f"rate {rate:g}: {outcome}",
        )
    ax.axhline(config.threshold, color="black", linewidth=0.8, linestyle=":")
    ax.annotate("threshold", (1.05, config.threshold * 1.08), fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(config.threshold / 2, ceiling)
    plots.label_axes(ax, "step + 1 (log scale)", "sum of squared errors (log scale)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle("T4: a small rate is slow, a large rate diverges")
    return figure


if __name__ == "__main__":
    command.main(Config, run)
