"""The folder of a run: its configuration, history, summary, model and pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain._files import (
    PART,
    lock_folder,
    make_folder,
    read_input,
    remove_file,
    write_atomically,
    write_csv,
)
from jaxtrain._json import to_json
from jaxtrain._versions import device_name, versions
from jaxtrain.callbacks import Callback, SweepProgress
from jaxtrain.cli.flags import ExperimentFlags, TrainingFlags
from jaxtrain.cli.logs import make_loggers
from jaxtrain.cli.resuming import checkpoint_callbacks, resumes
from jaxtrain.cli.tables import Comparison
from jaxtrain.errors import InputError, StorageError, add_recovery_note
from jaxtrain.export import save
from jaxtrain.training.history import Run
from jaxtrain.training.state import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODEL = "model.safetensors"
_DESCRIPTION = "output folder"


class RunFolder:
    """Writes what a run produces; each file appears complete or not at all.

    A context manager: on leaving, also by an error or Ctrl-C, the completed epochs are on disk.
    The results of an earlier run stay until the first steps are taken, so that a wrong flag does
    not delete them.

    Attributes:
      path: the folder.
      config: what `config.json` will contain; may be replaced until training starts.
    """

    def __init__(self, config: ExperimentFlags) -> None:
        """Makes the folder, so that one that cannot be written is noticed before training.

        Raises:
          MissingExtraError: a package that --log needs is not installed.
          InputError: the folder cannot be made or written, or contains a finished run. (Entering
            the context raises it if another run is writing there.)
        """
        self.path = config.output_dir
        self.config = config
        may_write = isinstance(config, TrainingFlags) and resumes(config)
        if (self.path / "summary.json").exists() and not (config.overwrite or may_write):
            raise InputError(
                f"the output folder {self.path} contains a finished run; choose another "
                "folder with --output-dir, or replace it with --overwrite"
            )
        self._created = time.perf_counter()
        self._has_started = False
        self._pictures: list[str] = []
        self._loggers: dict[str, list[Callback]] = {}  # by part
        self._rows: list[dict[str, Any]] = []
        self._compile_seconds = self._sweep_seconds = self._history_written = 0.0
        self._part_loggers("")  # a missing package is noticed before the folder is made
        self._loggers.clear()  # made again later: they record `config`, which may be replaced
        make_folder(self.path, _DESCRIPTION)

    def __enter__(self) -> RunFolder:
        self._lock = lock_folder(self.path, _DESCRIPTION)
        for leftover in self.path.glob(f".*{PART}"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._has_started:
                self._write_history()
            if error is not None and self._has_started and self._rows:
                file = self.path / "history.csv"
                add_recovery_note(error, f"the completed epochs ({len(self._rows)}) are in {file}")
        except StorageError:
            if error is None:
                raise
        finally:
            self._lock.release()

    def start(self, *, resumed: bool = False) -> None:
        """Removes the results of an earlier run and writes `config.json`.

        Args:
          resumed: whether the results are the run's own; they stay until there are newer ones.

        Raises:
          StorageError: a file cannot be removed or written.
        """
        if self._has_started:
            return
        self._has_started = True
        if not resumed:
            names = [*self._earlier_pictures(), "summary.json", "history.csv", _MODEL]
            for name in names:
                remove_file(self.path / name)
        self._write_json("config.json", dataclasses.asdict(self.config))
        self._write_history()

    def callbacks(
        self, part: str = "", *, known: Mapping[str, Any] | None = None, **columns: float | str
    ) -> list[Callback]:
        """Returns the callbacks of `fit` or `sweep` that write a run, its logs and checkpoints.

        Args:
          part: name of the run, in an experiment of several; it has its own logs and checkpoints.
          known: settings that the configuration leaves open, such as the data set of "auto";
            a run with others does not resume.
          columns: additional columns of its rows of `history.csv`.
        """
        callbacks = [_Rows(self, columns), *self._part_loggers(part)]
        if isinstance(self.config, TrainingFlags):
            callbacks += checkpoint_callbacks(self.config, part=part, **(known or {}))
        return callbacks

    def _part_loggers(self, part: str) -> list[Callback]:
        if part not in self._loggers and isinstance(self.config, TrainingFlags):
            self._loggers[part] = make_loggers(
                *(self.path, self.config.log, part),
                histograms=self.config.log_histograms,
                config=to_json(dataclasses.asdict(self.config)),
            )
        return self._loggers.get(part, [])

    def write_summary(
        self, experiment: str, *, figures: Iterable[Comparison] = (), **entries: Any
    ) -> dict[str, Any]:
        """Writes `summary.json`, with the times, device and versions of the run.

        Args:
          experiment: name of the script.
          figures: the original's figures beside ours.
          entries: `dataset`, `epochs`, `seed`, the last `train_loss` and `test_loss`, and others.

        Returns:
          All entries; those of the names above that are not given are None, and `epochs` is 0.
        """
        names = ("experiment", "dataset", "epochs", "seed", "train_loss", "test_loss")
        summary = {
            **dict.fromkeys(names),
            **{"experiment": experiment, "epochs": 0},
            **entries,
            "figures": [figure._asdict() for figure in figures],
            "device": device_name(),
            "compile_seconds": self._compile_seconds,
            "train_seconds": self._sweep_seconds + sum(row["seconds"] for row in self._rows),
            "total_seconds": time.perf_counter() - self._created,
            "pictures": self._pictures,
            "versions": versions(),
        }
        self._write_json("summary.json", summary)
        return summary

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Writes a CSV file from columns of equal length."""
        write_csv(self.path / name, columns)

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
        """Returns the pictures that an earlier run's summary lists; others are the user's."""
        try:
            listed = json.loads(read_input(self.path / "summary.json"))["pictures"]
            return [Path(name).name for name in listed if name.endswith(".png")]
        except (ValueError, LookupError, TypeError, AttributeError):
            return []  # missing, or not written by a run

    def _write_history(self) -> None:
        self._history_written = time.perf_counter()
        if self._rows:
            names = dict.fromkeys(name for row in self._rows for name in row)
            columns = {name: [row.get(name) for row in self._rows] for name in names}
            self.write_table("history.csv", columns)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(to_json(content), indent=2, allow_nan=False)
        write_atomically(self.path / name, (text + "\n").encode())


class _Rows(Callback):
    """Adds the rows and the times of a run to its folder, and starts it with the first steps."""

    def __init__(self, folder: RunFolder, columns: Mapping[str, float | str]) -> None:
        self._folder, self._columns = folder, columns

    def on_start(self, run: Run) -> None:
        """Takes over the rows of a checkpoint."""
        self._folder._rows += [{**row, **self._columns} for row in run.rows]

    def on_steps(self, run: Run) -> None:
        """Starts the folder after the first steps."""
        self._folder.start(resumed=run.resumed)

    def on_epoch(self, run: Run) -> None:
        """Adds a row to `history.csv`, which is written at most once per second."""
        self._folder._rows.append({**run.rows[-1], **self._columns})
        if time.perf_counter() - self._folder._history_written > 1:
            self._folder._write_history()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Adds the time of compiling, and starts the folder if nothing was left to train."""
        self._folder._compile_seconds += run.compile_seconds
        if error is None:
            self._folder.start(resumed=run.resumed)

    def on_runs(self, progress: SweepProgress) -> None:
        """Starts the folder when the first runs are done, and adds the times of a batch of runs."""
        if progress.done:
            self._folder.start()
        self._folder._compile_seconds += progress.compile_seconds
        self._folder._sweep_seconds += progress.seconds
