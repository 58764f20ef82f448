"""BoardLogger: a logger of named scalars, histograms and pictures."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain._arguments import checked_path
from jaxtrain._files import make_folder
from jaxtrain._processes import shows_progress
from jaxtrain.callbacks._logger import Logger, learning_rate
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run

# The signature of a PNG file, and its first chunk up to the width and the height.
_PNG = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR.{8}", re.DOTALL)
_MAX_SCALARS = 100
_BINS = 30  # as many as TensorBoard shows


class BoardLogger(Logger):
    """A logger that also takes pictures; subclasses define the methods from `_scalars` on."""

    def __init__(self, kind: str, place: Path, histograms: bool) -> None:
        """Takes those of `Logger`, and whether to write histograms of the parameters."""
        super().__init__(kind, place)
        self._has_histograms = histograms

    def picture(self, name: str, picture: Any) -> None:
        """Logs a picture at the latest step, or at step 0 before the first run.

        Args:
          name: its name.
          picture: a matplotlib figure, or the content of a PNG file.

        Raises:
          InputError: it is something else.
        """
        is_bytes = isinstance(picture, bytes)
        if not (_PNG.match(picture) if is_bytes else hasattr(picture, "savefig")):
            found = f"{picture[:8]!r}..." if is_bytes else f"a {type(picture).__name__}"
            raise InputError(
                f"picture is {found}; expected a matplotlib figure, or the bytes of a PNG file",
                argument="picture",
            )
        self._attempt(self._log_picture, name, picture)

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes numbers at a step."""

    def _histogram(
        self, step: int, name: str, values: np.ndarray, counts: np.ndarray, edges: np.ndarray
    ) -> None:
        """Writes a histogram of values, [values]: counts per bin [bins], and edges [bins + 1]."""

    def _image(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture at a step."""

    def _flush(self) -> None:
        """Writes to the disk what has been logged so far."""

    def _log_picture(self, name: str, picture: Any) -> None:
        if not isinstance(picture, bytes):
            from jaxtrain._figures import to_png  # matplotlib, which has made the figure

            picture = to_png(picture)
        self._image(self._step or 0, name, picture)
        if not self._has_started:
            self._close(None)

    def _write_steps(self, run: Run, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            self._scalars(step, {"step_loss": loss})
        rate = learning_rate(run.state)
        if rate is not None:
            self._scalars(max(losses), {"learning_rate": rate})

    def _write_epoch(self, run: Run, step: int) -> None:
        scalars: dict[str, Any] = {}
        for name, value in run.rows[-1].items():
            array = np.asarray(value)
            if array.size == 1:
                scalars[name] = array.item()
            elif array.ndim == 1 and array.size <= _MAX_SCALARS:  # a value per class, for example
                scalars |= {f"{name}/{index}": x for index, x in enumerate(array.tolist())}
        scalars.pop("learning_rate", None)  # that of the epoch's last step, which is written
        scalars.pop("step", None)  # the horizontal axis
        self._scalars(step, scalars)
        arrays = named_arrays(getattr(run.state, "params", None), "params")
        for name, array in arrays if self._has_histograms else ():
            values = _finite_values(array)
            if len(values):
                self._histogram(step, name, values, *np.histogram(values, bins=_BINS))
        self._flush()


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """Returns the path of a folder, which is made if it is missing.

    Raises:
      InputError: it cannot be made or written.
    """
    found = checked_path(folder, "folder")
    if shows_progress():
        make_folder(found, "folder of the log")
    return found


def _finite_values(array: Any) -> np.ndarray:
    """Returns the finite elements of an array of floats, or none if other processes have some."""
    is_divided = isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )
    if is_divided or not jnp.issubdtype(array.dtype, jnp.floating):
        return np.empty(0)
    values = np.asarray(array).astype(np.float64).ravel()
    return values[np.isfinite(values)]
