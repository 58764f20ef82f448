"""One of two processes that should train together, and that differ in one thing at a time.

    python -m tests.parallel.disagreeing_member ADDRESS PROCESSES PROCESS_ID

Prints the error of each case as a line of JSON, with null where there was none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import jaxtrain as jt

EXAMPLES, BATCH = 32, 8
LOSS = jt.losses.cross_entropy


def halved(predictions: Any, targets: Any) -> Any:
    return LOSS(predictions, targets) / 2


def data(*, examples: int = EXAMPLES, scale: float = 1.0) -> jt.Dataset:
    inputs = np.random.default_rng(0).normal(size=(EXAMPLES, 4)).astype(np.float32)
    return jt.Dataset(inputs * scale, inputs.argmax(axis=1))[:examples]


def start(*, seed: int = 0, optimizer: Any = None) -> jt.TrainState:
    model = jt.models.FeedForward((4,), mean=0.0, std=1.0)
    optimizer = jt.optimizers.sgd(0.1) if optimizer is None else optimizer
    return jt.init_state(model, optimizer, data().inputs[:1], key=jax.random.key(seed))


def batches(sizes: list[int]) -> list[jt.Dataset]:
    return [data()[:size] for size in sizes]


def stream(*, seed: int = 0, batch_size: int = BATCH) -> Any:
    return jt.data.stream(data(), batch_size, jax.random.key(seed))


def change(run: jt.Run) -> Any:
    return jt.set_learning_rate(run.state, 0.01)


def fit(
    state: jt.TrainState | None = None,
    train: Any = None,
    test: Any = None,
    *,
    loss_fn: Any = LOSS,
    epochs: int = 1,
    batch_size: int = BATCH,
    seed: int | None = 0,
    callbacks: Any = (),
    **options: Any,
) -> Any:
    return jt.fit(
        start() if state is None else state,
        data() if train is None else train,
        test,
        loss_fn=loss_fn,
        epochs=epochs,
        batch_size=batch_size,
        key=None if seed is None else jax.random.key(seed),
        callbacks=list(callbacks),
        mesh=MESH,
        **options,
    )


def on_stream(train: Any) -> Any:
    return fit(train=train, seed=None)


def step(loss_fn: Any = LOSS, scale: float = 1.0) -> Any:
    """Takes a step on arrays that were placed on the mesh without the library."""
    state = start()

    def place(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jt.parallel.replicate(leaf, MESH)
        values = np.asarray(leaf) * np.asarray(scale, leaf.dtype)
        sharding = jax.NamedSharding(MESH, jax.P())
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    state = jax.tree.map(place, state)
    return jt.train_step(state, jt.parallel.shard(data(), MESH), loss_fn)


# What each of the two processes calls; processes that agree give no error.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "nothing": (fit, fit),
    "nothing on streams": (lambda: on_stream(stream()), lambda: on_stream(stream())),
    "learning rate": (fit, lambda: fit(start(optimizer=jt.optimizers.sgd(0.2)))),
    "rate of optax": (
        lambda: fit(start(optimizer=optax.sgd(0.1))),
        lambda: fit(start(optimizer=optax.sgd(0.2))),
    ),
    "initial key": (fit, lambda: fit(start(seed=1))),
    "shuffle key": (fit, lambda: fit(seed=1)),
    "data scale": (fit, lambda: fit(train=data(scale=2.0))),
    "batch size": (fit, lambda: fit(batch_size=16)),
    "examples": (fit, lambda: fit(train=data(examples=16))),
    "sharded examples": (
        lambda: jt.parallel.shard(data(), MESH),
        lambda: jt.parallel.shard(data(examples=16), MESH),
    ),
    "loss": (fit, lambda: fit(loss_fn=halved)),
    "epochs": (fit, lambda: fit(epochs=2)),
    "metrics": (fit, lambda: fit(metric_fns={"accuracy": jt.metrics.accuracy})),
    "test data": (lambda: fit(test=data()), fit),
    "stream key": (lambda: on_stream(stream()), lambda: on_stream(stream(seed=1))),
    "rows per batch": (lambda: on_stream(stream()), lambda: on_stream(stream(batch_size=16))),
    "number of batches": (
        lambda: on_stream(iter(batches([8, 8, 8]))),
        lambda: on_stream(iter(batches([8, 8]))),
    ),
    "rows of a later batch": (
        lambda: on_stream(iter(batches([8, 8, 4]))),
        lambda: on_stream(iter(batches([8, 8, 2]))),
    ),
    "callback": (lambda: fit(callbacks=[change]), fit),
    "judge": (lambda: fit(callbacks=[jt.callbacks.early_stopping(2, "train_loss")]), fit),
    "train": (
        lambda: jt.train(start(), data(), loss_fn=LOSS, epochs=1),
        lambda: jt.train(start(), data(), loss_fn=LOSS, epochs=2),
    ),
    "copies": (
        lambda: jt.parallel.replicate({"w": np.zeros(3)}, MESH),
        lambda: jt.parallel.replicate({"w": np.ones(3)}, MESH),
    ),
    "values in a step": (step, lambda: step(scale=2.0)),
}


if __name__ == "__main__":
    address, processes, process_id = sys.argv[1:4]
    jt.parallel.initialize(address, int(processes), int(process_id))
    MESH = jax.make_mesh((int(processes),), ("data",))
    for name, calls in CASES.items():
        message = None
        try:
            with jax.set_mesh(MESH):
                calls[jax.process_index()]()
        except jt.errors.InputError as error:
            message = str(error)
        print(json.dumps([name, message]), flush=True)
