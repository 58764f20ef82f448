"""Lists the libraries that are compared; each is imported only when it is loaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.problem import Params, Problem, Trainer

Make = Callable[[Problem, Params], Trainer]


class Peer(NamedTuple):
    """A library, or one way to train with it.

    Attributes:
      label: its name in tables.
      make: `module:function` of its `Make` in this package.
      packages: packages that must be installed.
    """

    label: str
    make: str
    packages: tuple[str, ...]


PEERS = {
    "jaxtrain": Peer("jaxtrain", "jaxtrain:epoch_compiled", ("jax",)),
    "jaxtrain-steps": Peer("jaxtrain, step by step", "jaxtrain:step_by_step", ("jax",)),
    "pytorch": Peer("eager PyTorch", "pytorch:eager", ("torch",)),
    "pytorch-dataloader": Peer("eager PyTorch, DataLoader", "pytorch:dataloader", ("torch",)),
    "pytorch-pixels": Peer("eager PyTorch, uint8 pixels", "pytorch:from_pixels", ("torch",)),
    "pytorch-compile": Peer("torch.compile", "pytorch:compiled", ("torch",)),
    "pytorch-cuda-graphs": Peer("PyTorch CUDA graphs", "pytorch:cuda_graphs", ("torch",)),
    "nnx": Peer("Flax NNX", "nnx:step_by_step", ("flax",)),
    "equinox": Peer("Equinox", "equinox:step_by_step", ("equinox",)),
    "keras": Peer("Keras 3 on JAX", "keras:fit", ("keras",)),
    "keras-steps-per-execution": Peer(
        "Keras 3, steps_per_execution", "keras:fit_several_steps", ("keras",)
    ),
}


class MissingError(Exception):
    """Raised if a peer cannot run on this machine."""


def load(name: str) -> Make:
    """Returns the function that makes the trainer of a peer.

    Raises:
      MissingError: if one of its packages is not installed.
    """
    peer = PEERS[name]
    for package in peer.packages:
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"{package} is not installed; run pip install -e '.[bench]'")
    module, function = peer.make.split(":")
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)
