"""Runs all tutorials and prints one table of their figures: `python -m experiments.tutorials`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import (
    gradient_descent,
    learning_rate,
    linear_regression,
    loss_landscape,
    losses,
    minibatch_regression,
    mnist,
    optimizers,
)
from jaxtrain.cli import command, flags, tables
from jaxtrain.cli.tables import Comparison

# Accuracy that the default run on digits must reach; the tutorials do not cover this data set.
DIGITS_ACCURACY = 0.9


@dataclass(frozen=True)
class Config(flags.DatasetFlags, flags.ExperimentFlags):
    """Flags of the whole series."""

    output_dir: Path = Path("runs/tutorials")
    """Folder of the results, with a subfolder per experiment."""
    overwrite: bool = False
    """Replace the results of an earlier series in that folder."""


def run(config: Config) -> None:
    """Runs every tutorial and compares its figures with the original's."""
    rows = list(all_figures(config))
    table = Table(title="The tutorials' figures", title_justify="left")
    for heading in ("tutorial", "figure"):
        table.add_column(heading)
    for heading in ("original", "ours", "difference", "tolerance"):
        table.add_column(heading, justify="right")
    for (tutorial, row), cells in zip(
        rows, tables.comparison_rows(row for _, row in rows), strict=True
    ):
        table.add_row(tutorial, *cells, f"{row.tolerance:g}")
    Console(highlight=False, width=110).print(table)
    wrong = [row.figure for _, row in rows if not row.agrees]
    if wrong:
        sys.exit(
            f"error: {len(wrong)} of {len(rows)} figures are outside their tolerance: "
            + ", ".join(wrong)
        )
    print(f"all {len(rows)} figures are within their tolerance")
    print(f"results: {config.output_dir}")


def all_figures(config: Config) -> Iterator[tuple[str, Comparison]]:
    """Yields (tutorial, figure) of every experiment, in the order of the tutorials."""
    data = {"dataset": config.dataset, "data_dir": config.data_dir}
    # (tutorial, script, variant, flags); the folder is named after script and variant.
    plan: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("T1", linear_regression, "", {"epochs": 400}),
        ("T2", losses, "", {}),
        ("T2", mnist, "", data),
        ("T2", mnist, "_stored_order", data | {"shuffle": False}),
        ("T2", optimizers, "", data | {"examples": 4000, "epochs": 5}),
        ("T3", loss_landscape, "", {}),
        ("T3", gradient_descent, "", {}),
        ("T3", gradient_descent, "_as_published", {"as_published": True}),
        ("T4", learning_rate, "", {}),
        ("T5", minibatch_regression, "", {}),
        ("T5", minibatch_regression, "_as_published", {"as_published": True}),
    ]
    for tutorial, script, variant, settings in plan:
        name = script.__name__.removeprefix("experiments.") + variant
        print(f"{tutorial}: {name}", file=sys.stderr)
        if issubclass(script.Config, flags.TrainingFlags):
            settings = settings | {"log_interval": 0}
        summary = script.run(
            script.Config(
                **settings,
                device=config.device,
                compilation_cache=config.compilation_cache,
                output_dir=config.output_dir / name,
                overwrite=config.overwrite,
            )
        )
        for figure in summary.get("figures", []):
            yield tutorial, Comparison(**figure)
        if script is mnist and summary["dataset"] == "digits":
            accuracy = float(summary["test_accuracy"])
            yield (
                tutorial,
                Comparison(
                    f"digits: accuracy, at least {DIGITS_ACCURACY:g}",
                    1.0,
                    accuracy,
                    1 - DIGITS_ACCURACY,
                ),
            )


if __name__ == "__main__":
    command.main(Config, run)
