"""profile: a trace of some steps of a run, for Perfetto and TensorBoard."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxtrain._arguments import check_arguments, check_integer, checked_path
from jaxtrain._files import make_folder
from jaxtrain._processes import are_joined
from jaxtrain.callbacks._callback import Callback
from jaxtrain.errors import InputError, StorageError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


def profile(folder: str | os.PathLike[str], steps: tuple[int, int] = (10, 20)) -> Callback:
    """Writes a trace of some steps, which Perfetto and TensorBoard open.

    Each process of several writes the trace of its own devices, to a subfolder. A run that ends
    within the range writes what it has traced.

    Args:
      folder: where to write; made if it is missing.
      steps: first step of the trace, and the step after its last one, counted from 0 over the steps
        that the call of `fit` takes. A range that starts at 0 also traces the compilation, and one
        that includes the end of an epoch the evaluation.

    Raises:
      InputError: an argument has another type or is out of range; `fit` raises it if the folder
        cannot be written or another trace is running.
      StorageError: `fit` raises it if the trace cannot be written.

    Example:
      >>> trace = jt.callbacks.profile("trace", steps=(2, 4))
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, batch_size=16, callbacks=[trace])
    """
    check_arguments(profile, locals())
    folder = checked_path(folder, "folder")
    check_integer(steps[0], "steps[0]", minimum=0)
    check_integer(steps[1], "steps[1]", minimum=int(steps[0]) + 1)
    return _Profile(folder, int(steps[0]), int(steps[1]))


class _Profile(Callback):
    """What `profile` returns: traces the steps `first` to `last - 1` of a call of `fit`."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._taken = 0  # steps of this call, up to the last `on_steps`
        self._path = folder  # of this process
        self._temporary: Path | None = None  # while tracing
        self._trace = contextlib.ExitStack()  # the trace
        self._block = contextlib.ExitStack()  # the annotation of a block of steps

    def on_start(self, run: Run) -> None:
        """Makes the folder, tries the profiler, and starts the trace if it includes step 0."""
        self._taken = 0
        self._path = self._folder
        if are_joined():  # processes on one machine would write the same files
            self._path /= f"process_{jax.process_index()}"
        make_folder(self._path, "profile folder")
        # Another trace is found now, and the first use of the profiler, which may take seconds, is
        # not part of the trace.
        with _temporary_trace(self._path):
            jax.profiler.stop_trace()
        self._start_if_due()

    def next_pause(self, run: Run) -> int | None:
        """Returns where the range starts or ends, and annotates the steps until then."""
        taken = self._taken + len(run.losses)
        if self._temporary is not None:
            self._block.close()
            name = f"train steps from {taken}"
            self._block.enter_context(jax.profiler.TraceAnnotation(name))
        bound = self._first if taken < self._first else self._last
        return run.step + bound - taken if bound > taken else None

    def on_steps(self, run: Run) -> None:
        """Starts or stops the trace at the bounds of the range."""
        self._block.close()
        self._taken += len(run.losses)
        if self._taken >= self._last:
            self._stop()
        self._start_if_due()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Writes the trace of a run that ends within the range; warns of a range never reached."""
        self._block.close()
        if error is not None:
            with contextlib.suppress(StorageError):  # the error of the run matters more
                self._stop()
            return
        self._stop()
        if self._taken <= self._first:
            warnings.warn(
                f"steps is ({self._first}, {self._last}), but this call of fit took {self._taken} "
                "steps, so no trace was written; choose steps that it takes",
                stacklevel=5,
            )

    def _start_if_due(self) -> None:
        if self._taken == self._first:
            self._temporary = self._trace.enter_context(_temporary_trace(self._path))

    def _stop(self) -> None:
        """Ends the trace, and writes it if it has steps."""
        if self._temporary is None:
            return
        temporary, self._temporary = self._temporary, None
        with self._trace:
            try:
                jax.profiler.stop_trace()
                if self._taken > self._first:
                    shutil.copytree(temporary, self._path, dirs_exist_ok=True)
            except (OSError, ValueError, RuntimeError) as error:
                # shutil.Error lists each file with its reason.
                reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else str(error)
                raise StorageError(self._path, reason.splitlines()[0]) from error


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
                argument="callbacks",
            ) from error
        yield Path(temporary)
