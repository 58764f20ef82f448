"""Logs: the loggers that `--log` adds to a run, and their files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain import callbacks
from jaxtrain._extras import needs_extra
from jaxtrain.callbacks import Callback
from jaxtrain.callbacks.tensorboard import EVENT_FILES

LogName = Literal["tensorboard", "csv", "jsonl", "wandb"]

_PROJECT = "jaxtrain"  # of Weights & Biases
# Names of log files in the output folder.
_PATTERNS = (
    f"tensorboard/**/{EVENT_FILES}",
    *("log.csv", "log_*.csv", "steps.csv", "steps_*.csv", "log.jsonl", "log_*.jsonl"),
)


def check_packages(names: Sequence[LogName]) -> None:
    """Raises MissingExtraError if a package is not installed that these loggers need."""
    if "tensorboard" in names:
        with needs_extra("tensorboard"):
            import tensorboardX  # noqa: F401
    if "wandb" in names:
        with needs_extra("wandb"):
            import wandb  # noqa: F401


def make_loggers(
    folder: Path,
    names: Sequence[LogName],
    part: str = "",
    *,
    histograms: bool = False,
    config: Any = None,
) -> list[Callback]:
    """Returns the loggers of a run, which write nothing before its first steps.

    The files are `tensorboard/`, `log.csv` and `steps.csv`, `log.jsonl` and `wandb/`; those of a
    part are `tensorboard/PART/`, `log_PART.csv` and so on.

    Args:
      folder: the output folder.
      names: which loggers.
      part: name of the run, in an experiment of several.
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
        return callbacks.wandb(
            _PROJECT,
            folder=folder,
            histograms=histograms,
            name=f"{folder.name}{suffix}",
            group=folder.name,
            config=config,
        )

    return [make(name) for name in dict.fromkeys(names)]


def log_files(folder: Path, names: Sequence[LogName], part: str = "") -> list[str]:
    """Returns the files that the loggers of a run have written, as paths in the folder.

    Those of Weights & Biases are left out: their names are unique, and no later run removes them.
    """
    suffix = f"_{part}" if part else ""
    found: list[Path] = []
    if "tensorboard" in names:
        found += (folder / "tensorboard" / part).glob(EVENT_FILES)
    if "csv" in names:
        found += [folder / f"log{suffix}.csv", folder / f"steps{suffix}.csv"]
    if "jsonl" in names:
        found.append(folder / f"log{suffix}.jsonl")
    return [str(path.relative_to(folder)) for path in found if path.is_file()]


def earlier_logs(folder: Path, summary: Any) -> list[str]:
    """Returns the log files that the summary of an earlier run lists, as paths in its folder.

    Args:
      folder: the output folder.
      summary: the content of its `summary.json`. It may have been edited: it can name nothing but
        files with the names of logs.
    """
    listed = summary.get("logs") if isinstance(summary, dict) else None
    if not isinstance(listed, list):
        return []
    found = [path for pattern in _PATTERNS for path in folder.glob(pattern)]
    names = [str(path.relative_to(folder)) for path in found]
    return [name for name in names if name in listed]
