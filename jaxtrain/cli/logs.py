"""Logs: the loggers that `--log` adds to a run, and their files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain import callbacks
from jaxtrain._extras import needs_extra
from jaxtrain.callbacks import Callback

LogName = Literal["tensorboard", "csv", "jsonl", "wandb"]

_PROJECT = "jaxtrain"  # of Weights & Biases


def check_packages(names: Sequence[LogName]) -> None:
    """Raises MissingExtraError if a package is not installed that these loggers need."""
    if "tensorboard" in names:
        with needs_extra("tensorboard"):
            import tensorboardX  # noqa: F401
    if "wandb" in names:
        with needs_extra("wandb"):
            import wandb  # noqa: F401


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
    """
    suffix = f"_{part}" if part else ""

    def make(name: LogName) -> Callback:
        if name == "tensorboard":
            return callbacks.tensorboard(folder / name / part, histograms=histograms)
        if name == "csv":
            return callbacks.csv(folder / f"log{suffix}.csv", steps=folder / f"steps{suffix}.csv")
        if name == "jsonl":
            return callbacks.json_lines(folder / f"log{suffix}.jsonl")
        run = {"name": f"{folder.name}{suffix}", "group": folder.name, "config": config}
        return callbacks.wandb(_PROJECT, folder=folder, histograms=histograms, **run)

    return [make(name) for name in dict.fromkeys(names)]
