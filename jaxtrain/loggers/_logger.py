"""Logger: the callback of every logger, which passes events to a writer until that fails."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrain._arguments import checked_path
from jaxtrain._files import make_folder, read_regular_file
from jaxtrain._processes import shows_progress
from jaxtrain.errors import InputError, StorageError, printable
from jaxtrain.optimizers import current_learning_rate
from jaxtrain.training.events import EpochDone, Event, Resumed, StepsDone
from jaxtrain.training.state import TrainState

# The signature of a PNG file, and its first chunk up to the width and the height.
_PNG = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR.{8}", re.DOTALL)


class Writer:
    """Where a logger writes to; any method may raise any Exception.

    Attributes:
      takes_pictures: whether `picture` does something.
    """

    takes_pictures = False

    def start(self, step: int) -> None:
        """Opens the files, and drops what they contain about steps after `step`."""

    def start_without_run(self) -> None:
        """Opens the files and keeps what they contain: only pictures follow."""

    def steps(self, event: StepsDone, first: int) -> None:
        """Writes the losses of some steps, of which `first` is the number of the first."""

    def epoch(self, event: EpochDone, step: int) -> None:
        """Writes the row of an epoch that ended with this step."""

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Writes a picture, a PNG file."""

    def close(self) -> None:
        """Closes the files."""


class Logger:
    """A callback for `fit` that writes what is reported; the functions of this package yield it.

    Steps are counted over all epochs, from 1: `state.step` after the step. If writing fails, the
    logger warns once and is silent from then on; training continues.

    Example:
      >>> from matplotlib.figure import Figure
      >>> figure = Figure()
      >>> lines = figure.subplots().plot(train.targets)
      >>> with jt.loggers.tensorboard("tensorboard") as log:
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=log)
      ...     log.picture("labels", figure)
    """

    def __init__(self, name: str, place: Path, writer: Writer | None) -> None:
        """Is called by the functions of this package.

        Args:
          name: what it is to the user, such as "CSV".
          place: the file or folder.
          writer: what writes; None writes nothing.
        """
        self._name = name
        self._place = place
        self._writer = writer
        self._step: int | None = None  # the last one written; None before the start
        self._pictures: list[tuple[str, bytes]] = []  # before the first event, which has the step
        self._is_closed = False

    def __call__(self, event: Event) -> None:
        """Writes an event of `fit`; others are ignored.

        Raises:
          InputError: the logger is closed.
        """
        if self._is_closed:
            raise InputError(
                f"the {self._name} logger of {self._place} is closed; expected the call of fit "
                "inside its `with` block"
            )
        if isinstance(event, Resumed | StepsDone | EpochDone):
            self._attempt(lambda writer: self._write(writer, event))

    def picture(self, name: str, picture: Any) -> None:
        """Logs a picture at the latest step; loggers of text files ignore it.

        A picture before the first event is written with that event, or when the logger is closed.

        Args:
          name: its name.
          picture: a matplotlib figure, or the content of a PNG file.

        Raises:
          InputError: it is something else.
        """
        check_picture(picture)

        def write(writer: Writer) -> None:
            if writer.takes_pictures:
                self._pictures.append((name, _to_png(picture)))
                if self._step is not None:
                    self._write_pictures(writer, self._step)

        self._attempt(write)

    def close(self) -> None:
        """Closes the files; later events are an error."""
        self._attempt(self._finish)
        self._writer, self._is_closed = None, True

    def _finish(self, writer: Writer) -> None:
        if self._pictures:
            writer.start_without_run()
            self._write_pictures(writer, 0)
        writer.close()

    def _write(self, writer: Writer, event: Resumed | StepsDone | EpochDone) -> None:
        step = int(event.state.step)
        if isinstance(event, StepsDone):
            before = step - len(event.losses)
            self._start_after(writer, before)
            writer.steps(event, before + 1)
        else:
            self._start_after(writer, step)
            if isinstance(event, EpochDone):
                writer.epoch(event, step)
        self._step = step

    def _start_after(self, writer: Writer, step: int) -> None:
        """Starts at the first event, and again if another run begins or earlier steps repeat."""
        if self._step != step:
            writer.start(step)
            self._step = step
            self._write_pictures(writer, step)

    def _write_pictures(self, writer: Writer, step: int) -> None:
        for name, png in self._pictures:
            writer.picture(name, png, step)
        self._pictures.clear()

    def _attempt(self, action: Callable[[Writer], None]) -> None:
        """Calls a function of the writer; if it fails, warns and gives the writer up."""
        writer = self._writer
        if writer is None:
            return
        try:
            action(writer)
        except Exception as error:
            self._writer = None
            with contextlib.suppress(Exception):
                writer.close()
            warnings.warn(
                printable(
                    f"the {self._name} logger cannot write to {self._place} "
                    f"({describe_error(error)}); it stops logging, and training continues"
                ),
                stacklevel=2,
            )


@contextlib.contextmanager
def open_logger(name: str, place: Path, writer: Writer) -> Iterator[Logger]:
    """Yields a logger, which is closed at the end; only process 0 of several writes."""
    logger = Logger(name, place, writer if shows_progress() else None)
    try:
        yield logger
    finally:
        logger.close()


def check_picture(picture: Any) -> None:
    """Raises InputError unless it is a matplotlib figure or the content of a PNG file."""
    if hasattr(picture, "savefig") or (isinstance(picture, bytes) and _PNG.match(picture)):
        return
    is_bytes = isinstance(picture, bytes)
    found = f"{picture[:8]!r}..." if is_bytes else f"a {type(picture).__name__}"
    raise InputError(
        f"picture is {found}; expected a matplotlib figure, or the bytes of a PNG file",
        argument="picture",
    )


def describe_error(error: Exception) -> str:
    """Returns an error in a few words, for a warning."""
    if isinstance(error, StorageError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def checked_file(
    path: str | os.PathLike[str], argument: str, is_log: Callable[[bytes], bool]
) -> Path:
    """Returns the path of a file to write, and makes its folder.

    Args:
      path: the file.
      argument: the name of the argument.
      is_log: returns whether the first line of a file, without its end, is that of a log.

    Raises:
      InputError: it is not a regular file, it has content that is
        not a log, or the folder cannot be made or written.
    """
    found = checked_path(path, argument)
    if found.is_symlink() or (found.exists() and not found.is_file()):
        raise InputError(
            f"{argument} is {found}, which is not a regular file; expected the name of a file",
            argument=argument,
        )
    if shows_progress():
        make_folder(found.parent, "folder of the log")
        with contextlib.suppress(OSError):  # is missing, or a warning when writing starts
            content = read_regular_file(found)
            first = content.partition(b"\n")[0]
            if content and not is_log(first):
                raise InputError(
                    f"{argument} is {found}, which contains something else than a log "
                    f"({first[:40]!r}); expected a new file, or one by this logger",
                    argument=argument,
                )
    return found


def checked_folder(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns the path of a folder, which is made if it is missing.

    Raises:
      InputError: it cannot be made or written.
    """
    found = checked_path(path, argument)
    if shows_progress():
        make_folder(found, "folder of the log")
    return found


def learning_rate(state: TrainState) -> float | None:
    """Returns the learning rate of the latest step, if the optimizer records one."""
    rate = current_learning_rate(state.opt_state)
    # float32 has seven digits: 0.01, not 0.009999999776.
    return None if rate is None else float(f"{float(rate):.7g}")


def _to_png(picture: Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    from jaxtrain._figures import to_png  # matplotlib, which has made the figure

    return to_png(picture)
