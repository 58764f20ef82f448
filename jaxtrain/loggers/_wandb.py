"""wandb: runs of Weights & Biases, on disk unless asked otherwise."""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager
from typing import Any, Literal

from jaxtrain._extras import needs_extra
from jaxtrain.errors import InputError
from jaxtrain.loggers._histograms import histograms as histograms_of
from jaxtrain.loggers._logger import Logger, Writer, checked_folder, learning_rate, open_logger
from jaxtrain.training.events import EpochDone, StepsDone

_MODES = ("offline", "online")


def wandb(
    project: str,
    *,
    mode: Literal["offline", "online"] = "offline",
    folder: str | os.PathLike[str] = ".",
    histograms: bool = False,
    **options: Any,
) -> AbstractContextManager[Logger]:
    """Writes a run of Weights & Biases, with the scalars of `tensorboard`.

    A run that is offline needs no account and no network; `wandb sync FOLDER/wandb/offline-run-*`
    uploads it later. A run of `fit` that resumes is a second run of Weights & Biases.

    Args:
      project: the project.
      mode: "offline" writes to the disk only, "online" also uploads.
      folder: where the folder `wandb` is made.
      histograms: also write a histogram of every array of the parameters after each epoch, with the
        names of `save_params`.
      **options: passed on to `wandb.init`, such as `name`, `config`, `group` and `tags`.

    Returns:
      A context manager; its value is the function to pass as `on_event`. Its method `picture` adds
      pictures.

    Raises:
      MissingExtraError: `jaxtrain[wandb]` is not installed.
      InputError: the mode is unknown, or the folder cannot be made or written.

    Example:
      >>> with jt.loggers.wandb("digits", config={"learning_rate": 0.01}) as log:
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=log)
    """
    with needs_extra("wandb"):
        import wandb as package
    if mode not in _MODES:
        raise InputError(f"mode is {mode!r}; expected one of {', '.join(_MODES)}", argument="mode")
    path = checked_folder(folder, "folder")
    settings = package.Settings(silent=True, console="off")  # leaves stdout and stderr alone
    options = {"settings": settings, "reinit": "create_new", **options}
    options |= {"project": project, "mode": mode, "dir": path}
    return open_logger("Weights & Biases", path / "wandb", _Wandb(package, histograms, options))


class _Wandb(Writer):
    takes_pictures = True

    def __init__(self, package: Any, histograms: bool, options: dict[str, Any]) -> None:
        self._package = package
        self._histograms = histograms
        self._options = options
        self._run: Any = None

    def start(self, step: int) -> None:
        self.start_without_run()

    def start_without_run(self) -> None:
        self.close()  # steps of a run cannot be repeated
        self._run = self._package.init(**self._options)

    def steps(self, event: StepsDone, first: int) -> None:
        for step, loss in enumerate(event.losses.tolist(), first):
            self._run.log({"step_loss": loss}, step=step)
        rate = learning_rate(event.state)
        if rate is not None:
            self._run.log({"learning_rate": rate}, step=first + len(event.losses) - 1)

    def epoch(self, event: EpochDone, step: int) -> None:
        row: dict[str, Any] = dict(event.metrics)
        for name, _, counts, edges in histograms_of(event.state) if self._histograms else ():
            row[name] = self._package.Histogram(np_histogram=(counts, edges))
        self._run.log(row, step=step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        import PIL.Image

        image = PIL.Image.open(io.BytesIO(png))
        self._run.log({name: self._package.Image(image)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
