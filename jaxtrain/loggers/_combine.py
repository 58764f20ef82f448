"""combine: several callbacks as one, of which none can end the run by an error."""

from __future__ import annotations

import math
import warnings
from typing import Any

from jaxtrain.errors import InputError, printable
from jaxtrain.loggers._logger import Logger, check_picture, describe_error
from jaxtrain.training.events import Event, EverySteps, OnEvent, returned_true


class Combined:
    """A callback for `fit` that calls several, each until it fails; `combine` returns it.

    Attributes:
      steps_between_events: as of `jt.events.every_steps`; 0 if no callback asks for steps.
    """

    def __init__(self, callbacks: list[OnEvent], steps_between_events: int) -> None:
        """Is called by `combine`."""
        self._callbacks = callbacks
        self.steps_between_events = steps_between_events

    def __call__(self, event: Event) -> bool:
        """Calls the callbacks in their order, and returns whether any of them returned True."""
        ends = False
        for callback in list(self._callbacks):
            try:
                ends = returned_true(callback(event)) or ends
            except Exception as error:
                self._callbacks.remove(callback)
                warnings.warn(
                    printable(
                        f"the callback {_name(callback)} failed ({describe_error(error)}); it is "
                        "not called again, and training continues"
                    ),
                    stacklevel=2,
                )
        return ends

    def picture(self, name: str, picture: Any) -> None:
        """Logs a picture by all loggers among the callbacks, at their latest steps.

        Args:
          name: its name.
          picture: a matplotlib figure, or the content of a PNG file.

        Raises:
          InputError: it is something else.
        """
        check_picture(picture)
        for callback in map(_unwrapped, self._callbacks):
            if isinstance(callback, Logger | Combined):
                callback.picture(name, picture)


def combine(*on_events: OnEvent) -> Combined:
    """Returns one callback for `fit` or `sweep` that calls several, in their order.

    If one of them raises an `Exception`, it is not called again; a warning says so, and training
    continues. `KeyboardInterrupt`, `SystemExit` and other exceptions that are not an `Exception`
    propagate.

    Args:
      *on_events: the callbacks: what `jt.progress()` or a logger yields, or functions of your own.

    Returns:
      A callback that returns True if any of them did, which ends the run. `fit` reports `StepsDone`
      to all of them at every step that one asks for by `every_steps`: at each multiple of the
      greatest common divisor of their steps. Its method `picture` passes a picture to all loggers.

    Raises:
      InputError: an argument is not a callback, for example a context manager that was not entered.

    Example:
      >>> with jt.progress() as bar, jt.loggers.csv("log.csv") as log:
      ...     on_event = jt.loggers.combine(bar, log)
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=on_event)
    """
    for on_event in on_events:
        if hasattr(on_event, "__enter__") or not callable(on_event):
            kind = "a context manager" if hasattr(on_event, "__enter__") else repr(on_event)
            raise InputError(
                f"an argument of combine is {kind}; expected a function of one event, such as what "
                "`with jaxtrain.progress() as on_event` yields"
            )
    intervals = [getattr(on_event, "steps_between_events", 0) for on_event in on_events]
    return Combined(list(on_events), math.gcd(*intervals))


def _unwrapped(callback: Any) -> Any:
    while isinstance(callback, EverySteps):
        callback = callback.on_event
    return callback


def _name(callback: Any) -> str:
    inner = _unwrapped(callback)
    return getattr(inner, "__qualname__", None) or repr(inner)
