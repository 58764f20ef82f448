"""Comparisons of runs, and interruptions, that the tests of training share."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jaxtrain as jt
from tests.checkpoint.helpers import assert_identical


class Stop(Exception):
    """Ends a run."""


def stop_at(epoch: int, step: int) -> jt.callbacks.Callback:
    """A callback that ends a run after a step of an epoch."""

    def stop(run: jt.Run) -> None:
        if (run.epoch + 1, run.step) >= (epoch, step):
            raise Stop

    return jt.callbacks.every_steps(1, stop)


def without_clock(history: Any) -> dict[str, np.ndarray]:
    """Returns the columns that are the same in each run."""
    return {name: values for name, values in history.items() if name != "seconds"}


def assert_same_run(ours: Any, theirs: Any) -> None:
    """Compares every bit of the states and the histories."""
    assert_identical(ours[0], theirs[0])
    assert_identical(without_clock(ours[1]), without_clock(theirs[1]))
    assert_identical(ours[1].step_losses, theirs[1].step_losses)


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Compares the leaves of two pytrees."""
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=atol),
        ours,
        theirs,
    )
