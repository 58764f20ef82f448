"""One of two processes that save and restore a state that is divided between them.

    python -m tests.parallel.large_member ADDRESS PROCESSES PROCESS_ID FOLDER STORE

Prints how much the peak of its memory grew, as a fraction of the complete state; the epochs that
were restored; and whether the restored values are those that were saved.
"""

from __future__ import annotations

import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jaxtrain as jt

ROWS, COLUMNS = 2**16, 2**9  # 128 MiB


class Large(nn.Module):
    """A linear layer beside a large array that is not trained."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        self.variable("buffers", "table", jnp.zeros, (1, 1))
        return nn.Dense(1)(inputs)


def peak() -> int:
    """Returns the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def values(start: int, fill: float) -> np.ndarray:
    """Returns the rows of a process, which do not compress."""
    random = np.random.default_rng(start)
    return random.random((ROWS // 2, COLUMNS), np.float32) + np.float32(fill)


def run(folder: str, store: str, epochs: int, fill: float) -> tuple[jt.TrainState, jt.History]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    inputs = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    data = jt.Dataset(inputs, 2 * inputs)
    state = jt.init_state(Large(), jt.optimizers.sgd(0.1), inputs, key=jax.random.key(0))
    state = jt.parallel.replicate(state, mesh)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return values(index[0].start or 0, fill)

    sharding = jax.NamedSharding(mesh, jax.P("data"))
    table = jax.make_array_from_callback((ROWS, COLUMNS), sharding, part)
    state = state.replace(model_state={"buffers": {"table": table}})
    return jt.fit(
        state,
        data,
        loss_fn=jt.losses.mean_squared_error,
        epochs=epochs,
        batch_size=8,
        callbacks=[jt.callbacks.checkpoint(folder, store=store)],
        mesh=mesh,
    )


if __name__ == "__main__":
    address, processes, process_id, folder, store = sys.argv[1:6]
    jt.parallel.initialize(address, int(processes), int(process_id))
    run(f"{folder}/first", store, 0, 1.0)  # compiles
    before = peak()
    run(folder, store, 1, 1.0)
    print((peak() - before) / (4 * ROWS * COLUMNS))
    state, history = run(folder, store, 2, 2.0)
    table = state.model_state["buffers"]["table"].addressable_shards[0]
    expected = values(table.index[0].start or 0, 1.0)
    print(len(history["epoch"]), np.array_equal(table.data, expected))
