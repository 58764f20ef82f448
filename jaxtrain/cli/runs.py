"""The folder of a run: its configuration, history, summary, model and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxtrain._files import PART, lock_folder, make_folder, read_regular_file, write_atomically
from jaxtrain._versions import device_name, versions
from jaxtrain.callbacks import Callback, SweepProgress
from jaxtrain.cli.logs import LogName, check_packages, earlier_logs, log_files, make_loggers
from jaxtrain.cli.tables import Comparison
from jaxtrain.errors import InputError, StorageError, add_recovery_note
from jaxtrain.export import save
from jaxtrain.training.fit import Run
from jaxtrain.training.state import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODEL = "model.safetensors"
_DESCRIPTION = "output folder"
# A larger summary or configuration was not written by a run.
_MAX_JSON_BYTES = 2**20


class RunFolder:
    """Writes what a run produces; each file appears complete or not at all.

    A context manager: on leaving, also by an error or Ctrl-C, the completed epochs are on disk.

    Attributes:
      path: the folder.
      config: what `config.json` will contain, a dataclass; may be replaced until training starts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any,
        *,
        overwrite: bool = False,
        resuming: bool = False,
        log: Sequence[LogName] = (),
        histograms: bool = False,
    ) -> None:
        """Makes the folder, so that one that cannot be written is noticed before training.

        The files of an earlier run stay until training starts: a wrong flag does not
        delete them.

        Args:
          path: the folder, made with its parents if it is missing.
          config: the experiment's configuration, a dataclass.
          overwrite: replace the results of a finished run.
          resuming: the run resumes from checkpoints, so results in the folder are its own.
          log: loggers that also write the runs and the pictures to the folder.
          histograms: whether these write histograms of the parameters.

        Raises:
          MissingExtraError: a package that a logger needs is not installed.
          InputError: the folder cannot be made or written, or contains a finished run. (Entering
            the context raises it if another run is writing there.)
        """
        check_packages(log)
        self.path = Path(path)
        self.config = config
        self._created = time.perf_counter()
        self._has_started = False
        self._pictures: list[str] = []
        self._compile_seconds = 0.0
        self._sweep_seconds = 0.0
        self._epochs: list[dict[str, Any]] = []
        self._history_written = 0.0
        self._resuming = resuming
        self._log = log
        self._has_histograms = histograms
        self._loggers: dict[str, list[Callback]] = {}  # by part
        self._keeps_results = not (overwrite or resuming)
        make_folder(self.path, _DESCRIPTION)
        self._check_unfinished()

    def _check_unfinished(self) -> None:
        if self._keeps_results and os.path.lexists(self.path / "summary.json"):
            raise InputError(
                f"the output folder {self.path} contains a finished run; choose another "
                "folder with --output-dir, or replace it with --overwrite"
            )

    def __enter__(self) -> RunFolder:
        self._lock = lock_folder(self.path, _DESCRIPTION)
        try:
            self._check_unfinished()  # another run may have finished since
            for leftover in self.path.glob(f".*{PART}"):  # of a run that was killed
                if _is_regular_file(leftover):
                    remove_file(leftover)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            if self._has_started:
                self._write_history()
            if error is not None and self._has_started and self._epochs:
                file = self.path / "history.csv"
                add_recovery_note(
                    error, f"the completed epochs ({len(self._epochs)}) are in {file}"
                )
        except StorageError:
            if error is None:
                raise
        finally:
            self._lock.release()

    def start(self) -> None:
        """Removes the results of an earlier run and writes `config.json`.

        A run that resumes keeps its own results until there are newer ones.

        Raises:
          StorageError: a file cannot be removed or written.
        """
        self._has_started = True
        if not self._resuming:
            earlier = (*self._earlier_pictures(), *self._earlier_logs())
            for name in ("summary.json", "history.csv", _MODEL, *earlier):
                remove_file(self.path / name)
        self._write_json("config.json", dataclasses.asdict(self.config))
        self._write_history()

    def callbacks(self, part: str = "", **columns: float | str) -> list[Callback]:
        """Returns the callbacks that write a run of `fit` or `sweep` to the folder.

        Before the first steps are taken they change nothing, so a run that fails to compile leaves
        the results of an earlier one.

        Args:
          part: name of the run, in an experiment of several; it has its own logs.
          columns: additional columns of its rows of `history.csv`.
        """
        return [_Rows(self, columns), *self._part_loggers(part)]

    def _part_loggers(self, part: str) -> list[Callback]:
        if part not in self._loggers:
            self._loggers[part] = make_loggers(
                *(self.path, self._log, part),
                histograms=self._has_histograms,
                config=to_json(dataclasses.asdict(self.config)),
            )
        return self._loggers[part]

    def write_summary(
        self, *, figures: Iterable[Comparison] | None = None, **summary: Any
    ) -> dict[str, Any]:
        """Writes `summary.json`.

        Args:
          figures: the original's figures beside ours, if there are any.
          summary: further entries. The times, device and versions of the run are added.

        Returns:
          All entries.
        """
        if figures is not None:
            summary["figures"] = [figure._asdict() for figure in figures]
        logs = set(self._earlier_logs())  # of a run that resumes
        for part in self._loggers:
            logs |= set(log_files(self.path, self._log, part))
        entries = {
            **summary,
            "device": device_name(),
            "compile_seconds": self._compile_seconds,
            "train_seconds": self._sweep_seconds + sum(row["seconds"] for row in self._epochs),
            "total_seconds": time.perf_counter() - self._created,
            "pictures": self._pictures,
            "logs": sorted(logs),
            "versions": versions(),
        }
        outdated = set(self._earlier_pictures()) - set(self._pictures)
        self._write_json("summary.json", entries)
        for name in outdated:
            remove_file(self.path / name)
        return entries

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Writes a CSV file from columns of equal length."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_atomically(self.path / name, text.getvalue().encode())

    def write_model(self, state: TrainState) -> None:
        """Writes the trained parameters as `model.safetensors`, which `load` reads."""
        save(self.path / _MODEL, state)

    def write_picture(self, name: str, figure: Figure) -> None:
        """Writes a figure as a PNG file, and to the logs."""
        from jaxtrain._figures import to_png  # matplotlib

        image = to_png(figure)
        write_atomically(self.path / name, image)
        self._pictures.append(name)
        for logger in self._part_loggers(""):
            if hasattr(logger, "picture"):
                logger.picture(Path(name).stem, image)

    def _earlier_pictures(self) -> list[str]:
        """Returns the pictures that an earlier run's summary lists, and no other file.

        The summary may have been edited: it can name nothing but PNG files in this folder.
        """
        summary = read_json(self.path / "summary.json")
        listed = summary.get("pictures") if isinstance(summary, dict) else None
        if not isinstance(listed, list):
            return []
        names = [name for name in listed if isinstance(name, str) and _is_picture(name)]
        return [name for name in names if _is_regular_file(self.path / name)]

    def _earlier_logs(self) -> list[str]:
        names = earlier_logs(self.path, read_json(self.path / "summary.json"))
        return [name for name in names if _is_regular_file(self.path / name)]

    def _write_history(self) -> None:
        self._history_written = time.perf_counter()
        if self._epochs:
            names = list(dict.fromkeys(name for row in self._epochs for name in row))
            columns = {name: [_to_cell(row.get(name)) for row in self._epochs] for name in names}
            self.write_table("history.csv", columns)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(to_json(content), indent=2, allow_nan=False)
        write_atomically(self.path / name, (text + "\n").encode())


class _Rows(Callback):
    """Adds the rows and the times of a run to its folder."""

    def __init__(self, folder: RunFolder, columns: Mapping[str, float | str]) -> None:
        self._folder, self._columns = folder, columns

    def on_start(self, run: Run) -> None:
        """Takes over the rows of a checkpoint."""
        self._folder._epochs += [{**row, **self._columns} for row in run.rows]

    def on_steps(self, run: Run) -> None:
        """Starts the folder after the first steps."""
        self._start()

    def on_epoch(self, run: Run) -> None:
        """Adds a row to `history.csv`, which is written at most once per second."""
        self._folder._epochs.append({**run.rows[-1], **self._columns})
        if time.perf_counter() - self._folder._history_written > 1:
            self._folder._write_history()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Adds the time of compiling, and starts the folder if nothing was left to train."""
        self._folder._compile_seconds += run.compile_seconds
        if error is None:
            self._start()

    def on_runs(self, progress: SweepProgress) -> None:
        """Starts the folder when the first runs are done, and adds the times of a batch of runs."""
        if progress.done:
            self._start()
        self._folder._compile_seconds += progress.compile_seconds
        self._folder._sweep_seconds += progress.seconds

    def _start(self) -> None:
        if not self._folder._has_started:
            self._folder.start()


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file of an earlier run, or None if it cannot be read."""
    try:
        return json.loads(read_regular_file(path, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def to_json(value: Any) -> Any:
    """Returns the nearest JSON value; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _to_cell(value: Any) -> Any:
    """Returns an array as JSON text, and any other value unchanged."""
    return json.dumps(to_json(value)) if np.ndim(value) else value


def remove_file(path: Path) -> None:
    """Removes a file if it exists; of a link, the link itself.

    Raises:
      StorageError: it cannot be removed, because it is a folder for example.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error


def _is_picture(name: str) -> bool:
    return name.endswith(".png") and not any(character in name for character in "/\\\0")


def _is_regular_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):  # ValueError: characters that no file name has
        return False
