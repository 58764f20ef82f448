"""Exceptions of the library; each message says in one sentence what is wrong and how to fix it.

What a call with wrong arguments raises:

- A function that runs, reads, writes or makes something raises one of these exceptions: `fit`,
  `evaluate`, `predict`, sweeps, files, data sets, callbacks, models and optimizers, for example.
- A function of arrays that may be part of a compiled program raises `InputError` for shapes that do
  not fit, options out of range, and what is not an array. These are losses and metrics,
  `models.dropout`, initializers, schedules, `minimize`, `gradients`, `apply_gradients` and
  `Dataset.take`. All else is left to JAX, which raises `TypeError`, or `ValueError` in some cases:
  for arrays of text or objects, masked arrays, and numbers that are too large, for example.
- A function of your own, such as a loss or a callback, raises its own exceptions unchanged.

`fit`, `sweep`, `find_learning_rate`, `update_batch_stats`, `summary`, `verify`, `compare`,
`data.stream`, `parallel`, and all functions that load, save or export raise `InputError` inside a
function that JAX traces, such as one under `jax.jit`. The others may be compiled.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


class InputError(ValueError):
    """An argument or a file is not what was expected.

    The message names the argument or file, its value, what was expected, and how to fix it.

    Attributes:
      argument: the name of the function argument that is wrong, or None.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        self.argument = argument
        super().__init__(printable(message))


class MissingExtraError(InputError, ImportError):
    """A feature needs a package that an extra of jaxtrain installs."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package {package} is not installed; install it with "
            f"pip install '.[{extra}]' in a clone, or pip install 'jaxtrain[{extra}]'"
        )


class DisagreementError(InputError):
    """Two implementations that should compute the same losses do not.

    Attributes:
      contender: the implementation that differs.
      step: the first step whose loss differs, counted from 1; None if mean losses were compared.
      found: its loss.
      expected: the loss of the reference.
    """

    def __init__(
        self, contender: str, step: int | None, found: float, expected: float, allowed: float
    ) -> None:
        self.contender = contender
        self.step = step
        self.found = found
        self.expected = expected
        what = "the mean loss" if step is None else f"the loss of step {step}"
        super().__init__(
            f"{what} is {found:.6g} in {contender} and {expected:.6g} in the reference; expected a "
            f"difference of at most {allowed:.1g}: check that both have the same loss, optimizer, "
            "data and model"
        )


class DataUnavailableError(InputError):
    """A data set is neither on disk nor available for download.

    Attributes:
      reason: what was tried.
      remedy: how to get the data set.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{reason}; {remedy}, or use the data set digits, which needs no network")


NO_SPACE = "no space left on the disk"


class StorageError(OSError):
    """A file of the run could not be written, for example because the disk is full.

    Attributes:
      path: the file or folder.
      reason: the operating system's message.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = path
        self.reason = reason
        hint = "free some space" if reason == NO_SPACE else "correct the cause"
        super().__init__(
            printable(f"{path} could not be written ({reason}); {hint} and start the run again")
        )


class OutOfMemoryError(MemoryError):
    """The device has too little memory for the run; the message names a batch size that fits.

    Attributes:
      batch_size: examples per step.
      fitting: a batch size that should fit, or None if not even one example does.
      argument: the argument that sets the batch size, `batch_size` or `test_batch_size`.
    """

    def __init__(
        self, batch_size: int, fitting: int | None, detail: str, argument: str = "batch_size"
    ) -> None:
        self.batch_size = batch_size
        self.fitting = fitting
        self.argument = argument
        hint = "use a device with more memory, less data at once or a smaller model"
        if fitting is not None:
            hint = f"try {argument} {fitting}, an estimate of what fits"
        super().__init__(printable(f"out of memory at {argument} {batch_size} ({detail}); {hint}"))


class ProcessLostError(RuntimeError):
    """Another process of the cluster has ended, so that the training cannot continue.

    Attributes:
      process: the number of this process.
      processes: how many processes there were.
      reason: JAX's message.
    """

    def __init__(self, process: int, processes: int, reason: str) -> None:
        self.process = process
        self.processes = processes
        self.reason = reason
        super().__init__(
            printable(
                f"process {process} of {processes} lost the connection to another one ({reason}); "
                "start all processes again: a run with checkpoints resumes from the newest"
            )
        )


class StreamError(RuntimeError):
    """A stream of batches raised an error.

    Attributes:
      name: name used in error messages, such as "train".
      epoch: the epoch in which it happened, counted from 1; in a run by steps, the pass over the
        training data.
      batch: the batch that could not be read, counted from 1 in the epoch or pass.
      history: the history of the completed epochs.
      state: the state after the last completed epoch.
    """

    def __init__(
        self, name: str, epoch: int, batch: int, error: BaseException, unit: str = "epoch"
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.batch = batch
        self.history: dict[str, Any] = {}
        self.state: Any = None
        super().__init__(
            printable(
                f"{name} raised {type(error).__name__} at batch {batch} of {unit} {epoch} "
                f"({first_line(error)}); fix the stream and start the run again"
            )
        )


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or an array of the training state became NaN or infinite.

    Attributes:
      epoch: the epoch in which it happened, counted from 1.
      step: the step within that epoch, counted from 1, or None if only the epoch is known.
      quantity: what became non-finite, such as "training loss", "gradient norm" or "test loss".
      value: the value it became.
      learning_rate: the rate of that step, or None if the optimizer does not record one.
      hint: what to do if the general advice does not apply, else empty.
      history: the history of the completed epochs.
      state: the state after the last completed epoch.
    """

    def __init__(
        self,
        epoch: int,
        step: int | None,
        quantity: str,
        value: float,
        learning_rate: float | None,
        hint: str = "",
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.quantity = quantity
        self.value = value
        self.learning_rate = learning_rate
        self.hint = hint
        self.history: dict[str, Any] = {}
        self.state: Any = None
        where = f"after epoch {epoch}" if step is None else f"in epoch {epoch}, step {step}"
        rate = "" if learning_rate is None else f" at learning rate {learning_rate:g}"
        super().__init__(
            f"the {quantity} became {value:g} {where}{rate}; "
            f"{hint or _advice(quantity, value, learning_rate)}"
        )


def _advice(quantity: str, value: float, learning_rate: float | None) -> str:
    data = ""
    if quantity == "training loss" and value != value:  # NaN, as a label out of range gives
        data = "check that class labels are below the number of outputs, "
    smaller = "a smaller learning rate"
    if learning_rate is not None and 0 < learning_rate < float("inf"):
        smaller += f" (such as {learning_rate / 10:g})"
    return (
        f"{data}try {smaller}, gradient clipping (a maximum norm of 1, for example) or scaled "
        "inputs; "
        "optimizers.skip_nonfinite skips the steps of a few bad batches"
    )


def printable(text: str) -> str:
    """Escapes control characters and lone surrogates, so that a terminal prints them safely."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def message_of(error: BaseException) -> str:
    """Returns an error's message; its type where there is none, or the error cannot be printed."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # whatever the `__str__` of a user's error raises
        return type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return (message_of(error).splitlines() or [type(error).__name__])[0]


_RECOVERY = "kept: "


def add_recovery_note(error: BaseException, note: str) -> None:
    """Attaches a note to an error: what the run that it ended left on disk."""
    with contextlib.suppress(Exception):  # an error that takes no attributes
        error.add_note(_RECOVERY + printable(note))


def recovery_notes(error: BaseException) -> list[str]:
    """Returns the notes of `add_recovery_note`."""
    notes = getattr(error, "__notes__", [])
    return [note.removeprefix(_RECOVERY) for note in notes if note.startswith(_RECOVERY)]
