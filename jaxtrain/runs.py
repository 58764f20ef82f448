"""The folder of a run: its configuration, history, summary and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import InputError
from jaxtrain.fit import Compiled, EpochDone, Event

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "numpy")
_PICTURE_DPI = 120

# How the note begins that a run cut short leaves on its exception.
FINISHED_NOTE = "the finished epochs"


class RunFolder:
    """Writes what a run produces; each file appears whole or not at all.

    A context manager: on leaving, also by an error or Ctrl-C, the finished epochs are on disk.

    Attributes:
      path: the folder.
      config: what `config.json` will say, a dataclass; may be replaced until training starts.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any) -> None:
        """Make the folder, so that one that cannot be written is noticed before training.

        An earlier run's files stay until training starts: a mistake in the flags costs nothing.

        Args:
          path: the folder, made with its parents if it is missing.
          config: the experiment's configuration, a dataclass.

        Raises:
          InputError: the folder cannot be made or written.
        """
        self.path = Path(path)
        self.config = config
        self._started = time.perf_counter()
        self._begun = False
        self._pictures: list[str] = []
        self._compile_seconds = 0.0
        self._epochs: list[dict[str, Any]] = []
        self._history_written = 0.0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(
                f"the output folder {self.path} cannot be written ({error.strerror or error}); "
                "name another by --output-dir"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._write_history()
        if error is not None and self._epochs:
            where = self.path / "history.csv"
            error.add_note(f"{FINISHED_NOTE} ({len(self._epochs)}) are in {where}")

    def start(self) -> None:
        """Let the results of an earlier run make way for `config.json`."""
        self._begun = True
        for name in ("summary.json", "history.csv", *self._earlier_pictures()):
            (self.path / name).unlink(missing_ok=True)
        self._write_json("config.json", dataclasses.asdict(self.config))

    def record(self, event: Event, **more: float | str) -> None:
        """Take note of what `fit` reports.

        Args:
          event: training begins with `start`; finished epochs become rows of `history.csv`,
            written at most once a second.
          more: further columns of that row.
        """
        if isinstance(event, Compiled):
            self._compile_seconds += event.seconds
            if not self._begun:
                self.start()
        elif isinstance(event, EpochDone):
            self._epochs.append({**event.metrics, **more})
            if time.perf_counter() - self._history_written > 1:
                self._write_history()

    def write_summary(self, **summary: Any) -> dict[str, Any]:
        """Write `summary.json`: these entries, and the times, device and versions of the run.

        Returns:
          All that was written.
        """
        device = current_device()
        entries = {
            **summary,
            "device": device.platform
            + (f": {device.device_kind}" if device.device_kind != device.platform else ""),
            "compile_seconds": self._compile_seconds,
            "train_seconds": sum(row["seconds"] for row in self._epochs),
            "total_seconds": time.perf_counter() - self._started,
            "pictures": self._pictures,
            "versions": versions(),
        }
        self._write_json("summary.json", entries)
        return entries

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write a CSV file from columns of equal length."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        self._write(name, text.getvalue().encode())

    def write_picture(self, name: str, figure: Figure) -> None:
        """Write a figure as a PNG file."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=_PICTURE_DPI)
        self._write(name, image.getvalue())
        self._pictures.append(name)

    def _earlier_pictures(self) -> list[str]:
        """The pictures that an earlier run's summary lists, and no other file of the user's."""
        try:
            listed = json.loads((self.path / "summary.json").read_text())["pictures"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [name for name in listed if isinstance(name, str) and Path(name).name == name]

    def _write_history(self) -> None:
        self._history_written = time.perf_counter()
        if self._epochs:
            names = list(dict.fromkeys(name for row in self._epochs for name in row))
            self.write_table(
                "history.csv", {name: [row.get(name) for row in self._epochs] for name in names}
            )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_plain(content), indent=2, allow_nan=False)
        self._write(name, (text + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        handle, scratch = tempfile.mkstemp(dir=self.path, prefix=f".{name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, self.path / name)
        except BaseException:
            os.unlink(scratch)
            raise


def current_device() -> jax.Device:
    """The device on which new arrays are made."""
    return next(iter(jnp.zeros(()).devices()))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def _umask() -> int:
    # mkstemp makes private files; the folder's other readers should see these as any other.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """The nearest thing that JSON can say; what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
