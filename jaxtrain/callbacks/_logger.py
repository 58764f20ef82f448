"""Logger: the base class of the callbacks that write logs; one that fails stops logging."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain._json import rounded
from jaxtrain._processes import shows_progress
from jaxtrain.callbacks._callback import Callback
from jaxtrain.errors import StorageError, first_line, printable
from jaxtrain.optimizers._inspect import current_learning_rate

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


class Logger(Callback):
    """A callback that writes the loss of every step and the history's row of every epoch.

    Nothing is written before the first steps, so a run that fails to compile replaces no log.
    Subclasses define the methods from `_start` to `_close`, which may raise any Exception.
    """

    def __init__(self, kind: str, place: Path, *others: Path) -> None:
        """Takes the name used in warnings, such as "CSV", and the files or the folder."""
        self.writes = tuple(path.resolve() for path in (place, *others))
        self._kind = kind
        self._place = place
        self._step: int | None = None  # the latest one logged; None before the first run
        self._has_started = False
        self._has_failed = False

    def on_start(self, run: Run) -> None:
        if run.resumed:  # removes what the log has about steps that are repeated
            self._attempt(self._continue_after, int(run.state.step))

    def on_steps(self, run: Run) -> None:
        if len(run.losses):
            self._attempt(self._log_steps, run)

    def on_epoch(self, run: Run) -> None:
        self._attempt(self._log_epoch, run)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        if self._has_started:
            self._attempt(self._close, error)
        self._has_started = False

    def _start(self, step: int) -> None:
        """Opens the files, and removes what they contain about steps after `step`."""

    def _write_steps(self, run: Run, losses: dict[int, float]) -> None:
        """Writes the losses of some steps, by step."""

    def _write_epoch(self, run: Run, step: int) -> None:
        """Writes `run.rows[-1]` at a step."""

    def _close(self, error: BaseException | None) -> None:
        """Closes the files; `error` is what ended the run or the log."""

    def _log_steps(self, run: Run) -> None:
        step = int(run.state.step)
        before = step - len(run.losses)
        self._continue_after(before)
        self._write_steps(run, dict(enumerate(run.losses.tolist(), before + 1)))
        self._step = step

    def _log_epoch(self, run: Run) -> None:
        step = int(run.state.step)
        self._continue_after(step)
        self._write_epoch(run, step)

    def _continue_after(self, step: int) -> None:
        """Starts if a run does, or if it repeats steps."""
        if not self._has_started or self._step is None or step < self._step:
            self._start(step)
        self._step, self._has_started = step, True

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Calls a function in process 0; if it fails, warns and stops logging."""
        if self._has_failed or not shows_progress():
            return
        try:
            action(*arguments)
        except Exception as error:
            self._has_failed = True
            with contextlib.suppress(Exception):
                self._close(error)
            warnings.warn(
                printable(
                    f"the {self._kind} logger cannot write to {self._place} ({_reason(error)}); "
                    "it stops logging, and training continues"
                ),
                stacklevel=2,
            )


def learning_rate(state: Any) -> float | None:
    """Returns the learning rate of the latest step, if the optimizer records one."""
    rate = current_learning_rate(getattr(state, "opt_state", None))
    return None if rate is None else rounded(rate)


def _reason(error: Exception) -> str:
    """Returns an error in a few words."""
    if isinstance(error, StorageError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    kind, reason = type(error).__name__, first_line(error)
    return kind if reason == kind else f"{kind}: {reason}"
