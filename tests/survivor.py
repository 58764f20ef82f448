"""A small run with every kind of state in a process of its own, for the tests that kill it.

    python -m tests.survivor FOLDER EPOCHS [--plain] [--watch]

Prints a digest of the final state and history. `--plain` saves no checkpoints; `--watch` prints
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
from jaxtrain.checkpoint import checkpoint_path, digest
from jaxtrain.cli.compilation_cache import set_up_compilation_cache
from jaxtrain.training.events import EpochDone, Event

# Epochs between two checkpoints of a watched run, and how many checkpoints it keeps.
EVERY, KEEP = 5, 3


class Network(nn.Module):
    """Dropout draws from the key; batch norm has state."""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def watch(event: Event, folder: Path) -> None:
    if isinstance(event, EpochDone) and event.epoch % 50 == 0:
        # A write in progress has files open. This epoch's checkpoint is yet to be written; the
        # previous write is over when only the checkpoints to keep are left.
        kept = [checkpoint_path(folder, event.epoch - back * EVERY) for back in range(1, KEEP + 1)]
        while set(folder.glob("[!.]*")) != set(kept):
            time.sleep(0.001)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
        print(event.epoch, kib, threading.active_count(), files, flush=True)


def run(folder: str, epochs: int, *, plain: bool = False, watched: bool = False) -> str:
    """Trains, and returns a digest of the final state and history."""
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
        loss_fn=jt.losses.cross_entropy,
        epochs=epochs,
        batch_size=16,
        key=key,
        early_stopping=jt.EarlyStopping(10_000),
        checkpoint=None
        if plain
        else jt.CheckpointOptions(folder, every=EVERY if watched else 1, keep=KEEP),
        on_event=functools.partial(watch, folder=Path(folder)) if watched else None,
    )
    columns = {name: values for name, values in history.items() if name != "seconds"}
    assert len(columns["epoch"]) == epochs
    return digest((state, columns, history.step_losses))


if __name__ == "__main__":
    flags = sys.argv[3:]
    set_up_compilation_cache(True)
    print(run(sys.argv[1], int(sys.argv[2]), plain="--plain" in flags, watched="--watch" in flags))
