"""A small run with every kind of state in a process of its own, for the tests that kill it.

    python -m tests.survivor FOLDER EPOCHS [--plain] [--streamed] [--worker] [--watched]

Prints a digest of the final state and history. The data are in memory, and the optimizer averages
the parameters; with `--streamed`, the data are a stream, the optimizer accumulates gradients, and
checkpoints are saved within an epoch. `--plain` saves none, `--worker` reads the stream in another
process, and `--watched` prints memory, threads and open files after every 50th epoch.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt
from jaxtrain.checkpoint import checkpoint_path, digest
from jaxtrain.cli.compilation_cache import set_up_compilation_cache

# Epochs between two checkpoints of a watched run, and how many checkpoints it keeps.
EVERY, KEEP = 5, 3
# Steps between two checkpoints of a stream; an epoch has 10.
EVERY_STEPS = 3


class Network(nn.Module):
    """Dropout draws from the key; batch norm has state."""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def add_noise(example: Any, rng: np.random.Generator) -> Any:
    inputs, label = example
    return inputs + 0.1 * rng.normal(size=6).astype(np.float32), label


def watch(run: jt.Run, folder: Path) -> None:
    if run.epoch % 50 == 0:
        # A write in progress has files open. This epoch's checkpoint is yet to be written; the
        # previous write is over when only the checkpoints to keep are left.
        kept = [checkpoint_path(folder, run.epoch - back * EVERY) for back in range(1, KEEP + 1)]
        while set(folder.glob("[!.]*")) != set(kept):
            time.sleep(0.001)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
        print(run.epoch, kib, threading.active_count(), files, flush=True)


def train(
    folder: str,
    epochs: int,
    *,
    plain: bool = False,
    streamed: bool = False,
    worker: bool = False,
    watched: bool = False,
) -> str:
    """Trains, and returns a digest of the final state and history."""
    key = jax.random.key(0)
    labels = jnp.arange(200) % 3
    inputs = jax.nn.one_hot(labels, 6) + jax.random.normal(key, (200, 6))
    data: Any
    data, validation = jt.Dataset(inputs, labels).split(0.2, key)
    optimizer = jt.optimizers.adam(jt.optimizers.step_lr(0.01, 1, 0.99, steps_per_epoch=10))
    if streamed:
        data = jt.data.stream(data, 16, key, transform=add_noise, workers=int(worker))
        optimizer = jt.optimizers.accumulate_gradients(optimizer, 4)
    else:
        optimizer = jt.optimizers.average_parameters(optimizer, 0.9)
    state = jt.init_state(Network(), optimizer, inputs[:1], key=key)
    callbacks: list[Any] = [jt.callbacks.early_stopping(10_000)]
    if watched:
        callbacks.append(lambda run: watch(run, Path(folder)))
    if not plain:
        every_steps = EVERY_STEPS if streamed else None
        callbacks.append(
            jt.callbacks.checkpoint(
                folder, every=EVERY if watched else 1, every_steps=every_steps, keep=KEEP
            )
        )
    state, history = jt.fit(
        state,
        data,
        validation=validation,
        loss_fn=jt.losses.cross_entropy,
        metric_fns={"accuracy": jt.metrics.accuracy},
        epochs=epochs,
        batch_size=16,
        key=None if streamed else key,
        callbacks=callbacks,
    )
    columns = {name: values for name, values in history.items() if name != "seconds"}
    assert len(columns["epoch"]) == epochs
    return digest((state, columns, history.step_losses))


if __name__ == "__main__":
    folder, epochs, *flags = sys.argv[1:]
    set_up_compilation_cache(True)
    options = {flag.removeprefix("--"): True for flag in flags}
    print(train(folder, int(epochs), **options))
