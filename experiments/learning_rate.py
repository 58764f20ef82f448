"""Tutorial T4: many learning rates at once, from too slow to diverging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import command, flags, plots, tables
from jaxtrain.optimizers import Stop


@dataclass(frozen=True)
class Config(flags.ExperimentFlags):
    """Flags of this experiment; the tutorial's rate is 0.025."""

    output_dir: Path = Path("runs/learning_rate")
    learning_rates: tuple[float, ...] = (0.0003, 0.003, 0.01, 0.025, 0.04, 0.05)
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
    flags.check(config, "seed", minimum=0, maximum=2**32 - 1)
    flags.check(config, "max_steps", minimum=1, maximum=10**6)
    flags.check_rates(config)
    with command.run_folder(config) as folder:
        data = jt.data.noisy_line(20, 3.0, 1.0, 0.08, seed=config.seed, width=1.0)
        result = descend(config, data)
        folder.start()
        stops = [Stop(stop).message for stop in result.stop.tolist()]
        columns = {
            "learning_rate": config.learning_rates,
            "steps": np.asarray(result.steps),
            "train_loss": np.asarray(result.loss),
            "stop": stops,
        }
        folder.write_table("history.csv", columns)
        folder.write_picture("learning_rates.png", draw(config, result))
        figures = compare(config, result)
        best = int(jnp.where(jnp.isfinite(result.loss), result.loss, jnp.inf).argmin())
        summary = folder.write_summary(
            "learning_rate",
            dataset="noisy_line",
            epochs=int(result.steps.max()),
            seed=config.seed,
            train_loss=float(result.loss[best]),
            weight=result.params["weight"][best].item(),
            bias=result.params["bias"][best].item(),
            stops=stops,
            figures=figures,
        )
        rows = {}
        for rate, steps, loss, stop in zip(*columns.values(), strict=True):
            rows[f"rate {rate:g}"] = f"{stop} after {steps} steps, loss {loss:.6g}"
        tables.print_table("T4: learning rates", rows)
        tables.print_comparisons("T4: figures", figures)
    return summary


def descend(config: Config, data: jt.Dataset) -> jt.Minimum:
    """Descends at all rates at once; each field of the result has a leading axis over them."""
    model = jt.models.LinearRegression()
    start = {"weight": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
    limits: dict[str, Any] = {"max_steps": config.max_steps, "loss_threshold": config.threshold}

    def loss(params: Any) -> jax.Array:
        predictions: Any = model.apply({"params": params}, data.inputs)
        return jt.losses.squared_error_sum(predictions, data.targets).sum()

    def one(learning_rate: jax.Array) -> jt.Minimum:
        optimizer = jt.optimizers.make(config.optimizer, learning_rate)
        return jt.minimize(loss, start, optimizer, **limits)

    rates = config.learning_rates
    return jt.sweep(one, {"learning_rate": rates}, at_once=len(rates), callbacks=[]).outputs


def logistic_regression(seed: int) -> list[tables.Comparison]:
    """Minimizes the log loss of 200 points of two classes by L-BFGS, and by scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(seed)
    inputs = random.normal(size=(200, 2)).astype(np.float32)
    labels = np.float32(inputs @ np.array([1.5, -1.0]) + 0.5 + random.logistic(size=200) > 0)

    def log_loss(params: dict[str, jax.Array]) -> jax.Array:
        logits = inputs @ params["weight"] + params["bias"]
        return jt.losses.sigmoid_binary_cross_entropy(logits, jnp.asarray(labels)).mean()

    start, limits = {"weight": jnp.zeros(2), "bias": jnp.zeros(())}, {"max_steps": 100}
    found = jt.minimize(log_loss, start, jt.optimizers.lbfgs(), gradient_tolerance=1e-6, **limits)
    fitted = LogisticRegression(C=np.inf, tol=1e-8).fit(inputs, labels)  # without a penalty
    theirs = {"w1": fitted.coef_[0, 0], "w2": fitted.coef_[0, 1], "b": fitted.intercept_[0]}
    ours = [*found.params["weight"].tolist(), found.params["bias"].item()]
    return [
        tables.Comparison(f"log loss: {name}, scikit-learn's and ours", float(original), our, 1e-3)
        for (name, original), our in zip(theirs.items(), ours, strict=True)
    ]


def compare(config: Config, result: jt.Minimum) -> list[tables.Comparison]:
    """Returns the tutorial's figures, and scikit-learn's, beside ours."""
    sgd, params = jt.optimizers.sgd(0.01), jnp.zeros(())
    step = -sgd.update(jnp.array(2.5), sgd.init(params), params)[0].item()
    rows = [tables.Comparison("step of gradient 2.5 at rate 0.01", 0.025, step, 1e-8)]
    rates = config.learning_rates
    if 0.025 in rates and flags.has_defaults(config, "optimizer", "max_steps", "threshold", "seed"):
        reached = float(result.stop[rates.index(0.025)] == Stop.LOSS_THRESHOLD)
        name = "rate 0.025 reaches the threshold (1: yes)"
        rows.append(tables.Comparison(name, 1.0, reached, 0.0))
    return [*rows, *logistic_regression(config.seed)]


def draw(config: Config, result: jt.Minimum) -> plots.Figure:
    """Draws the loss of each rate against the step; a diverging one leaves the axes, dashed."""
    figure, ax = plots.subplots("T4: a small rate is slow, a large rate diverges", size=(8, 4.6))
    colors = [plots.GREY, plots.SKY, plots.BLUE, plots.GREEN, plots.ORANGE, plots.VERMILION]
    for index, rate in enumerate(config.learning_rates):
        losses = np.asarray(result.losses[index])
        shown = np.isfinite(losses)
        stop = Stop(int(result.stop[index]))
        diverges = stop == Stop.LOSS_NOT_FINITE or losses[shown][-1] > losses[0]
        end = "diverges" if diverges else f"{stop.message}, step {result.steps[index]}"
        style: dict[str, Any] = {"linestyle": "--" if diverges else "-", "color": colors[index % 6]}
        style |= {"marker": "osDv^P"[index % 6], "markersize": 5, "markevery": (0.08, 0.17)}
        ax.plot(np.flatnonzero(shown) + 1, losses[shown], label=f"rate {rate:g}: {end}", **style)
    ax.axhline(config.threshold, color="black", linewidth=0.8, linestyle=":")
    ax.annotate("threshold", (1.05, config.threshold * 1.08), fontsize=8)
    ax.set(xscale="log", yscale="log", ylim=(config.threshold / 2, 10 * result.losses[0, 0]))
    plots.label_axes(ax, "step + 1 (log scale)", "sum of squared errors (log scale)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


if __name__ == "__main__":
    command.main(Config, run)
