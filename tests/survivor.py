"""A small run in a process of its own, for the tests that kill it: every kind of state in it.

    python -m tests.survivor FOLDER EPOCHS [--plain] [--watch]

Prints a sum of the final state and history. `--plain` keeps no checkpoints; `--watch` prints
memory, threads and open files after every 50th epoch.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxtrain as jt
from jaxtrain.checkpoint_files import digest
from jaxtrain.devices import cache_compilations
from jaxtrain.events import EpochDone, Event

# Epochs from one checkpoint to the next of a run that is watched, and how many of them it keeps.
EVERY, KEEP = 5, 3


class Network(nn.Module):
    """Dropout draws from the key, batch norm has a state of its own."""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def watch(event: Event, folder: Path) -> None:
    if isinstance(event, EpochDone) and event.epoch % 50 == 0:
        # A write that is under way, or has not even begun, has files open: this epoch's is still to
        # come, that of the checkpoint before is over when only those to keep are left.
        kept = [f"epoch-{event.epoch - back * EVERY}" for back in range(KEEP, 0, -1)]
        while sorted(path.name for path in folder.iterdir()) != sorted(kept):
            time.sleep(0.001)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
        print(event.epoch, kib, threading.active_count(), files, flush=True)


def run(folder: str, epochs: int, *, plain: bool = False, watched: bool = False) -> str:
    """Train, and return a sum of what came out."""
    key = jax.random.key(0)
    labels = jnp.arange(200) % 3
    inputs = jax.nn.one_hot(labels, 6) + jax.random.normal(key, (200, 6))
    data = jt.Dataset(inputs, labels)
    train, validation = data.split(0.2, key)
    schedule = jt.optimizers.step_lr(0.01, 1, 0.99, steps_per_epoch=10)
    state = jt.init_state(Network(), jt.optimizers.adam(schedule), inputs[:1], key=key)
    state, history = jt.fit(
        state,
        train,
        validation_data=validation,
        patience=10_000,
        loss_fn=jt.losses.cross_entropy,
        epochs=epochs,
        batch_size=16,
        key=key,
        checkpoint_dir=None if plain else folder,
        checkpoint_every=EVERY if watched else 1,
        keep=KEEP,
        report=functools.partial(watch, folder=Path(folder)) if watched else None,
    )
    columns = {name: values for name, values in history.items() if name != "seconds"}
    assert len(columns["epoch"]) == epochs
    return digest((state, columns))


if __name__ == "__main__":
    flags = sys.argv[3:]
    cache_compilations()
    print(run(sys.argv[1], int(sys.argv[2]), plain="--plain" in flags, watched="--watch" in flags))
