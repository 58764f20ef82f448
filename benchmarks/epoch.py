"""One epoch of MNIST, compiled as one call, against the same epoch in eager PyTorch.

    python -m benchmarks.epoch [--data-dir FOLDER] [--rounds 5]

Both sides train the T2 network (784-256-128-64-10, dropout 0.2, SGD) in float32 on the same CPU
cores, batch 64, 938 steps with the 32-example tail. PyTorch slices tensors that were normalised
beforehand, without a DataLoader; jaxtrain normalises uint8 images inside the step. The two run in
turns in one process. Start-up and memory are measured in a process of their own for each side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH_SIZE = 64
LEARNING_RATE = 0.01
WEIGHT_DECAY = 1e-6
DROPOUT_RATE = 0.2
MEAN, STD = 0.1307, 0.3081
FEATURES = (256, 128, 64, 10)
STARTED_VARIABLE = "JAXTRAIN_BENCHMARK_STARTED"

Epoch = Callable[[], object]


def jax_start(folder: Path) -> tuple[Any, Any]:
    """The training data and the state of the T2 network."""
    import jax

    import jaxtrain as jt

    train_data, _ = jt.data.load("mnist", folder)
    state = jt.init_state(
        jt.models.FeedForward(FEATURES, DROPOUT_RATE, MEAN, STD),
        jt.optimizers.sgd(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        train_data.inputs[:1],
        key=jax.random.key(42),
    )
    return train_data, state


def jax_epoch(folder: Path, shuffle: bool) -> tuple[Epoch, Epoch]:
    """(one epoch, one step) of jaxtrain, each starting from the same state at every call."""
    import jax

    import jaxtrain as jt

    train_data, state = jax_start(folder)
    first_batch = jax.tree.map(lambda array: array[:BATCH_SIZE], train_data)
    loss_fn = jt.losses.cross_entropy
    key = jax.random.key(0) if shuffle else None

    def epoch() -> object:
        return jax.block_until_ready(
            jt.train_epoch(state, train_data, loss_fn, batch_size=BATCH_SIZE, key=key)
        )

    def step() -> object:
        return jax.block_until_ready(jt.train_step(state, first_batch, loss_fn))

    return epoch, step


def torch_epoch(folder: Path, shuffle: bool) -> tuple[Epoch, Epoch]:
    """(one epoch, one step) of eager PyTorch."""
    import numpy as np
    import torch

    from benchmarks import torch_reference

    torch.manual_seed(42)
    images, labels = torch_reference.read_mnist_training(folder)
    inputs = torch_reference.normalised(images, MEAN, STD)
    targets = torch.from_numpy(labels.astype(np.int64))
    model = torch_reference.feed_forward(FEATURES, 28 * 28, DROPOUT_RATE)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    loss_fn = torch.nn.functional.cross_entropy

    def epoch() -> object:
        order = torch.randperm(len(inputs)) if shuffle else None
        batches = torch_reference.slices(inputs, targets, BATCH_SIZE, order)
        return torch_reference.train_steps(model, optimizer, batches, loss_fn)

    def step() -> object:
        batch = (inputs[:BATCH_SIZE], targets[:BATCH_SIZE])
        return torch_reference.train_steps(model, optimizer, [batch], loss_fn)

    return epoch, step


FIT = "an epoch of fit"
SIDES = {"jaxtrain": jax_epoch, "PyTorch eager": torch_epoch}


def fit_epoch(folder: Path, shuffle: bool) -> Callable[[], float]:
    """One epoch by `fit`, looked into every 100 steps, without evaluation; returns its seconds."""
    import jax

    import jaxtrain as jt

    train_data, state = jax_start(folder)
    key = jax.random.key(0) if shuffle else None

    def epoch() -> float:
        _, history = jt.fit(state, train_data, loss_fn=jt.losses.cross_entropy, epochs=1, key=key)
        return float(history["seconds"][0])

    return epoch


def measure_alone(side: str, folder: Path) -> dict[str, float]:
    """In this process alone: seconds from its start to the first trained step, and peak memory."""
    epoch, step = SIDES[side](folder, shuffle=False)
    step()
    first_step_seconds = time.time() - float(os.environ[STARTED_VARIABLE])
    first_epoch_started = time.perf_counter()
    epoch()
    first_epoch_seconds = time.perf_counter() - first_epoch_started
    later_started = time.perf_counter()
    epoch()
    return {
        "first_step_seconds": first_step_seconds,
        "first_epoch_seconds": first_epoch_seconds,
        "later_epoch_seconds": time.perf_counter() - later_started,
        "peak_mib": peak_memory_mib(),
    }


def peak_memory_mib() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; there getrusage would count the parent's memory before exec, too.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_in_child(side: str, folder: Path) -> dict[str, float]:
    """`measure_alone` in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch", "--alone", side, "--data-dir", str(folder)],
        env={**os.environ, STARTED_VARIABLE: str(time.time())},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(result.stdout)


def measure_in_turns(folder: Path, shuffle: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch of each side, A B C A B C …, after one that is not counted."""

    def timed(epoch: Epoch) -> Callable[[], float]:
        def seconds() -> float:
            started = time.perf_counter()
            epoch()
            return time.perf_counter() - started

        return seconds

    epochs = {side: timed(make(folder, shuffle)[0]) for side, make in SIDES.items()}
    epochs[FIT] = fit_epoch(folder, shuffle)
    results = [{side: epoch() for side, epoch in epochs.items()} for _ in range(rounds + 1)]
    return {side: [result[side] for result in results[1:]] for side in epochs}


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", help="folder of the MNIST files")
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each side")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure_alone(arguments.alone, Path(arguments.data_dir))))
        return

    if importlib.util.find_spec("torch") is None:
        sys.exit("error: PyTorch is not installed; `make test` or pip install -e '.[test]' does")

    # Not above: the process of each side imports its own library and no other.
    import jax
    import torch
    from rich.console import Console
    from rich.table import Table

    from jaxtrain.command import mistakes_on_one_line
    from jaxtrain.data.mnist import locate_files

    with mistakes_on_one_line():
        folder = locate_files("mnist", arguments.data_dir)
    alone = {side: measure_in_child(side, folder) for side in SIDES}

    title = f"MNIST, T2 network, batch 64, float32; medians of {arguments.rounds}"
    table = Table(title=title, title_justify="left")
    for heading in ("", *SIDES, "ratio"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(name: str, unit: str, values: dict[str, float], digits: int) -> None:
        ours, theirs = values.values()
        cells = [f"{value:.{digits}f} {unit}" for value in values.values()]
        table.add_row(name, *cells, f"{theirs / ours:.2f} ×")

    for shuffle in (False, True):
        seconds = measure_in_turns(folder, shuffle, arguments.rounds)
        order = "shuffled" if shuffle else "stored order"
        fit_seconds = seconds.pop(FIT)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        add(f"an epoch, {order}", "s", medians, 3)
        spread = [f"{min(values):.3f} – {max(values):.3f} s" for values in seconds.values()]
        table.add_row("  from – to", *spread, "")
        share = statistics.median(fit_seconds) / medians["jaxtrain"]
        table.add_row(
            "  by fit, 10 looks an epoch", f"{statistics.median(fit_seconds):.3f} s", "", ""
        )
        table.add_row("  fit / train_epoch", f"{share:.3f}", "", "")

    def each(entry: str) -> dict[str, Any]:
        return {side: values[entry] for side, values in alone.items()}

    table.add_section()
    compile_seconds = {
        side: values["first_epoch_seconds"] - values["later_epoch_seconds"]
        for side, values in alone.items()
    }
    table.add_row(
        "compiling (first epoch − later one)",
        *(f"{value:.2f} s" for value in compile_seconds.values()),
        "",
    )
    add("start to first trained step", "s", each("first_step_seconds"), 2)
    add("peak memory, two epochs", "MiB", each("peak_mib"), 0)

    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{cpu_name()}, {os.cpu_count()} cores; {jax.devices()[0].platform}; "
        f"PyTorch with {torch.get_num_threads()} threads; "
        f"jax {jax.__version__}, torch {torch.__version__}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
