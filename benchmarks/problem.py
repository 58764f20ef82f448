"""Defines the training problems that every peer solves: network, data and hyperparameters."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels divided by 255
PIXELS = 28 * 28
CLASSES = 10

# Width of each layer; the last layer returns the logits. T2 is the tutorial's network.
NETWORKS = {
    "linear": (CLASSES,),
    "T2": (256, 128, 64, CLASSES),
    "wide": (1024, 1024, 1024, 1024, CLASSES),
}

Params = dict[str, dict[str, np.ndarray]]


class Problem(NamedTuple):
    """One training problem.

    Attributes:
      network: name of the network, a key of `NETWORKS`.
      features: width of each layer.
      images: pixels [examples, 28, 28], uint8.
      labels: classes [examples], uint8.
      batch_size: examples per step.
      dropout_rate: fraction of the hidden units that are dropped.
      learning_rate: learning rate of SGD.
      weight_decay: factor of the L2 penalty, which is added to the gradient.
    """

    network: str
    features: tuple[int, ...]
    images: np.ndarray
    labels: np.ndarray
    batch_size: int = 64
    dropout_rate: float = 0.2
    learning_rate: float = 0.01
    weight_decay: float = 1e-6

    @property
    def steps(self) -> int:
        """Steps per epoch, including the partial last batch."""
        return -(-len(self.images) // self.batch_size)


class Trainer(NamedTuple):
    """A peer's training functions for one problem; each waits until the device has finished.

    Attributes:
      steps: takes `count` steps on the first batch, one call each.
      epoch: makes one pass over the data in stored order, as the peer's users write it.
      losses: does the same and returns the loss of each step, or the mean of each group of steps
        where the peer reports only these.
      accuracy: returns the fraction of the images that are classified as labelled.
    """

    steps: Callable[[int], None]
    epoch: Callable[[], object]
    losses: Callable[[], np.ndarray]
    accuracy: Callable[[np.ndarray, np.ndarray], float]


def make(network: str, images: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> Problem:
    """Returns the problem of training `network` on these images."""
    return Problem(network, NETWORKS[network], images, labels, batch_size)


def start(problem: Problem, seed: int = 0) -> Params:
    """Returns initial parameters, uniform in ±1/√fan_in; kernels are [inputs, outputs]."""
    generator = np.random.default_rng(seed)
    params: Params = {}
    fan_in = PIXELS
    for layer, width in enumerate(problem.features):
        bound = fan_in**-0.5
        params[f"Dense_{layer}"] = {
            "kernel": generator.uniform(-bound, bound, (fan_in, width)).astype(np.float32),
            "bias": generator.uniform(-bound, bound, width).astype(np.float32),
        }
        fan_in = width
    return params


def normalize(images: np.ndarray) -> np.ndarray:
    """Returns pixels from 0 to 255 as normalized float32 inputs [examples, 784]."""
    inputs = images.reshape(len(images), -1).astype(np.float32)
    inputs /= 255  # in place: a copy would count as the peer's memory
    inputs -= MEAN
    inputs /= STD
    return inputs


def random_images(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images and labels in MNIST's shapes; speed does not depend on the values."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    return images, generator.integers(0, CLASSES, examples, dtype=np.uint8)


def read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images and labels of MNIST's split `train` or `t10k`, without importing any peer."""
    contents = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        plain = folder / f"{split}-{kind}-ubyte"
        if plain.exists():
            content = plain.read_bytes()
        else:
            content = gzip.decompress(plain.with_name(f"{plain.name}.gz").read_bytes())
        contents.append(np.frombuffer(content, np.uint8)[header:])
    return contents[0].reshape(-1, 28, 28), contents[1]
