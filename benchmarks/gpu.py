"""All readings on a GPU in ten minutes: `python -m benchmarks.gpu FOLDER`.

Each part runs in a process with a limit of time, and writes to a file of its own, so that a machine
that is lent for minutes leaves what it has finished. Parts are in the order of their worth.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxtrain as jt

PYTHON = sys.executable
# Captures that XLA launches as one: none, its default, and loops as well.
COMMAND_BUFFERS = {
    "off": "--xla_gpu_enable_command_buffer=",
    "default": "",
    "while": "--xla_gpu_enable_command_buffer=+WHILE",
}
NETWORKS, EPOCHS = 1000, 5


def parts(folder: Path) -> list[tuple[str, int, list[str], dict[str, str]]]:
    """Returns name, limit in seconds, command and environment of each part."""
    this, suites = [PYTHON, "-m", "benchmarks.gpu"], [PYTHON, "-m", "benchmarks"]
    tests = [PYTHON, "-m", "pytest", "-q", "-n", "4", "-m", "not slow", "-p", "no:cacheprovider"]
    of_jax = ["--peers", "jaxtrain", "jaxtrain-steps", "jax-scan", "pytorch", "pytorch-compile"]
    models = [*suites, "--suite", "models", "--rounds", "3", *of_jax]
    found = [
        (f"epoch-{name}", 60, [*this, "--epoch"], {"XLA_FLAGS": flags})
        for name, flags in COMMAND_BUFFERS.items()
    ]
    return [
        *found,
        ("networks", 60, [*this, "--networks"], {}),
        ("speedrun", 60, [PYTHON, "experiments/speedrun.py", "--seeds", "5"], {}),
        ("models", 180, [*models, "--json", str(folder / "models.json")], {}),
        ("sweep", 60, [*suites, "--suite", "sweep", "--json", str(folder / "sweep.json")], {}),
        ("tests", 120, [*tests, "tests/training", "tests/sweeps"], {}),
    ]


def run(folder: Path) -> None:
    """Runs all parts, and prints how each ended."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, limit, command, environment in parts(folder):
        started = time.perf_counter()
        with (folder / f"{name}.txt").open("w") as log:
            try:
                code: int | str = subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                    timeout=limit,
                ).returncode
            except subprocess.TimeoutExpired:
                code = "time is up"
        print(f"{name}: {code}, {time.perf_counter() - started:.0f} s", flush=True)


def measure_epoch() -> None:
    """Prints the seconds of T2's epoch at batch 64, compiling excluded."""
    data, _ = jt.data.load("mnist")
    epoch = jax.jit(lambda state: jt.train_epoch(state, data, LOSS, batch_size=64)[0])
    print(jax.devices()[0].device_kind, *_seconds(epoch, _start(0)))


def measure_networks() -> None:
    """Prints the seconds in which 1,000 of T2's networks train for 5 epochs, at once."""
    data, _ = jt.data.load("mnist")

    def train(seed: jax.Array) -> jax.Array:
        epoch = lambda state, _: jt.train_epoch(state, data, LOSS, batch_size=64)  # noqa: E731
        return jax.lax.scan(epoch, _start(seed), length=EPOCHS)[1][-1].mean()

    print(jax.devices()[0].device_kind, *_seconds(jax.jit(jax.vmap(train)), jnp.arange(NETWORKS)))


LOSS = jt.losses.cross_entropy


def _start(seed: jax.Array | int) -> jt.TrainState:
    network, images = jt.models.FeedForward(), jnp.zeros((1, 28, 28), jnp.uint8)
    return jt.init_state(network, jt.optimizers.sgd(0.01), images, key=jax.random.key(seed))


def _seconds(function: jax.stages.Wrapped, argument: object) -> list[float]:
    found = []
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(function(argument))
        found.append(round(time.perf_counter() - started, 4))
    return found[1:]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--epoch"]:
            measure_epoch()
        case ["--networks"]:
            measure_networks()
        case [folder]:
            run(Path(folder))
        case _:
            sys.exit("python -m benchmarks.gpu FOLDER: expected the folder of the readings")
