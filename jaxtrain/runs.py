"""The folder of a run: its configuration, history, summary, model and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxtrain.errors import InputError, StorageError, note_what_is_kept
from jaxtrain.events import Compiled, EpochDone, Event, Resumed
from jaxtrain.export import save_params
from jaxtrain.folders import PART, lock_folder, make_folder, remove, write_whole
from jaxtrain.state import TrainState
from jaxtrain.versions import device_name, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURE_DPI = 120
MODEL = "model.safetensors"
# What the folder is to the user, and the flag that names another.
_NAMES = ("output folder", "--output-dir")


class RunFolder:
    """Writes what a run produces; each file appears whole or not at all.

    A context manager: on leaving, also by an error or Ctrl-C, the finished epochs are on disk.

    Attributes:
      path: the folder.
      config: what `config.json` will say, a dataclass; may be replaced until training starts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any,
        *,
        overwrite: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Make the folder, so that one that cannot be written is noticed before training.

        An earlier run's files stay until training starts: a mistake in the flags costs nothing.

        Args:
          path: the folder, made with its parents if it is missing.
          config: the experiment's configuration, a dataclass.
          overwrite: let the results of a finished run make way.
          goes_on: there are checkpoints to go on from, so that results here are this run's.

        Raises:
          InputError: the folder cannot be made or written, or holds a finished run. (Entering the
            context raises it if another run writes there.)
        """
        self.path = Path(path)
        self.config = config
        self._started = time.perf_counter()
        self._begun = False
        self._pictures: list[str] = []
        self._compile_seconds = 0.0
        self._epochs: list[dict[str, Any]] = []
        self._history_written = 0.0
        self._goes_on = goes_on
        self._keeps_results = not (overwrite or goes_on)
        make_folder(self.path, *_NAMES)
        self._check_unfinished()

    def _check_unfinished(self) -> None:
        if self._keeps_results and (self.path / "summary.json").exists():
            raise InputError(
                f"the output folder {self.path} holds a finished run; keep it and name another by "
                "--output-dir, or take --overwrite"
            )

    def __enter__(self) -> RunFolder:
        self._lock = lock_folder(self.path, *_NAMES)
        try:
            self._check_unfinished()  # another run may have ended since
            for left in self.path.glob(f".*{PART}"):  # by a run that was killed
                remove(left)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            self._write_history()
            if error is not None and self._epochs:
                where = self.path / "history.csv"
                note_what_is_kept(
                    error, f"the finished epochs ({len(self._epochs)}) are in {where}"
                )
        except StorageError:
            if error is None:
                raise
        finally:
            os.close(self._lock)

    def start(self) -> None:
        """Let the results of an earlier run make way for `config.json`.

        Those of this run, where it goes on, stay until there are newer ones.
        """
        self._begun = True
        if not self._goes_on:
            for name in ("summary.json", "history.csv", MODEL, *self._earlier_pictures()):
                (self.path / name).unlink(missing_ok=True)
        self._write_json("config.json", dataclasses.asdict(self.config))

    def record(self, event: Event, **more: float | str) -> None:
        """Take note of what `fit` reports.

        Args:
          event: training begins with `start`; finished epochs, those behind a checkpoint too,
            become rows of `history.csv`, written at most once a second.
          more: further columns of these rows.
        """
        if isinstance(event, Compiled):
            self._compile_seconds += event.seconds
            if not self._begun:
                self.start()
        elif isinstance(event, Resumed):
            columns = {
                name: values.tolist()
                for name, values in event.history.items()
                if not name.startswith("step_")
            }
            rows = zip(*columns.values(), strict=True)
            self._epochs += [{**dict(zip(columns, row, strict=True)), **more} for row in rows]
            self._write_history()
        elif isinstance(event, EpochDone):
            self._epochs.append({**event.metrics, **more})
            if time.perf_counter() - self._history_written > 1:
                self._write_history()

    def write_summary(self, **summary: Any) -> dict[str, Any]:
        """Write `summary.json`: these entries, and the times, device and versions of the run.

        Returns:
          All that was written.
        """
        entries = {
            **summary,
            "device": device_name(),
            "compile_seconds": self._compile_seconds,
            "train_seconds": sum(row["seconds"] for row in self._epochs),
            "total_seconds": time.perf_counter() - self._started,
            "pictures": self._pictures,
            "versions": versions(),
        }
        outdated = set(self._earlier_pictures()) - set(self._pictures)
        self._write_json("summary.json", entries)
        for name in outdated:
            (self.path / name).unlink(missing_ok=True)
        return entries

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write a CSV file from columns of equal length."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_whole(self.path / name, text.getvalue().encode())

    def write_model(self, state: TrainState) -> None:
        """Write the trained parameters as `model.safetensors`, for `load_params` and others."""
        save_params(self.path / MODEL, state)

    def write_picture(self, name: str, figure: Figure) -> None:
        """Write a figure as a PNG file."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=_PICTURE_DPI)
        write_whole(self.path / name, image.getvalue())
        self._pictures.append(name)

    def _earlier_pictures(self) -> list[str]:
        """The pictures that an earlier run's summary lists, and no other file of the user's."""
        try:
            listed = json.loads((self.path / "summary.json").read_text())["pictures"]
            return [name for name in listed if isinstance(name, str) and Path(name).name == name]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def _write_history(self) -> None:
        self._history_written = time.perf_counter()
        if self._epochs:
            names = list(dict.fromkeys(name for row in self._epochs for name in row))
            self.write_table(
                "history.csv", {name: [row.get(name) for row in self._epochs] for name in names}
            )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(plain(content), indent=2, allow_nan=False)
        write_whole(self.path / name, (text + "\n").encode())


def plain(value: Any) -> Any:
    """The nearest thing that JSON can say; what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
