"""Logs: what `--log` adds to the folder of a run, by the loggers of `jaxtrain.loggers`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtrain import loggers
from jaxtrain._extras import needs_extra
from jaxtrain.training.events import Event

LogName = Literal["tensorboard", "csv", "jsonl", "wandb"]

_PROJECT = "jaxtrain"  # of Weights & Biases
# Files of each log, in the output folder; those of Weights & Biases have unique names and stay.
_PATTERNS = {
    "tensorboard": ["tensorboard/**/events.out.tfevents.*.jaxtrain"],
    "csv": ["log.csv", "log_*.csv", "steps.csv", "steps_*.csv"],
    "jsonl": ["log.jsonl", "log_*.jsonl"],
}


class Logs:
    """The loggers of a run folder; an experiment of several runs has some for each part.

    The files are `tensorboard/`, `log.csv` and `steps.csv`, `log.jsonl` and `wandb/`. Those of a
    part are `tensorboard/PART/`, `log_PART.csv` and so on.

    Attributes:
      config: the configuration as JSON, for Weights & Biases; set before the first event.
    """

    def __init__(self, folder: Path, names: Sequence[LogName], *, histograms: bool = False) -> None:
        """Checks that the packages are installed; nothing is written until the first event.

        Args:
          folder: the output folder.
          names: which loggers.
          histograms: whether to log histograms of the parameters.

        Raises:
          MissingExtraError: a package is not installed.
        """
        self._folder = folder
        self._names = tuple(dict.fromkeys(names))
        self._histograms = histograms
        self.config: Any = None
        self._stack = contextlib.ExitStack()
        self._opened: dict[str, list[loggers.Logger]] = {}
        if "tensorboard" in names:
            with needs_extra("tensorboard"):
                import tensorboardX  # noqa: F401
        if "wandb" in names:
            with needs_extra("wandb"):
                import wandb  # noqa: F401

    def record(self, event: Event, part: str) -> None:
        """Passes an event to the loggers of a part; of an experiment of one run, the part is ""."""
        for logger in self._loggers(part):
            logger(event)

    def picture(self, name: str, png: bytes) -> None:
        """Passes a picture to the loggers of the experiment."""
        for logger in self._loggers(""):
            logger.picture(name, png)

    def close(self) -> None:
        """Closes all files."""
        self._stack.close()

    def _loggers(self, part: str) -> list[loggers.Logger]:
        if part not in self._opened:
            self._opened[part] = [
                self._stack.enter_context(self._open(name, part)) for name in self._names
            ]
        return self._opened[part]

    def _open(self, name: LogName, part: str) -> contextlib.AbstractContextManager[loggers.Logger]:
        folder, suffix = self._folder, f"_{part}" if part else ""
        if name == "tensorboard":
            return loggers.tensorboard(folder / name / part, histograms=self._histograms)
        if name == "csv":
            return loggers.csv(folder / f"log{suffix}.csv", steps=folder / f"steps{suffix}.csv")
        if name == "jsonl":
            return loggers.json_lines(folder / f"log{suffix}.jsonl")
        return loggers.wandb(
            _PROJECT,
            folder=folder,
            histograms=self._histograms,
            name=f"{folder.name}{suffix}",
            group=folder.name,
            config=self.config,
        )


def earlier_logs(folder: Path, config: Any) -> list[str]:
    """Returns the files that the `--log` of an earlier run has written, as paths in its folder.

    Args:
      folder: the output folder.
      config: the content of its `config.json`, which may have been edited.
    """
    names = config.get("log") if isinstance(config, dict) else None
    if not isinstance(names, list):
        return []
    patterns = [pattern for name in _PATTERNS if name in names for pattern in _PATTERNS[name]]
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return [str(path.relative_to(folder)) for path in found if path.is_file()]
