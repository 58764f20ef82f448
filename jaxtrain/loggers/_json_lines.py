"""json_lines: one JSON object per line, for each epoch and each step."""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TextIO

from jaxtrain._files import read_regular_file, write_atomically
from jaxtrain.loggers._logger import Logger, Writer, checked_file, learning_rate, open_logger
from jaxtrain.training.events import EpochDone, StepsDone

_START = b'{"event": '


def json_lines(path: str | os.PathLike[str]) -> AbstractContextManager[Logger]:
    r"""Writes a JSON object for each epoch and each step, at once, so that `tail -F` shows them.

    A step has `step` (of all epochs), `epoch` and `loss`, and the last one of each report
    `learning_rate` if the optimizer records it. An epoch has `epoch`, `step` and the columns of the
    history. A value that is not finite is null.

    Args:
      path: the file; its folder is made if it is missing. Lines of steps that the run repeats are
        removed, so a run that starts at step 0 replaces the file.

    Returns:
      A context manager; its value is the function to pass as `on_event`.

    Raises:
      InputError: the path is a folder or a file of other content, or its folder cannot be written.

    Example:
      >>> with jt.loggers.json_lines("log.jsonl") as log:
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=log)
      >>> with open("log.jsonl") as file:
      ...     print(file.readline().strip())
      {"event": "step", "step": 1, "epoch": 1, "loss": ...}
    """
    file = checked_file(path, "path", _is_record)
    return open_logger("JSON lines", file, _JsonLines(file))


class _JsonLines(Writer):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def start(self, step: int) -> None:
        self.close()
        with suppress(FileNotFoundError):
            content = read_regular_file(self._path)
            kept = b"".join(
                b"%b\n" % line for line in content.split(b"\n") if _is_up_to(line, step)
            )
            if kept != content:
                write_atomically(self._path, kept)
        self._file = self._path.open("a", encoding="utf-8")

    def steps(self, event: StepsDone, first: int) -> None:
        rows: list[dict[str, Any]] = [
            {"event": "step", "step": step, "epoch": event.epoch, "loss": loss}
            for step, loss in enumerate(event.losses.tolist(), first)
        ]
        rate = learning_rate(event.state)
        if rate is not None:
            rows[-1]["learning_rate"] = rate
        self._write(rows)

    def epoch(self, event: EpochDone, step: int) -> None:
        start = {"event": "epoch", "epoch": event.epoch, "step": step}
        self._write([start | {**event.metrics, **start}])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        self._file.flush()


def _is_record(line: bytes) -> bool:
    # A killed run may leave a part of a line.
    return line != b"" and _START.startswith(line[: len(_START)])


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replaces numbers that JSON does not have by null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _is_up_to(line: bytes, step: int) -> bool:
    """Returns whether a line is a complete record of a step up to `step`."""
    try:
        row = json.loads(line)
        return isinstance(row, dict) and 0 < row["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
