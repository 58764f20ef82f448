"""The libraries that are timed, each in its own file, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.problem import Params, Problem, Trainer

Make = Callable[[Problem, Params], Trainer]


class Peer(NamedTuple):
    """One way of training.

    Attributes:
      label: its name in tables.
      make: `module:function`, a `Make`.
      packages: what must be installed.
      extra: the extra of this project that installs them.
    """

    label: str
    make: str
    packages: tuple[str, ...]
    extra: str = "bench"


PEERS = {
    "jaxtrain": Peer("jaxtrain", "ours:epoch_compiled", ("jax",)),
    "jaxtrain-steps": Peer("jaxtrain, step by step", "ours:step_by_step", ("jax",)),
    "pytorch": Peer("PyTorch eager", "pytorch:eager", ("torch",), "test"),
    "pytorch-dataloader": Peer(
        "PyTorch eager, DataLoader", "pytorch:dataloader", ("torch",), "test"
    ),
    "pytorch-pixels": Peer("PyTorch eager, from pixels", "pytorch:from_pixels", ("torch",), "test"),
    "pytorch-compile": Peer("PyTorch torch.compile", "pytorch:compiled", ("torch",), "test"),
    "pytorch-cuda-graphs": Peer("PyTorch CUDA graphs", "pytorch:cuda_graphs", ("torch",), "test"),
    "nnx": Peer("Flax NNX", "nnx:step_by_step", ("flax",)),
    "equinox": Peer("Equinox", "equinox:step_by_step", ("equinox",)),
    "keras": Peer("Keras 3 on JAX", "keras:fit", ("keras",)),
    "keras-steps-per-execution": Peer(
        "Keras 3, steps_per_execution", "keras:fit_several_steps", ("keras",)
    ),
}


class MissingError(Exception):
    """A peer cannot run here; the message says why."""


def load(name: str) -> Make:
    """The function that makes this peer's trainers.

    Raises:
      MissingError: a package is not installed.
    """
    peer = PEERS[name]
    for package in peer.packages:
        if importlib.util.find_spec(package) is None:
            raise MissingError(
                f"{package} is not installed; pip install -e '.[{peer.extra}]' does it"
            )
    module, function = peer.make.split(":")
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)
