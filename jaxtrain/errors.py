"""What can go wrong for a user, as exceptions that say so in one sentence."""

from __future__ import annotations

import os


class InputError(ValueError):
    """An argument, a flag or a file is not what was expected.

    Its message names the thing, its value, what was expected, and the way out.
    Scripts print the message alone; everything else keeps its traceback.
    """


class DataUnavailableError(InputError):
    """A data set is neither on disk nor to be had from the network.

    Attributes:
      reason: what was tried.
      remedy: how to get the data set.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(
            f"{reason}; {remedy}, or take the data set digits, which needs no network "
            "(--dataset digits)"
        )


NO_SPACE = "no space left on the disk"


class StorageError(OSError):
    """What a run makes could not be written: a full disk, a folder that went away.

    Attributes:
      path: the file or folder.
      reason: what the system said.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = path
        self.reason = reason
        way_out = "make room" if reason == NO_SPACE else "mend that"
        super().__init__(f"{path} could not be written ({reason}); {way_out} and run it again")


class OutOfMemoryError(MemoryError):
    """The device has not the memory that a run asks for; the message names a batch size that fits.

    Attributes:
      batch_size: examples a step.
      fitting: a batch size that should fit, or None where not even one example does.
    """

    def __init__(
        self, batch_size: int, fitting: int | None, detail: str, flag: str = "batch_size"
    ) -> None:
        self.batch_size = batch_size
        self.fitting = fitting
        way_out = "expected a device with more memory, less data at once or a smaller model"
        if fitting is not None:
            way_out = f"an estimate of what fits is --{flag.replace('_', '-')} {fitting}"
        name = flag.replace("_", " ")
        super().__init__(f"out of memory at {name} {batch_size} ({detail}); {way_out}")


class NonFiniteLossError(ArithmeticError):
    """The training or test loss, or the gradient's norm, became NaN or infinite.

    Attributes:
      epoch: the epoch in which it happened, counted from 1.
      step: the step within that epoch, counted from 1; None for test or validation loss.
      quantity: what it was, "training loss", "gradient norm", "test loss" for instance.
      value: what it became.
      learning_rate: the rate of that step, or None where the optimizer does not record one.
      history: the history of the epochs finished before it.
    """

    def __init__(
        self,
        epoch: int,
        step: int | None,
        quantity: str,
        value: float,
        learning_rate: float | None,
        history: dict,
        skipping: bool = False,
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.quantity = quantity
        self.value = value
        self.learning_rate = learning_rate
        self.history = history
        where = f"the {quantity} became {value:g} after epoch {epoch}"
        if step is not None:
            where = f"the {quantity} became {value:g} in epoch {epoch}, step {step}"
        rate, smaller = "", "a smaller learning rate"
        if learning_rate is not None:
            rate = f" at learning rate {learning_rate:g}"
            smaller = f"{smaller} ({learning_rate / 10:g}, say)"
        skip = "" if skipping else "; on_nonfinite skip leaves out the steps of a few bad batches"
        super().__init__(
            f"{where}{rate}; try {smaller} or gradient clipping (a max_gradient_norm of 1, say), "
            f"and see that inputs are scaled{skip}"
        )


_KEPT = "kept: "


def note_what_is_kept(error: BaseException, note: str) -> None:
    """Let the error that cuts a run short tell what of it is on disk."""
    error.add_note(_KEPT + note)


def what_is_kept(error: BaseException) -> list[str]:
    """The notes of `note_what_is_kept`."""
    notes = getattr(error, "__notes__", [])
    return [note.removeprefix(_KEPT) for note in notes if note.startswith(_KEPT)]
