"""One process of a cluster that trains a small network, for the tests that compare and kill it.

    python -m tests.parallel.cluster_member ADDRESS PROCESSES PROCESS_ID FOLDER EPOCHS [FLAGS]

Prints a digest of the final state and history, and then the files that the process wrote to the
folder of checkpoints. `--slow` waits after each step, `--streamed` reads the training data as a
stream and saves every 3 steps, and `--failing` raises an error in process 1 after the first epoch.
`--logged` also logs to the folder. `--orbax` divides a weight, and saves by Orbax.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxtrain as jt
from jaxtrain.checkpoint import digest

SECONDS_PER_SLOW_STEP = 0.1
# How soon JAX notices a lost process, by default 30 s.
HEARTBEAT_SECONDS = 12
TRAINED, TESTED, BATCH = 512, 200, 64


def train(
    folder: Path,
    epochs: int,
    *,
    slow: bool = False,
    streamed: bool = False,
    failing: bool = False,
    logged: bool = False,
    orbax: bool = False,
) -> str:
    """Trains on all devices, and returns a digest of the final state and history."""
    inputs = np.random.default_rng(0).normal(size=(TRAINED + TESTED, 8)).astype(np.float32)
    data = jt.Dataset(inputs, inputs[:, :4].argmax(axis=1))
    train, test = data[:TRAINED], data[TRAINED:]
    key = jax.random.key(0)
    state = jt.init_state(
        jt.models.FeedForward((16, 4), mean=0.0, std=1.0),
        jt.optimizers.sgd(0.05),
        train.inputs[:1],
        key=key,
    )
    processes = jax.process_count()
    mesh = jax.make_mesh((processes,), ("data",), devices=jax.devices()[:processes])

    if orbax:

        def rule(path: str, leaf: jax.Array) -> jax.P:
            return jax.P("data") if path == "params.Dense_0.weight" else jax.P()

        state = jt.parallel.replicate(state, mesh, rule)

    def wait(run: jt.Run) -> None:
        time.sleep(SECONDS_PER_SLOW_STEP)

    def after_epoch(run: jt.Run) -> None:
        if failing and jax.process_index() == 1:
            raise RuntimeError("the disk is gone")

    callbacks = [
        jt.callbacks.progress(),
        jt.callbacks.checkpoint(
            folder, every_steps=3 if streamed else None, store="orbax" if orbax else "file"
        ),
        after_epoch,
    ]
    if slow:
        callbacks.append(jt.callbacks.every_steps(1, wait))
    if logged:
        callbacks.append(jt.callbacks.csv(folder / "log.csv"))
        callbacks.append(jt.callbacks.json_lines(folder / "log.jsonl"))
    state, history = jt.fit(
        state,
        jt.data.stream(train, BATCH, key) if streamed else train,
        test,
        loss_fn=jt.losses.cross_entropy,
        metric_fns={"accuracy": jt.metrics.accuracy},
        epochs=epochs,
        batch_size=BATCH,
        key=None if streamed else key,
        callbacks=callbacks,
        mesh=mesh,
    )
    columns = {name: values for name, values in history.items() if name != "seconds"}
    return digest((state, columns, history.step_losses))


def record_changes(folder: Path) -> list[str]:
    """Returns a list that receives the name of each file in a folder that the process changes."""
    changed: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.truncate"):
            changes = arguments[1] if event == "os.rename" else arguments[0]
            path = Path(os.fsdecode(changes)) if isinstance(changes, str | bytes | Path) else None
            if path is not None and folder in path.parents:
                changed.append(path.name)

    sys.addaudithook(hook)
    return changed


if __name__ == "__main__":
    address, processes, process_id, directory, epochs = sys.argv[1:6]
    changed = record_changes(Path(directory))
    options = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    jt.parallel.initialize(address, int(processes), int(process_id), **options)
    names = ("slow", "streamed", "failing", "logged", "orbax")
    flags = {name: f"--{name}" in sys.argv for name in names}
    print(train(Path(directory), int(epochs), **flags))
    print(*sorted(set(changed)))
