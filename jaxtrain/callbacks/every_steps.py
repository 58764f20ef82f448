"""every_steps: calls a function after every so many steps of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxtrain._arguments import check_integer
from jaxtrain.callbacks._callback import Callback, FunctionCallback
from jaxtrain.errors import InputError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


def every_steps(steps: int, function: Callable[[Run], Any] | Callback) -> Callback:
    """Calls a function after every multiple of `steps` steps of an epoch.

    `fit` itself calls `on_steps` about once per second; this callback makes it pause at these
    steps. Each pause waits for the device, so choose `steps` so that they take milliseconds.

    Args:
      steps: steps between two calls, counted from the start of each epoch.
      function: called as `function(run)`, where `run.losses` are those of the last `steps` steps;
        what it returns is ignored. Of a `Callback`, `on_steps` is called at these steps, and its
        other methods as usual.

    Raises:
      InputError: an argument has another type or is out of range.

    Example:
      >>> steps = []
      >>> state, history = jt.fit(
      ...     state, train, loss_fn=loss_fn, epochs=1, batch_size=16,
      ...     callbacks=[jt.callbacks.every_steps(2, lambda run: steps.append(run.step))],
      ... )
      >>> steps
      [2, 4]
    """
    check_integer(steps, "steps", minimum=1)
    if not isinstance(function, Callback) and not callable(function):
        raise InputError(
            f"function is {function!r}; expected a function of the run or a callback",
            argument="function",
        )
    if not isinstance(function, Callback):
        function = FunctionCallback("on_steps", function)
    return _EverySteps(steps, function)


class _EverySteps(Callback):
    """What `every_steps` returns."""

    def __init__(self, steps: int, callback: Callback) -> None:
        self._steps, self._callback = steps, callback
        self.monitor, self.saves, self.writes = callback.monitor, callback.saves, callback.writes

    def next_pause(self, run: Run) -> int:
        """Returns the next multiple of `steps`."""
        return (run.step // self._steps + 1) * self._steps

    def on_steps(self, run: Run) -> None:
        """Calls the callback at the multiples of `steps`."""
        if run.step % self._steps == 0:
            self._callback.on_steps(run.replace(losses=run.log.loss[-self._steps :]))

    def on_start(self, run: Run) -> Run | None:
        """Calls the callback's."""
        return self._callback.on_start(run)

    def on_epoch(self, run: Run) -> Run | bool | None:
        """Calls the callback's."""
        return self._callback.on_epoch(run)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Calls the callback's."""
        self._callback.on_end(run, error)
