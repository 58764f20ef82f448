"""A small run that several tests of the loggers train."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jaxtrain as jt

LABELS = np.arange(50, dtype=np.int32) % 3
DATA = jt.Dataset(
    (np.eye(6)[LABELS] + 0.3 * np.random.default_rng(7).normal(size=(50, 6))).astype(np.float32),
    LABELS,
)
STEPS = 5  # per epoch, of 10 examples
MODEL = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
OPTIMIZER = jt.optimizers.sgd(0.1)
METRICS = {"accuracy": jt.metrics.accuracy}


def make_state() -> jt.TrainState:
    """A small network with dropout."""
    return jt.init_state(MODEL, OPTIMIZER, DATA.inputs[:1], key=jax.random.key(0))


def fit(
    callbacks: list[Any], epochs: int = 2, state: jt.TrainState | None = None, **options: Any
) -> tuple[jt.TrainState, Any]:
    """Trains it."""
    return jt.fit(
        make_state() if state is None else state,
        DATA,
        DATA,
        **{
            "loss_fn": jt.losses.cross_entropy,
            "metric_fns": METRICS,
            "epochs": epochs,
            "batch_size": 10,
            "key": jax.random.key(1),
            "callbacks": callbacks,
            **options,
        },
    )


def interrupt_at(epoch: int, step: int) -> jt.callbacks.Callback:
    """A callback that interrupts a run after a step of an epoch."""

    def interrupt(run: jt.Run) -> None:
        if (run.epoch + 1, run.step) == (epoch, step):
            raise KeyboardInterrupt

    return jt.callbacks.every_steps(1, interrupt)
