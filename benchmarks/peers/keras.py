"""Keras 3 on JAX as a peer: `model.fit`, with one or several steps per execution."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax.numpy as jnp
import keras
import numpy as np

from benchmarks.problem import PIXELS, Params, Problem, Trainer, normalize

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


def _trainer(problem: Problem, params: Params, steps_per_execution: int) -> Trainer:
    keras.utils.set_random_seed(0)
    layers: list[keras.layers.Layer] = [keras.Input((PIXELS,))]
    for width in problem.features[:-1]:
        layers += [keras.layers.Dense(width, "relu"), keras.layers.Dropout(problem.dropout_rate)]
    model = keras.Sequential([*layers, keras.layers.Dense(problem.features[-1])])
    model.set_weights(
        [params[f"Dense_{k}"][part] for k in range(len(params)) for part in ("kernel", "bias")]
    )
    model.compile(
        # Keras decouples the decay, which is the same for plain SGD.
        optimizer=keras.optimizers.SGD(problem.learning_rate, weight_decay=problem.weight_decay),
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

    def fit_once(callbacks: list[keras.callbacks.Callback]) -> None:
        model.fit(
            inputs,
            targets,
            batch_size=problem.batch_size,
            epochs=1,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )

    def losses() -> np.ndarray:
        running = _RunningMeans()
        fit_once([running])
        seen = np.minimum(
            np.arange(1, len(running.means) + 1) * problem.batch_size * steps_per_execution,
            len(inputs),
        )
        totals = np.array(running.means) * seen
        return np.diff(totals, prepend=0) / np.diff(seen, prepend=0)

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        found = model.predict(normalize(images), batch_size=1000, verbose=0).argmax(-1)
        return float((found == labels).mean())

    return Trainer(steps, lambda: fit_once([]), losses, accuracy)
