"""json_lines: one JSON object per line, for each epoch and each step."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from jaxtrain._files import read_regular_file, write_atomically
from jaxtrain._json import to_json
from jaxtrain.callbacks._callback import Callback
from jaxtrain.callbacks._logger import Logger, checked_file, learning_rate

if TYPE_CHECKING:
    from jaxtrain.training.history import Run

_START = b'{"event": '


def json_lines(path: str | os.PathLike[str]) -> Callback:
    r"""Writes a JSON object for each epoch and each step, at once, so that `tail -F` shows them.

    A step has `step` (of all epochs), `epoch` and `loss`, and the last one of each report
    `learning_rate` if the optimizer records it. An epoch has `epoch`, `step` and the columns of the
    history. A value that is not finite is null. With several processes, only process 0 writes.

    Args:
      path: the file; its folder is made if it is missing. Lines of steps that the run repeats are
        removed, so a run that starts at step 0 replaces the file.

    Returns:
      A callback for `fit`. If it cannot write, it warns once, and training continues.

    Raises:
      InputError: the path is a folder or a file of other content, or its folder cannot be written.

    Example:
      >>> log = jt.callbacks.json_lines("log.jsonl")
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[log])
      >>> with open("log.jsonl") as file:
      ...     print(file.readline().strip())
      {"event": "step", "step": 1, "epoch": 1, "loss": ...}
    """
    return _JsonLines("JSON lines", checked_file(path, "path", _is_record))


class _JsonLines(Logger):
    _file: TextIO | None = None

    def _start(self, step: int) -> None:
        self._close(None)
        with suppress(FileNotFoundError):
            lines = read_regular_file(self._place).split(b"\n")
            kept = [line + b"\n" for line in lines if _is_up_to(line, step)]
            write_atomically(self._place, b"".join(kept))
        self._file = self._place.open("a", encoding="utf-8")

    def _write_steps(self, run: Run, losses: dict[int, float]) -> None:
        start = {"event": "step", "step": 0, "epoch": run.epoch + 1}
        rows = [start | {"step": step, "loss": loss} for step, loss in losses.items()]
        rate = learning_rate(run.state)
        if rate is not None:
            rows[-1]["learning_rate"] = rate
        self._write(rows)

    def _write_epoch(self, run: Run, step: int) -> None:
        start = {"event": "epoch", "epoch": run.epoch, "step": step}
        self._write([start | run.rows[-1] | start])

    def _close(self, error: BaseException | None) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._file is not None
        for row in rows:
            self._file.write(json.dumps(to_json(row), allow_nan=False) + "\n")
        self._file.flush()


def _is_record(line: bytes) -> bool:
    # A killed run may leave an incomplete line.
    return line != b"" and _START.startswith(line[: len(_START)])


def _is_up_to(line: bytes, step: int) -> bool:
    """Returns whether a line is a complete record of a step up to `step`."""
    try:
        row = json.loads(line)
        return isinstance(row, dict) and 0 < row["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
