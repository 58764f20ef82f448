"""Profile: a trace of some steps of a call of `fit`, for Perfetto and TensorBoard."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain._arguments import check_integer
from jaxtrain._files import make_folder
from jaxtrain._processes import are_joined
from jaxtrain.errors import InputError, StorageError
from jaxtrain.training._chunk import Chunk


class Profile:
    """Traces the steps `first` to `last - 1` of a call of `fit`, counted from 0.

    Attributes:
      steps_taken: steps that the call has taken.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self.steps_taken = 0
        self._trace = contextlib.ExitStack()
        self._temporary: Path | None = None  # while tracing

    def ends(self, step: int) -> tuple[int, int]:
        """Returns the steps of an epoch at which a chunk must end, which may be past its end.

        Args:
          step: the next step of the epoch.
        """
        offset = step - self.steps_taken
        return self._first + offset, self._last + offset

    @contextlib.contextmanager
    def chunk(self, chunk: Chunk) -> Iterator[None]:
        """Traces the body, which takes the steps of a chunk, if they are in the range."""
        steps = chunk.stop - chunk.start
        if self.steps_taken == self._first:
            self._temporary = self._trace.enter_context(_temporary_trace(self._folder))
        end = self.steps_taken + steps
        with jax.profiler.TraceAnnotation(f"train steps {self.steps_taken} to {end - 1}"):
            yield  # returns after the device is done, since the host reads the losses
        self.steps_taken = end
        if self.steps_taken == self._last:
            self._stop()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Writes the trace of a run that ends within the range; warns of a range never reached."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StorageError):  # the error of the run matters more
                self._stop()
            raise
        self._stop()
        if self.steps_taken <= self._first:
            warnings.warn(
                f"profile_steps is ({self._first}, {self._last}), but this call of fit took "
                f"{self.steps_taken} steps, so no trace was written; choose steps that it takes",
                stacklevel=5,
            )

    def _stop(self) -> None:
        if self._temporary is None:
            return
        temporary, self._temporary = self._temporary, None
        with self._trace:
            try:
                jax.profiler.stop_trace()
                shutil.copytree(temporary, self._folder, dirs_exist_ok=True)
            except (OSError, ValueError, RuntimeError) as error:
                # shutil.Error lists each file with its reason.
                reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else str(error)
                raise StorageError(self._folder, reason.splitlines()[0]) from error


def make_profile(folder: Any, steps: Any) -> Profile | None:
    """Returns the profile of a call of `fit`, its arguments checked; None without a folder.

    Raises:
      InputError: an argument is out of range, the folder cannot be written, or another trace runs.
    """
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise InputError(
            f"profile_steps is {steps!r}; expected a pair (first, last), such as (10, 20)",
            argument="profile_steps",
        )
    check_integer(steps[0], "profile_steps[0]", minimum=0)
    check_integer(steps[1], "profile_steps[1]", minimum=int(steps[0]) + 1)
    if folder is None:
        return None
    if not isinstance(folder, str | os.PathLike):
        raise InputError(
            f"profile is {folder!r}; expected the path of a folder", argument="profile"
        )
    path = Path(folder)
    if are_joined():  # processes on one machine would write the same files
        path /= f"process_{jax.process_index()}"
    make_folder(path, "profile folder")
    # Another trace is found now, and the first use of the profiler, which may take seconds, is not
    # part of the trace.
    with _temporary_trace(path):
        jax.profiler.stop_trace()
    return Profile(path, int(steps[0]), int(steps[1]))


@contextlib.contextmanager
def _temporary_trace(folder: Path) -> Iterator[Path]:
    """Starts a trace into a temporary folder.

    If `stop_trace` cannot write its folder, JAX 0.10 refuses every later trace of the process.
    """
    with tempfile.TemporaryDirectory() as temporary:
        try:
            jax.profiler.start_trace(temporary, create_perfetto_trace=True)
        except RuntimeError as error:
            raise InputError(
                f"the trace in {folder} cannot be started ({str(error).splitlines()[0]}); expected "
                "no other trace: end it with jax.profiler.stop_trace(), or leave out profile",
                argument="profile",
            ) from error
        yield Path(temporary)
