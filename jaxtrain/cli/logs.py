"""Logs: the loggers that `--log` adds to a run, and their files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain import callbacks
from jaxtrain.callbacks import Callback

LogName = Literal["tensorboard", "csv", "jsonl", "wandb"]

_PROJECT = "jaxtrain"  # of Weights & Biases


def make_loggers(
    folder: Path, names: Sequence[LogName], part: str, *, histograms: bool, config: Any
) -> list[Callback]:
    """Returns the loggers of a run, which write nothing before its first steps.

    The files are `tensorboard/`, `log.csv` and `steps.csv`, `log.jsonl` and `wandb/`; those of a
    part are `tensorboard/PART/`, `log_PART.csv` and so on.

    Args:
      folder: the output folder.
      names: which loggers.
      part: name of the run in an experiment of several, else "".
      histograms: whether to log histograms of the parameters.
      config: the configuration as JSON, for Weights & Biases.

    Raises:
      MissingExtraError: a package is not installed.
    """
    suffix = f"_{part}" if part else ""
    run = {"name": f"{folder.name}{suffix}", "group": folder.name, "config": config}
    make = {
        "wandb": lambda: callbacks.wandb(_PROJECT, folder=folder, histograms=histograms, **run),
        "tensorboard": lambda: callbacks.tensorboard(
            folder / "tensorboard" / part, histograms=histograms
        ),
        "csv": lambda: callbacks.csv(
            folder / f"log{suffix}.csv", steps=folder / f"steps{suffix}.csv"
        ),
        "jsonl": lambda: callbacks.json_lines(folder / f"log{suffix}.jsonl"),
    }
    # In this order, a missing package is noticed before a folder is made.
    return [make[name]() for name in make if name in names]
