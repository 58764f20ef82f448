"""Data sets by name, and the Dataset they come in."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import jax.numpy as jnp

from jaxtrain.data.dataset import Dataset, Images
from jaxtrain.data.digits import load_digits
from jaxtrain.data.idx import read_idx
from jaxtrain.data.mnist import BUILDERS, load_mnist
from jaxtrain.data.synthetic import line, noisy_line, points_on_line
from jaxtrain.errors import DataUnavailableError, InputError

__all__ = [
    "NAMES",
    "STATISTICS",
    "Dataset",
    "Resolved",
    "line",
    "load",
    "load_resolved",
    "noisy_line",
    "points_on_line",
    "read_idx",
]

NAMES = ("auto", *BUILDERS, "digits")

# Mean and standard deviation of the training pixels, with 0 … 255 scaled to 0 … 1. Those of
# MNIST are the tutorial's (T2); the others were computed from the training images.
STATISTICS = {
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.2860, 0.3530),
    "kmnist": (0.1918, 0.3483),
    "digits": (0.2244, 0.3493),
}


class Resolved(NamedTuple):
    """A data set, and which one it is where `auto` was asked for.

    Attributes:
      name: the data set's own name, never `auto`.
      train: training examples: images uint8 [examples, 28, 28], labels int32 [examples].
      test: test examples, likewise.
      notice: where MNIST could not be had and digits stand in for it, why; else None.
    """

    name: str
    train: Dataset
    test: Dataset
    notice: str | None


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Dataset, Dataset]:
    """Load a data set of 28 × 28 grey images in ten classes.

    Args:
      name: `mnist`, `fashion_mnist`, `kmnist`, `digits`, or `auto`: MNIST where it can be had,
        else digits, with a warning. A name given explicitly never falls back to another.
      data_dir: folder of the IDX files; None takes `$JAXTRAIN_DATA_DIR`, then the cache folder,
        then downloads. Not used for digits.

    Returns:
      (train, test): images uint8 [examples, 28, 28] in 0 … 255, labels int32 [examples].

    Raises:
      InputError: unknown name, or files that are damaged.
      DataUnavailableError: no files on disk and no way to download them.
    """
    resolved = load_resolved(name, data_dir)
    if resolved.notice is not None:
        warnings.warn(f"digits instead of MNIST: {resolved.notice}", stacklevel=2)
    return resolved.train, resolved.test


def load_resolved(name: str, data_dir: str | os.PathLike[str] | None = None) -> Resolved:
    """`load`, which also tells what `auto` became and why; same arguments and errors."""
    notice = None
    if name == "auto":
        try:
            name, splits = "mnist", _load_arrays("mnist", data_dir)
        except DataUnavailableError as error:
            name, splits = "digits", _load_arrays("digits")
            notice = f"{error.reason}; to train on MNIST, {error.remedy}"
    else:
        splits = _load_arrays(name, data_dir)
    train, test = (Dataset(jnp.asarray(images), jnp.asarray(labels)) for images, labels in splits)
    return Resolved(name, train, test, notice)


def _load_arrays(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[Images, Images]:
    if name == "digits":
        return load_digits()
    if name in BUILDERS:
        return load_mnist(name, data_dir)
    raise InputError(f"the data set is {name!r}; expected one of {', '.join(NAMES)}")
