"""Lists the libraries that are compared; each is imported only when it is loaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.problem import Problem, start


class Peer(NamedTuple):
    """A library, or one way to train with it.

    Attributes:
      label: its name in tables.
      make: `module:function` in this package, from a problem and its initial parameters to a
        trainer, or for PyTorch to the arguments of one; empty for peers that only train sweeps.
      packages: packages that must be installed.
      suites: the suites that measure it.
      networks: the networks that it trains in the suite `models`; empty for all.
    """

    label: str
    make: str
    packages: tuple[str, ...]
    suites: tuple[str, ...]
    networks: tuple[str, ...] = ()


STEP_AND_MODELS = ("step", "models")
TORCH, KERAS, NUMBA = ("torch",), ("keras",), ("numba",)
CONVOLUTIONAL = ("CNN", "ResNet")
PEERS = {
    "jaxtrain": Peer("jaxtrain", "jaxtrain:epochs", ("jax",), (*STEP_AND_MODELS, "sweep", "run")),
    "jaxtrain-steps": Peer("jaxtrain, step by step", "jaxtrain:steps", ("jax",), ("models", "run")),
    "jaxtrain-numba": Peer(
        "jaxtrain with Numba", "jaxtrain:numba_epochs", NUMBA, ("models",), CONVOLUTIONAL
    ),
    "jaxtrain-numba-steps": Peer(
        "jaxtrain with Numba, step by step",
        "jaxtrain:numba_steps",
        NUMBA,
        ("models",),
        CONVOLUTIONAL,
    ),
    "jax-scan": Peer("JAX, `lax.scan` by hand", "jax_scan:make", ("jax",), ("models",)),
    "pytorch": Peer("eager PyTorch", "pytorch:eager", TORCH, (*STEP_AND_MODELS, "sweep", "run")),
    "pytorch-dataloader": Peer(
        "eager PyTorch, DataLoader", "pytorch:dataloader", TORCH, ("models", "run"), ("T2",)
    ),
    "pytorch-pixels": Peer(
        "eager PyTorch, uint8 pixels", "pytorch:from_pixels", TORCH, ("models", "run"), ("T2",)
    ),
    "pytorch-compile": Peer("torch.compile", "pytorch:compiled", TORCH, ("models",)),
    "pytorch-batched": Peer("PyTorch, one batched tensor", "", TORCH, ("sweep",)),
    "nnx": Peer("Flax NNX", "nnx:step_by_step", ("flax",), (*STEP_AND_MODELS, "run")),
    "equinox": Peer("Equinox", "equinox:step_by_step", ("equinox",), (*STEP_AND_MODELS, "run")),
    "keras": Peer("Keras 3 on JAX", "keras:fit", KERAS, (*STEP_AND_MODELS, "run"), ("T2",)),
    "keras-steps-per-execution": Peer(
        "Keras 3, steps_per_execution", "keras:fit_several_steps", KERAS, ("models", "run")
    ),
}


def label(name: str) -> str:
    """Returns the name of a peer, or of what else was timed, in tables."""
    return PEERS[name].label if name in PEERS else name


def reason_missing(name: str) -> str | None:
    """Returns why a peer cannot run on this machine, or None if it can."""
    for package in PEERS[name].packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run pip install -e '.[bench]'"
    return None


def takes_pixels(name: str) -> bool:
    """Returns whether a peer takes uint8 pixels, in place of normalized images."""
    return name.startswith("jax") or name == "pytorch-pixels"


def make(name: str, task: Problem, torch_trainer: Callable[..., Any] | None) -> Any:
    """Returns the trainer of a peer.

    Args:
      name: the peer.
      task: what it trains.
      torch_trainer: `TorchTrainer` of jaxtrain.race, which its process cannot import without JAX;
        for peers of PyTorch.
    """
    module, function = PEERS[name].make.split(":")
    found = getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)
    made = found(task, start(task))
    if torch_trainer is None:
        return made
    arguments, options = made
    return torch_trainer(*arguments, **options)
