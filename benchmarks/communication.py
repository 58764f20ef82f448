"""Counts what the devices of a mesh exchange in each training step, in the compiled program.

    python -m benchmarks.communication [--devices 1 2 4 8] [--batch-size 64]

Prints, for T2's network and a convolutional one, the bytes that collective operations return to
each device in a step, beside the bytes of the gradients and the FLOPs of each device. The devices
are simulated: the programs are those that XLA compiles for CPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtrain.cli import command  # isort: skip  # first: reports missing extras

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.table import Table

import jaxtrain as jt
from benchmarks.networks.linen import ConvNet
from jaxtrain._terminal import make_console
from jaxtrain.cli.devices import make_mesh, select_device

LOSS = jt.losses.cross_entropy
NETWORKS: dict[str, nn.Module] = {
    "T2": jt.models.FeedForward(),
    "CNN": ConvNet(dropout_rates=(0.25, 0.5)),
}
STEPS = 8

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) .*{$")
# Attributes such as body=%b, calls=%c and branch_computations={%d, %e}.
_CALLED = re.compile(r"=\{?(%[^\s,)}]+(?:, %[^\s,)}]+)*)")
# Of an asynchronous pair, "-done" has the shape of the result.
_COLLECTIVE = re.compile(
    r" = (.*?) ((?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-done)?)\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Config:
    """Flags of the count."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    batch_size: int = 64
    """Examples per step."""


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
      kind: its name in XLA, such as "all-reduce".
      bytes: size of its results on one device.
      in_loop: whether a loop repeats it, as the steps of an epoch do.
    """

    kind: str
    bytes: int
    in_loop: bool


class Counted(NamedTuple):
    """One step on one device.

    Attributes:
      gradients: bytes of the gradients.
      replicated: bytes from collective operations if every device has a copy of the data.
      sharded: the same if each device has a part of the data.
      flops: floating-point operations, with a copy of the data.
    """

    gradients: int
    replicated: int
    sharded: int
    flops: float


def run(config: Config) -> dict[tuple[str, int], Counted]:
    """Counts what the devices of a mesh exchange in each training step."""
    select_device("cpu", max(config.devices))
    found = {
        (name, devices): count(network, devices, config.batch_size)
        for name, network in NETWORKS.items()
        for devices in config.devices
    }
    make_console().print(make_table(found, config.batch_size))
    return found


def count(network: nn.Module, devices: int, batch_size: int) -> Counted:
    """Compiles an epoch on some devices, and counts its collective operations."""
    images = jnp.zeros((STEPS * batch_size, 28, 28), jnp.uint8)
    data = jt.Dataset(images, jnp.zeros(len(images), jnp.int32))
    key = jax.random.key(0)
    state = jt.init_state(network, jt.optimizers.sgd(0.01), images[:1], key=key)
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    mesh = make_mesh(devices)
    if mesh is None:
        flops = flops_per_step(compile_epoch(state, data, batch_size))
        return Counted(gradients, 0, 0, flops)
    state = jt.parallel.replicate(state, mesh)
    with jax.set_mesh(mesh):
        replicated = compile_epoch(state, jt.parallel.replicate(data, mesh), batch_size)
        sharded = compile_epoch(state, jt.parallel.shard(data, mesh), batch_size)
    return Counted(
        gradients, bytes_per_step(replicated), bytes_per_step(sharded), flops_per_step(replicated)
    )


def compile_epoch(state: jt.TrainState, data: jt.Dataset, batch_size: int) -> jax.stages.Compiled:
    """Compiles an epoch of shuffled batches for the current mesh."""

    @jax.jit
    def epoch(state: jt.TrainState, data: jt.Dataset) -> Any:
        return jt.train_epoch(state, data, LOSS, batch_size=batch_size, key=jax.random.key(1))

    return epoch.lower(state, data).compile()


def flops_per_step(program: jax.stages.Compiled) -> float:
    """Returns the floating-point operations of one device in an epoch; XLA counts a loop once."""
    costs = program.cost_analysis() or {}
    return float(costs["flops"])


def bytes_per_step(program: jax.stages.Compiled) -> int:
    """Returns the bytes that collective operations return to a device in one step of a loop."""
    return sum(each.bytes for each in collectives(program) if each.in_loop)


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Returns the collective operations of a compiled program, in the order of its text."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in (program.as_text() or "").splitlines():
        if heading := _COMPUTATION.match(line):
            name = heading[2]
            lines[name] = []
            entry = name if heading[1] else entry
        elif name:
            lines[name].append(line)

    def visit(computation: str, in_loop: bool) -> list[Collective]:
        found = []
        for line in lines[computation]:
            if match := _COLLECTIVE.search(line):
                kind = match[2].removesuffix("-done")
                found.append(Collective(kind, _bytes_of(match[1]), in_loop))
                continue  # what it calls adds two numbers
            for names in _CALLED.findall(line):
                for called in names.replace("%", "").split(", "):
                    if called in lines:
                        found += visit(called, in_loop or " while(" in line)
        return found

    return visit(entry, False)


def _bytes_of(shape: str) -> int:
    """Returns the size of an array or a tuple, written as "(f32[256]{0}, f32[])" in XLA."""
    size = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        elements = 1
        for dimension in filter(None, dimensions.split(",")):
            elements *= int(dimension)
        size += elements * bits // 8
    return size


def make_table(found: dict[tuple[str, int], Counted], batch_size: int) -> Table:
    """Returns the counts as a table."""
    table = Table(
        title=f"one step of {batch_size} images: bytes from collective operations, and FLOPs",
        title_justify="left",
    )
    table.add_column("network")
    headings = ("devices", "gradients", "data copied", "data sharded", "MFLOPs", "of one device's")
    for heading in headings:
        table.add_column(heading, justify="right")
    for (name, devices), each in found.items():
        alone = found.get((name, 1))
        table.add_row(
            name,
            str(devices),
            *(f"{value:,}" for value in (each.gradients, each.replicated, each.sharded)),
            f"{each.flops / 1e6:,.1f}",
            "" if alone is None else f"{each.flops / alone.flops:.1%}",
        )
    return table


if __name__ == "__main__":
    command.main(Config, run)
