"""Keras 3 on JAX as a peer: `model.fit`, with one or several steps per execution."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax.numpy as jnp
import keras
import numpy as np

from benchmarks.networks import keras as networks
from benchmarks.problem import Optimizer, Params, Problem, Trainer, normalize

STEPS_PER_EXECUTION = 32


class _RunningMeans(keras.callbacks.Callback):
    """Collects Keras's running mean of the loss after each execution."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Appends the running mean."""
        assert logs is not None
        self.means.append(float(logs["loss"]))


def fit(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is `model.fit(epochs=1)`."""
    return _trainer(problem, params, steps_per_execution=1)


def fit_several_steps(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is `model.fit` with several steps per execution."""
    return _trainer(problem, params, steps_per_execution=STEPS_PER_EXECUTION)


def _optimizer(optimizer: Optimizer) -> keras.optimizers.Optimizer:
    if optimizer.name == "adam":
        # Keras adds epsilon before it corrects the bias, so that 1e-8 would weigh more at first.
        return keras.optimizers.Adam(optimizer.learning_rate, epsilon=1e-9)
    if optimizer.name == "adadelta":
        return keras.optimizers.Adadelta(optimizer.learning_rate, rho=0.9, epsilon=1e-6)
    # Keras decouples the decay, which is the same for plain SGD.
    return keras.optimizers.SGD(
        optimizer.learning_rate,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay or None,
    )


def _trainer(problem: Problem, params: Params, steps_per_execution: int) -> Trainer:
    keras.utils.set_random_seed(0)
    model = networks.make(problem, params)
    model.compile(
        optimizer=_optimizer(problem.optimizer),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
        jit_compile=True,
    )
    inputs, targets = normalize(problem.images), problem.labels.astype(np.int32)
    first = (
        jnp.asarray(inputs[: problem.batch_size]),
        jnp.asarray(targets[: problem.batch_size]),
    )

    def steps(count: int) -> None:
        for _ in range(count):
            model.train_on_batch(*first)

    def fit_epochs(epochs: int, callbacks: list[keras.callbacks.Callback]) -> None:
        model.fit(
            inputs,
            targets,
            batch_size=problem.batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )

    def losses() -> np.ndarray:
        running = _RunningMeans()
        fit_epochs(1, [running])
        seen = np.minimum(
            np.arange(1, len(running.means) + 1) * problem.batch_size * steps_per_execution,
            len(inputs),
        )
        totals = np.array(running.means) * seen
        return np.diff(totals, prepend=0) / np.diff(seen, prepend=0)

    def predict(images: np.ndarray) -> np.ndarray:
        return model.predict(images, batch_size=1000, verbose=0)

    return Trainer(
        lambda passes: fit_epochs(passes, []),
        losses,
        steps,
        predict,
        lambda: int(model.optimizer.iterations),
    )
