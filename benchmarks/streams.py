"""Times epochs on MNIST in memory, from a file, and by PyTorch's DataLoader; measures memory.

    python -m benchmarks.streams [--rounds N] [--gigabytes N]

The three epochs are timed in turns. The memory is the peak of a process that trains on a file of
6 GB.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import jaxtrain as jt
from benchmarks import torch_reference
from benchmarks.problem import MEAN, STD
from jaxtrain.race.measuring import peak_memory_mib, timed
from jaxtrain.race.processes import call

LOSS = jt.losses.cross_entropy
BATCH_SIZE, KEY = 64, jax.random.key(1)


def file_of(path: Path) -> np.memmap:
    """Returns a file of images, mapped into memory."""
    return np.memmap(path, np.uint8, "r", shape=(path.stat().st_size // 784, 28, 28))


def new_state() -> jt.TrainState:
    """Returns the state of T2 before the first step."""
    model, optimizer = jt.models.FeedForward(), jt.optimizers.sgd(0.01, weight_decay=1e-6)
    return jt.init_state(model, optimizer, np.zeros((1, 28, 28), np.uint8), key=jax.random.key(0))


def epochs(path: Path, train: jt.Dataset) -> dict[str, Callable[[], object]]:
    """Returns a function that trains for an epoch, by the way it reads the data."""
    state, on_disk = new_state(), jt.Dataset(file_of(path), np.asarray(train.targets))

    def in_memory() -> object:
        return jax.block_until_ready(jt.train_epoch(state, train, LOSS, key=KEY))

    def from_file() -> object:
        stream = jt.data.stream(on_disk, BATCH_SIZE, KEY)
        return jax.block_until_ready(jt.train_epoch(state, stream, LOSS))

    return {
        "in memory": in_memory,
        "from a file": from_file,
        "PyTorch's DataLoader": torch_epoch(on_disk),
    }


def torch_epoch(dataset: jt.Dataset) -> Callable[[], object]:
    """Returns an epoch of T2 in eager PyTorch, with a DataLoader on the same file."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file that is opened to read only is not writable
        tensors = torch.from_numpy(dataset.inputs), torch.from_numpy(dataset.targets).long()
    loader = DataLoader(TensorDataset(*tensors), BATCH_SIZE, shuffle=True)
    model = torch_reference.feed_forward((256, 128, 64, 10), 784, 0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=1e-6, fused=True)

    def epoch() -> object:
        batches = (((x.float() / 255 - MEAN) / STD, y) for x, y in loader)
        return torch_reference.train_steps(
            model, optimizer, batches, torch.nn.functional.cross_entropy
        )

    return epoch


def train_on(path: Path) -> float:
    """Trains for an epoch on a file of images, and returns the peak memory in MiB."""
    images = file_of(path)
    data = jt.Dataset(images, np.zeros(len(images), np.int32))
    stream = jt.data.stream(data, BATCH_SIZE, KEY)
    jt.fit(new_state(), stream, loss_fn=LOSS, epochs=1, callbacks=[])
    return peak_memory_mib()


def main() -> None:
    """Prints the speeds, and the peak memory of a process that trains on a large file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="readings of each epoch")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the large file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, large = Path(folder) / "images", Path(folder) / "large"
        train, _ = jt.data.load("mnist")
        path.write_bytes(np.asarray(train.inputs).tobytes())
        actions = epochs(path, train)
        readings: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(1 + flags.rounds):
            for name, action in actions.items():
                readings[name].append(timed(action))
        seconds = {name: statistics.median(values[1:]) for name, values in readings.items()}
        for name, median in seconds.items():
            print(f"{name}: {median:.3f} s, {seconds['in memory'] / median:.2f} of the speed")
        block = np.random.default_rng(0).integers(0, 256, (2**17, 784), np.uint8).tobytes()
        with large.open("wb") as file:
            for _ in range(int(flags.gigabytes * 1e9 / len(block))):
                file.write(block)
        peak = call(train_on, large)
        print(f"peak memory on {flags.gigabytes:g} GB: {peak * 2**20 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
