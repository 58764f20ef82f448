"""csv: one row per epoch, and in a second file one per step."""

from __future__ import annotations

import io
import json
import os
from csv import DictReader, DictWriter
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain._json import to_json
from jaxtrain.callbacks._callback import Callback
from jaxtrain.callbacks._log_file import LogFile
from jaxtrain.callbacks._logger import Logger
from jaxtrain.errors import InputError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


def csv(path: str | os.PathLike[str], *, steps: str | os.PathLike[str] | None = None) -> Callback:
    """Writes the columns of the history, one row per epoch.

    The first columns are `epoch` and `step`, the number of steps of all epochs so far. An array is
    written as JSON. With several processes, only process 0 writes.

    Args:
      path: the file; its folder is made if it is missing. Rows of steps that the run repeats are
        removed, so a run that starts at step 0 replaces the file.
      steps: a second file, with the columns `step`, `epoch` and `loss` and one row per step; None
        writes none.

    Returns:
      A callback for `fit`. If it cannot write, it warns once, and training continues.

    Raises:
      InputError: a path is not a regular file, or one of other content; another run is writing to
        it; its folder cannot be written; or both are the same.

    Example:
      >>> log = jt.callbacks.csv("epochs.csv", steps="steps.csv")
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[log])
      >>> with open("steps.csv") as file:
      ...     print(file.readline().strip())
      step,epoch,loss
    """
    epochs_file = LogFile(path, "path", _has_epochs)
    steps_file = None if steps is None else LogFile(steps, "steps", _has_steps)
    if steps_file is not None and steps_file.path.resolve() == epochs_file.path.resolve():
        raise InputError(
            f"path and steps are both {epochs_file.path}; expected two files", argument="steps"
        )
    return _Csv(epochs_file, steps_file)


class _Csv(Logger):
    def __init__(self, epochs: LogFile, steps: LogFile | None) -> None:
        super().__init__("CSV", epochs.path, *([] if steps is None else [steps.path]))
        self._epochs = _Table(epochs)
        self._steps = None if steps is None else _Table(steps)

    def _start(self, step: int) -> None:
        self._epochs.start(step)
        if self._steps is not None:
            self._steps.start(step)

    def _write_steps(self, run: Run, losses: dict[int, float]) -> None:
        if self._steps is not None:
            epoch = run.epoch + 1
            self._steps.append(
                [{"step": step, "epoch": epoch, "loss": loss} for step, loss in losses.items()]
            )

    def _write_epoch(self, run: Run, step: int) -> None:
        start = {"epoch": run.epoch, "step": step}
        row = {name: _to_cell(value) for name, value in run.rows[-1].items()}
        self._epochs.append([start | row | start])

    def _close(self, error: BaseException | None) -> None:
        self._epochs.close()
        if self._steps is not None:
            self._steps.close()


class _Table:
    """A CSV file with a column `step` to which rows are appended."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._columns: list[str] = []

    def start(self, step: int) -> None:
        """Removes the rows after a step, and incomplete ones."""

        def kept(content: bytes) -> bytes:
            rows = [row for row in _rows_of(content) if 0 < _step_of(row) <= step]
            self._columns = list(rows[0]) if rows else []
            return self._table(rows)

        self._file.rewrite(kept)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows with the same columns."""
        new = [name for name in rows[0] if name not in self._columns]
        if new:
            self._columns += new
            self._file.rewrite(lambda content: self._table(_rows_of(content)))
        self._file.append(_to_text(self._columns, rows))

    def close(self) -> None:
        self._file.close()

    def _table(self, rows: list[dict[str, str]]) -> bytes:
        header = dict(zip(self._columns, self._columns, strict=True))
        return _to_text(self._columns, [header, *rows]).encode() if self._columns else b""


def _has_epochs(header: bytes) -> bool:
    # Other tools write epoch and step as well, and no seconds.
    return header.startswith(b"epoch,step,") and b"seconds" in header.rstrip().split(b",")


def _has_steps(header: bytes) -> bool:
    return header.rstrip() == b"step,epoch,loss"


def _rows_of(content: bytes) -> list[dict[str, str]]:
    text = content.decode(errors="replace")
    complete = text[: text.rfind("\n") + 1]  # a killed run may leave an incomplete line
    return list(DictReader(io.StringIO(complete, newline="")))


def _to_cell(value: Any) -> Any:
    """Returns an array as JSON, and a number unchanged, so that NaN and infinity remain."""
    return json.dumps(to_json(value)) if np.ndim(value) else np.asarray(value).item()


def _to_text(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _step_of(row: dict[Any, Any]) -> int:
    """Returns the step of a row, or 0 if it is incomplete or not one of ours."""
    is_complete = None not in row and None not in row.values()
    return int(row["step"]) if is_complete and row.get("step", "").isdecimal() else 0
