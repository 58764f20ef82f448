"""Callback: what `fit` and `sweep` call as they proceed."""

from __future__ import annotations

import collections
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxtrain.errors import InputError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


class SweepProgress(NamedTuple):
    """What `sweep` reports, as it starts and after each batch of runs.

    Attributes:
      done: runs that have finished; as the sweep starts, those restored from its checkpoint folder.
      total: runs of the sweep.
      at_once: runs of the batch, which are trained at once; 0 as the sweep starts.
      compile_seconds: time of compiling the batch's program; 0 if it was compiled before.
      seconds: time of training the batch.
      kind: "started"; "trained" after a batch; "halved" if a batch does not fit in memory, so that
        `at_once` runs, half as many, are trained at once from now on.
    """

    done: int
    total: int
    at_once: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    kind: Literal["started", "trained", "halved"] = "trained"


class Callback:
    """What `fit` calls as a run proceeds; override the methods that you need.

    A plain function `callback(run)` is an `on_epoch`. An exception from a callback
    ends the run. With several processes, all of them call their callbacks; the decisions of process
    0 apply to all.

    Attributes:
      monitor: the column of the history by which the callback judges an epoch; None if it does not.
      writes: the files or folders that the callback writes as a log, absolute; no other callback of
        the same call may write them.
      saves: whether the callback stores runs. Such callbacks are started first, so that the others
        see a restored run, and are otherwise called last, so that they store what the others
        decided.

    Example:
      >>> class StopAtLoss(jt.callbacks.Callback):
      ...     def on_epoch(self, run):
      ...         return run.rows[-1]["train_loss"] < 1e-3
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[StopAtLoss()])
    """

    monitor: str | None = None
    saves: bool = False
    writes: tuple[Path, ...] = ()

    def on_start(self, run: Run) -> Run | None:
        """Called before the first step; a run that it returns replaces the current one."""

    def next_pause(self, run: Run) -> int | None:
        """Returns the step of this epoch after which `on_steps` must be called next, or None.

        `fit` also calls `on_steps` about once per second, and after the last step of each epoch,
        before its evaluation.
        """

    def on_steps(self, run: Run) -> None:
        """Called after a block of steps; `run.losses` are those since the previous call.

        The arrays of `run.state` are valid during the call only: the next steps reuse their memory.
        """

    def on_epoch(self, run: Run) -> Any:
        """Called after each epoch's evaluation.

        Returns:
          True to end the run; a changed state, such as `jt.set_learning_rate(run.state, 1e-4)`, or
          a changed run (`run.replace(...)`), to replace the current one; or None. A changed state
          has the structure, the shapes and the dtypes of `run.state`. Another value is an error.
        """

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Called at the end of each run, also after an error, and also if `on_start` raised one."""

    def on_runs(self, progress: SweepProgress) -> None:
        """Called by `sweep` as it starts and after each batch of runs."""

    def on_runs_end(self, error: BaseException | None) -> None:
        """Called at the end of each sweep that was started, also after an error."""


class FunctionCallback(Callback):
    """A function in the place of one method."""

    def __init__(self, method: str, function: Callable[[Any], Any]) -> None:
        setattr(self, method, function)


def checked_callbacks(callbacks: Any, method: str) -> list[Callback]:
    """Returns the callbacks of `fit` or `sweep`, where a function takes the place of `method`."""
    if isinstance(callbacks, Callback) or not np.iterable(callbacks):
        raise InputError(
            f"callbacks is {callbacks!r}; expected a list, such as [jaxtrain.callbacks.progress()]",
            argument="callbacks",
        )
    found = list(callbacks)
    for each in found:
        if problem := _problem(each):
            raise InputError(f"callbacks has {problem}", argument="callbacks")
    written = collections.Counter(path for each in found for path in getattr(each, "writes", ()))
    for path, count in written.items():
        if count > 1:
            raise InputError(
                f"callbacks has {count} loggers that write {path}; expected one, or other files",
                argument="callbacks",
            )
    return [
        each if isinstance(each, Callback) else FunctionCallback(method, each) for each in found
    ]


def _problem(each: Any) -> str | None:
    """Returns what is wrong with a callback, and what was expected."""
    if isinstance(each, type):
        return f"the class {each.__name__}; expected an object, such as {each.__name__}(...)"
    if not isinstance(each, Callback) and not callable(each):
        return f"{each!r}; expected what jaxtrain.callbacks returns, or a function"
    module = getattr(each, "__module__", None) or ""
    if isinstance(each, types.FunctionType) and module.startswith("jaxtrain.callbacks."):
        name = each.__name__
        return f"the function {name} itself; expected its result, jaxtrain.callbacks.{name}(...)"
    if not isinstance(each, Callback):
        try:
            inspect.signature(each).bind(None)
        except TypeError as error:
            name = getattr(each, "__name__", type(each).__name__)
            return f"the function {name}, which is called with one argument: {error}"
        except ValueError:  # such as a function in C
            pass
    known = [name for name in dir(Callback) if name.startswith("on_")]
    if isinstance(each, Callback):
        for name in dir(each):
            if name.startswith("on_") and name not in known:
                return (
                    f"the callback {type(each).__name__} with the method {name}, which is never "
                    f"called; expected {', '.join(known)}"
                )
    return None


def check_column(
    name: str, columns: Sequence[str], subject: str, argument: str = "callbacks"
) -> None:
    """Raises InputError unless the history has the column that a callback watches.

    `subject` begins the sentence, such as "early_stopping monitors".
    """
    if name not in columns:
        hint = ""
        if name.startswith("validation_"):
            hint, argument = (
                ", or validation=, for example from train.split(0.1, key)",
                "validation",
            )
        raise InputError(
            f"{subject} {name!r}, but the history has the columns {', '.join(columns)}; expected "
            f"one with a number per epoch{hint}",
            argument=argument,
        )


def check_number(
    name: str, row: Mapping[str, Any], subject: str, argument: str = "callbacks"
) -> None:
    """Raises InputError unless a watched column has a number per epoch, not an array."""
    if np.ndim(row[name]):
        numbers = [name for name, value in row.items() if np.ndim(value) == 0]
        raise InputError(
            f"{subject} {name!r}, which has an array per epoch; expected one of "
            f"{', '.join(numbers)}",
            argument=argument,
        )
