"""json_lines: one JSON object per line, for each epoch and each step."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from jaxtrain._json import to_json
from jaxtrain.callbacks._callback import Callback
from jaxtrain.callbacks._log_file import LogFile
from jaxtrain.callbacks._logger import Logger, learning_rate

if TYPE_CHECKING:
    from jaxtrain.training.history import Run

# The start of a line, and what a killed run may have written of the first one.
_RECORD = re.compile(
    rb'{"event": "step", "step": \d+, "epoch": \d+, "loss": |'
    rb'{"event": "epoch", "epoch": \d+, "step": \d+[,}]'
)
_STARTS = (b'{"event": "step", "step": ', b'{"event": "epoch", "epoch": ')


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
      InputError: the path is not a regular file, or one of other content; another run is writing
        to it; or its folder cannot be written.

    Example:
      >>> log = jt.callbacks.json_lines("log.jsonl")
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[log])
      >>> with open("log.jsonl") as file:
      ...     print(file.readline().strip())
      {"event": "step", "step": 1, "epoch": 1, "loss": ...}
    """
    return _JsonLines(LogFile(path, "path", _is_record))


class _JsonLines(Logger):
    def __init__(self, file: LogFile) -> None:
        super().__init__("JSON lines", file.path)
        self._file = file

    def _start(self, step: int) -> None:
        def kept(content: bytes) -> bytes:
            lines = content.split(b"\n")
            return b"".join(line + b"\n" for line in lines if _is_up_to(line, step))

        self._file.rewrite(kept)

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
        self._file.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(to_json(row), allow_nan=False) + "\n" for row in rows]
        self._file.append("".join(lines))


def _is_record(line: bytes) -> bool:
    """Returns whether a line is a record, or the start of one."""
    is_complete = line.endswith(b"\n")
    starts = (start.startswith(line[: len(start)]) for start in _STARTS)
    return _RECORD.match(line) is not None or (not is_complete and any(starts))


def _is_up_to(line: bytes, step: int) -> bool:
    """Returns whether a line is a complete record of a step up to `step`."""
    try:
        row = json.loads(line)
        return isinstance(row, dict) and 0 < row["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
