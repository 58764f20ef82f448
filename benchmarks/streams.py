"""Times epochs on MNIST in memory, from a file, and by PyTorch's DataLoader; measures memory.

    python -m benchmarks.streams [--data-dir FOLDER] [--rounds N] [--gigabytes N] [--epochs N]

The three epochs are timed in turns. The memory is that of a process that trains on a file of 6 GB,
and the growth that of one that trains for 100 epochs.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.cli import command  # isort: skip  # first: reports missing extras

import jax
import numpy as np

import jaxtrain as jt
from jaxtrain.cli import tables

LOSS = jt.losses.cross_entropy
BATCH = 64
PIXELS = (28, 28)
EARLY = 20  # epochs until the allocator has the memory that it keeps


@dataclass(frozen=True)
class Config:
    """Flags of the measurement."""

    data_dir: Path | None = None
    """Folder of the MNIST files; None tries $JAXTRAIN_DATA_DIR, the cache, then a download."""
    rounds: int = 9
    """Readings of each epoch, in turns after one that warms up."""
    gigabytes: float = 6.0
    """Size of the large file, in 10⁹ bytes; 0 leaves it out."""
    epochs: int = 100
    """Epochs over which the memory must not grow; 0 leaves them out."""
    folder: Path | None = None
    """Folder of the large file; None means the system's folder of temporary files."""


def run(config: Config) -> dict[str, Any]:
    """Times epochs on MNIST in memory, from a file, and by PyTorch's DataLoader."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        seconds = time_epochs(config, Path(folder))
        memory = statistics.median(seconds["in memory"])
        rows = {}
        for name, readings in seconds.items():
            median = statistics.median(readings)
            rows[name] = f"{median:.3f} s  {memory / median:.2f} of the speed in memory"
        if config.epochs:
            before, after = measured("growth", Path(folder), config.epochs)
            text = f"{before:.0f} and {after:.0f} MB"
            rows[f"memory after {EARLY} and {config.epochs} epochs"] = text
        if config.gigabytes:
            write_large(Path(folder) / "large.bin", config.gigabytes)
            peak, steps = measured("large", Path(folder), config.gigabytes)
            rows[f"peak memory on {config.gigabytes:g} GB"] = f"{peak:.0f} MB, {steps:.0f} steps"
        found |= rows
    tables.print_table(f"T2 on MNIST, batches of {BATCH}, {config.rounds} readings in turns", rows)
    return found


def time_epochs(config: Config, folder: Path) -> dict[str, list[float]]:
    """Returns the seconds of an epoch by each way, in turns."""
    train, _ = jt.data.load("mnist", config.data_dir)
    images = np.memmap(folder / "images.bin", np.uint8, "w+", shape=train.inputs.shape)
    images[:] = train.inputs
    images.flush()
    on_disk = jt.Dataset(
        np.memmap(folder / "images.bin", np.uint8, "r", shape=images.shape),
        np.asarray(train.targets),
    )
    key = jax.random.key(1)
    state = new_state(train.inputs[:1])

    def in_memory() -> None:
        jax.block_until_ready(jt.train_epoch(state, train, LOSS, key=key))

    def from_file() -> None:
        jax.block_until_ready(jt.train_epoch(state, jt.data.stream(on_disk, BATCH, key), LOSS))

    ways: dict[str, Callable[[], None]] = {"in memory": in_memory, "from a file": from_file}
    ways["PyTorch's DataLoader"] = torch_epoch(on_disk)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for reading in range(config.rounds + 1):
        for name, epoch in ways.items():
            started = time.perf_counter()
            epoch()
            if reading:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def new_state(inputs: Any) -> jt.TrainState:
    """Returns the state of T2 before the first step."""
    model, optimizer = jt.models.FeedForward(), jt.optimizers.sgd(0.01, weight_decay=1e-6)
    return jt.init_state(model, optimizer, inputs, key=jax.random.key(0))


def torch_epoch(dataset: jt.Dataset) -> Callable[[], None]:
    """Returns an epoch of T2 in eager PyTorch, with a DataLoader on the same file."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from benchmarks.torch_reference import feed_forward, train_steps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file that is opened to read only is not writable
        tensors = torch.from_numpy(dataset.inputs), torch.from_numpy(dataset.targets).long()
    loader = DataLoader(TensorDataset(*tensors), BATCH, shuffle=True)
    model = feed_forward((256, 128, 64, 10), 784, 0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=1e-6, fused=True)

    def epoch() -> None:
        batches = (((x.float() / 255 - 0.1307) / 0.3081, y) for x, y in loader)
        train_steps(model, optimizer, batches, torch.nn.functional.cross_entropy)

    return epoch


def write_large(path: Path, gigabytes: float) -> None:
    """Writes a file of random images."""
    rng, rows = np.random.default_rng(0), 2**17
    block = rng.integers(0, 256, (rows, *PIXELS), np.uint8)
    with path.open("wb") as file:
        for _ in range(int(gigabytes * 1e9 / block.nbytes)):
            file.write(block.tobytes())


def measured(name: str, folder: Path, number: float) -> list[float]:
    """Returns what `NAME` of this module returns in a new process."""
    command_line = [sys.executable, "-m", "benchmarks.streams", name, str(folder), str(number)]
    result = subprocess.run(command_line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def growth(folder: Path, epochs: float) -> list[float]:
    """Returns the memory after some epochs and after all, in MB."""
    shape = (6_000, *PIXELS)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=shape)
    stream = jt.data.stream(jt.Dataset(images, np.zeros(len(images), np.int32)), BATCH)
    memory: list[float] = []

    def measure(run: jt.Run) -> None:
        memory.append(resident_megabytes())

    jt.fit(new_state(images[:1]), stream, loss_fn=LOSS, epochs=int(epochs), callbacks=[measure])
    return [memory[EARLY - 1], memory[-1]]


def large(folder: Path, gigabytes: float) -> list[float]:
    """Returns the peak memory of an epoch on the large file, in MB, and its steps."""
    path = folder / "large.bin"
    images = np.memmap(path, np.uint8, "r", shape=(path.stat().st_size // 784, *PIXELS))
    labels = np.zeros(len(images), np.int32)
    stream = jt.data.stream(jt.Dataset(images, labels), BATCH, jax.random.key(0))
    _, history = jt.fit(new_state(images[:1]), stream, loss_fn=LOSS, epochs=1, callbacks=[])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return [peak, float(len(history.step_losses))]


def resident_megabytes() -> float:
    """Returns the memory of this process at the moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] in (["growth"], ["large"]):
        measure = {"growth": growth, "large": large}[sys.argv[1]]
        print(json.dumps(measure(Path(sys.argv[2]), float(sys.argv[3]))))
    else:
        command.main(Config, run)
