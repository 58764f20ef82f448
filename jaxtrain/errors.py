"""What can go wrong for a user, as exceptions that say so in one sentence."""

from __future__ import annotations


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


class NonFiniteLossError(ArithmeticError):
    """The training or test loss became NaN or infinite.

    Attributes:
      epoch: the epoch in which it happened, counted from 1.
      step: the step within that epoch, counted from 1; None for test or validation loss.
      loss: the loss.
      learning_rate: the rate of that step, or None where the optimizer does not record one.
      history: the history of the epochs finished before it.
    """

    def __init__(
        self,
        epoch: int,
        step: int | None,
        loss: float,
        learning_rate: float | None,
        history: dict,
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.loss = loss
        self.learning_rate = learning_rate
        self.history = history
        where = f"the test or validation loss became {loss} after epoch {epoch}"
        if step is not None:
            where = f"the training loss became {loss} in epoch {epoch}, step {step}"
        rate, smaller = "", "a smaller learning rate"
        if learning_rate is not None:
            rate = f" at learning rate {learning_rate:g}"
            smaller = f"{smaller} ({learning_rate / 10:g}, say)"
        super().__init__(
            f"{where}{rate}; try {smaller} or gradient clipping, and check the inputs for NaN or "
            "unscaled values"
        )
