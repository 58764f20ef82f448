"""wandb: runs of Weights & Biases, on disk unless asked otherwise."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain.callbacks._board import BoardLogger, checked_folder
from jaxtrain.errors import InputError

_MODES = ("offline", "online")


def wandb(
    project: str,
    *,
    mode: Literal["offline", "online"] = "offline",
    folder: str | os.PathLike[str] = ".",
    histograms: bool = False,
    **options: Any,
) -> BoardLogger:
    """Writes a run of Weights & Biases, with the scalars of `tensorboard`.

    A run that is offline needs no account and no network; `wandb sync FOLDER/wandb/offline-run-*`
    uploads it later. A run of `fit` that resumes is a second run of Weights & Biases. With several
    processes, only process 0 writes.

    After the training, the run remains open for pictures, because none can be added to a finished
    one. It is finished as failed if an error ends the training, and otherwise when another training
    that does not continue this one starts with the callback, or when the process ends.

    Args:
      project: the project.
      mode: "offline" writes to the disk only, "online" also uploads.
      folder: where the folder `wandb` is made.
      histograms: also write a histogram of every array of the parameters after each epoch, with the
        names of `jt.save`.
      **options: passed on to `wandb.init`, such as `name`, `config`, `group` and `tags`.

    Returns:
      A callback for `fit`, whose method `picture` adds pictures, also after the training. If it
      cannot write, it warns once, and training continues.

    Raises:
      MissingExtraError: `jaxtrain[wandb]` is not installed.
      InputError: the mode is unknown, or the folder cannot be made or written.

    Example:
      >>> log = jt.callbacks.wandb("digits", config={"learning_rate": 0.01})
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[log])
    """
    with needs_extra("wandb"):
        import wandb as package
    if mode not in _MODES:
        raise InputError(f"mode is {mode!r}; expected one of {', '.join(_MODES)}", argument="mode")
    path = checked_folder(folder)
    settings = package.Settings(silent=True, console="off")  # leaves stdout and stderr alone
    options = {"settings": settings, "reinit": "create_new", **options}
    options |= {"project": project, "mode": mode, "dir": path}
    return _Wandb(path / "wandb", histograms, package, options)


class _Wandb(BoardLogger):
    def __init__(
        self, place: Path, histograms: bool, package: Any, options: dict[str, Any]
    ) -> None:
        super().__init__("Weights & Biases", place, histograms)
        self.writes = ()  # each has a folder of its own there
        self._package = package
        self._options = options
        self._run: Any = None

    def _start(self, step: int) -> None:
        if self._step not in (None, step):  # steps of a run cannot be repeated
            self._finish(0)

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        if self._run is None:
            self._run = self._package.init(**self._options)
        self._run.log(values, step=step)

    def _histogram(
        self, step: int, name: str, values: np.ndarray, counts: np.ndarray, edges: np.ndarray
    ) -> None:
        self._scalars(step, {name: self._package.Histogram(np_histogram=(counts, edges))})

    def _image(self, step: int, name: str, png: bytes) -> None:
        import PIL.Image

        image = PIL.Image.open(io.BytesIO(png))
        self._scalars(step, {name: self._package.Image(image)})

    def _close(self, error: BaseException | None) -> None:
        if error is not None:
            self._finish(1)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code)
            self._run = None
