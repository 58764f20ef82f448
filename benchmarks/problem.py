"""Defines the training problems that every peer solves: network, data and hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels divided by 255
PIXELS = 28 * 28
CLASSES = 10

# Width of each layer of the feed-forward networks; the last layer returns the logits. T2 is the
# tutorial's network.
FEATURES = {
    "linear": (CLASSES,),
    "T2": (256, 128, 64, CLASSES),
    "wide": (1024, 1024, 1024, 1024, CLASSES),
}
DROPOUT_RATES = {"linear": (), "T2": (0.2,) * 3, "wide": (0.2,) * 4, "CNN": (0.25, 0.5)}


Shapes = dict[str, tuple[int, ...]]


def _dense(inputs: int, outputs: int) -> Shapes:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _norm(width: int) -> Shapes:
    return {"scale": (width,), "bias": (width,)}


# Shapes of the other networks' parameters. Kernels of convolutions are [height, width, inputs,
# filters], and of dense layers [inputs, outputs]. The LSTM's gates are in the order i, f, g, o.
SHAPES: dict[str, dict[str, Shapes]] = {
    "CNN": {
        "Conv_0": {"kernel": (3, 3, 1, 32), "bias": (32,)},
        "Conv_1": {"kernel": (3, 3, 32, 64), "bias": (64,)},
        "Dense_0": _dense(9216, 128),
        "Dense_1": _dense(128, CLASSES),
    },
    "ResNet": {
        "Conv_0": {"kernel": (3, 3, 1, 16)},
        "Conv_1": {"kernel": (3, 3, 16, 16)},
        "Conv_2": {"kernel": (3, 3, 16, 16)},
        "Conv_3": {"kernel": (3, 3, 16, 32)},
        "Conv_4": {"kernel": (3, 3, 32, 32)},
        "Conv_5": {"kernel": (1, 1, 16, 32)},
        **{f"BatchNorm_{i}": _norm(width) for i, width in enumerate((16, 16, 16, 32, 32, 32))},
        "Dense_0": _dense(32, CLASSES),
    },
    "LSTM": {
        "LSTM_0": {"kernel": (28, 512), "recurrent_kernel": (128, 512), "bias": (512,)},
        "Dense_0": _dense(128, CLASSES),
    },
    "ViT": {
        "Embedding_0": {"position": (49, 64)},
        "Dense_0": _dense(16, 64),
        **{
            f"Dense_{4 * block + layer}": _dense(*sizes)
            for block in (0, 1)
            for layer, sizes in enumerate(((64, 192), (64, 64), (64, 128), (128, 64)), 1)
        },
        "Dense_9": _dense(64, CLASSES),
        **{f"LayerNorm_{layer}": _norm(64) for layer in range(5)},
    },
}


class Optimizer(NamedTuple):
    """An optimizer of PyTorch, with PyTorch's defaults otherwise.

    Attributes:
      name: "sgd", "adadelta" or "adam".
      learning_rate: learning rate.
      momentum: momentum of SGD.
      weight_decay: factor of the L2 penalty of SGD, which is added to the gradient.
    """

    name: str
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0


T2_OPTIMIZER = Optimizer("sgd", 0.01, weight_decay=1e-6)
OPTIMIZERS = {
    "linear": T2_OPTIMIZER,
    "T2": T2_OPTIMIZER,
    "wide": T2_OPTIMIZER,
    "CNN": Optimizer("adadelta", 1.0),
    "ResNet": Optimizer("sgd", 0.05, momentum=0.9),
    "LSTM": Optimizer("adam", 1e-3),
    "ViT": Optimizer("adam", 1e-3),
}

Params = dict[str, dict[str, np.ndarray]]


class Problem(NamedTuple):
    """One training problem.

    Attributes:
      network: name of the network, a key of `OPTIMIZERS`.
      features: width of each layer of a feed-forward network; empty for the others.
      dropout_rates: fraction of the units that each dropout layer drops.
      optimizer: the optimizer and its hyperparameters.
      images: pixels [examples, 28, 28], uint8.
      labels: classes [examples], uint8.
      batch_size: examples per step.
    """

    network: str
    features: tuple[int, ...]
    dropout_rates: tuple[float, ...]
    optimizer: Optimizer
    images: np.ndarray
    labels: np.ndarray
    batch_size: int = 64

    @property
    def steps(self) -> int:
        """Steps per epoch, including the partial last batch."""
        return -(-len(self.images) // self.batch_size)

    @property
    def case(self) -> str:
        """The name of the problem in tables."""
        return f"{self.network}, batch {self.batch_size}"


class Trainer(NamedTuple):
    """A peer's training functions for one problem; each waits until the device has finished.

    Attributes:
      train: makes passes over the data in stored order, as the peer's users write them.
      losses: makes one pass, and returns the loss of each step, or the mean of each group of steps
        where the peer reports only these.
      steps: takes `count` steps on the first batch, one call each.
      predict: returns the logits of images, in evaluation mode.
      updates: returns how many updates have been made.
    """

    train: Callable[[int], Any]
    losses: Callable[[], np.ndarray]
    steps: Callable[[int], None]
    predict: Callable[[np.ndarray], np.ndarray]
    updates: Callable[[], int]


def make(network: str, images: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> Problem:
    """Returns the problem of training `network` on these images."""
    features, rates = FEATURES.get(network, ()), DROPOUT_RATES.get(network, ())
    return Problem(network, features, rates, OPTIMIZERS[network], images, labels, batch_size)


def without_dropout(problem: Problem) -> Problem:
    """Returns the problem with dropout rates of 0."""
    return problem._replace(dropout_rates=(0.0,) * len(problem.dropout_rates))


def start(problem: Problem, seed: int = 0) -> Params:
    """Returns initial parameters by layer.

    Weights are uniform in ±1/√fan_in, and biases too. A feed-forward network has the `weight`
    [outputs, inputs] and the `bias` of each layer; the other networks have those of `SHAPES`.
    """
    if problem.features:
        return dense_start(problem.features, math.prod(problem.images.shape[1:]), seed)
    return _draw(SHAPES[problem.network], seed)


def dense_start(features: tuple[int, ...], fan_in: int, seed: int) -> Params:
    """Returns the initial parameters of a feed-forward network."""
    shapes: dict[str, Shapes] = {}
    for layer, width in enumerate(features):
        shapes[f"Dense_{layer}"] = {"weight": (width, fan_in), "bias": (width,)}
        fan_in = width
    return _draw(shapes, seed)


def _draw(shapes: dict[str, Shapes], seed: int) -> Params:
    generator = np.random.default_rng(seed)
    return {
        layer: {name: _initial(generator, name, parts) for name in parts}
        for layer, parts in shapes.items()
    }


def _initial(generator: np.random.Generator, name: str, parts: Shapes) -> np.ndarray:
    """Returns the initial value of one of a layer's parameters."""
    if "weight" in parts:
        fan_in = parts["weight"][1]
    else:  # the bound of a layer without a kernel is arbitrary
        fan_in = math.prod(parts.get("kernel", (64, 0))[:-1])
    bound = fan_in**-0.5
    value = generator.uniform(-bound, bound, parts[name]).astype(np.float32)
    return 1 + value if name == "scale" else value


def normalize(images: np.ndarray) -> np.ndarray:
    """Returns pixels from 0 to 255 as normalized float32 inputs of the same shape."""
    inputs = images.astype(np.float32)
    inputs /= 255  # in place: a copy would count as the peer's memory
    inputs -= MEAN
    inputs /= STD
    return inputs


def random_images(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images and labels in MNIST's shapes; speed does not depend on the values."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    return images, generator.integers(0, CLASSES, examples, dtype=np.uint8)


def write_images(folder: Path, name: str, data_dir: Path | None = None) -> Path:
    """Writes a data set as arrays, which every peer's process reads without importing jaxtrain."""
    import jaxtrain as jt

    train, test = jt.data.load(name, data_dir)
    np.savez(
        folder / f"{name}.npz",
        train_images=train.inputs,
        train_labels=np.asarray(train.targets, np.uint8),
        test_images=test.inputs,
        test_labels=np.asarray(test.targets, np.uint8),
    )
    return folder / f"{name}.npz"


def read_images(file: Path | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of the split `train` or `test`; without a file, random ones."""
    if file is None:
        return random_images(1280)
    with np.load(file) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits [1797, 8, 8] as uint8 pixels, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (15 * digits.images).astype(np.uint8), digits.target.astype(np.uint8)
