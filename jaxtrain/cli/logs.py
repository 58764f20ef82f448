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
_EVENT_FILES = "events.out.tfevents.*.jaxtrain"
# Names of log files in the output folder.
_PATTERNS = (
    f"tensorboard/**/{_EVENT_FILES}",
    *("log.csv", "log_*.csv", "steps.csv", "steps_*.csv", "log.jsonl", "log_*.jsonl"),
)


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

    def files(self) -> list[str]:
        """Returns the files written, as paths in the folder.

        Those of Weights & Biases are left out: their names are unique, and no later run removes
        them.
        """
        found: list[Path] = []
        for part in self._opened:
            suffix = f"_{part}" if part else ""
            if "tensorboard" in self._names:
                found += (self._folder / "tensorboard" / part).glob(_EVENT_FILES)
            if "csv" in self._names:
                found += [self._folder / f"log{suffix}.csv", self._folder / f"steps{suffix}.csv"]
            if "jsonl" in self._names:
                found.append(self._folder / f"log{suffix}.jsonl")
        return [str(path.relative_to(self._folder)) for path in found if path.is_file()]

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
