"""Data sets by name, and streams of batches from disk."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import jax

from jaxtrain._arguments import check_arguments, check_shard
from jaxtrain.data.digits import load_digits
from jaxtrain.data.idx import Images, read_idx
from jaxtrain.data.mnist import DOWNLOADS, load_mnist
from jaxtrain.data.stream import Stream, stream
from jaxtrain.data.synthetic import line, noisy_line, points_on_line
from jaxtrain.data.tfds import TFDS_PREFIX, load_tfds, open_tfds
from jaxtrain.dataset import Dataset
from jaxtrain.errors import DataUnavailableError, InputError

__all__ = [
    "NAMES",
    "STATISTICS",
    "Resolved",
    "Stream",
    "line",
    "load",
    "load_resolved",
    "noisy_line",
    "open_tfds",
    "points_on_line",
    "read_idx",
    "stream",
]

NAMES = ("auto", *DOWNLOADS, "digits")
"""The names that `load` accepts, besides those of TensorFlow Datasets."""

STATISTICS = {
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.2860, 0.3530),
    "kmnist": (0.1918, 0.3483),
    "digits": (0.2244, 0.3493),
}
"""Mean and standard deviation of the training pixels by data set, scaled from 0 … 255 to 0 … 1.

The values for MNIST are those of tutorial T2; the others were computed from the training images.

Example:
  >>> mean, std = jt.data.STATISTICS["fashion_mnist"]
  >>> model = jt.models.FeedForward(mean=mean, std=std)
"""


class Resolved(NamedTuple):
    """A data set, with the name that `auto` resolved to.

    Attributes:
      name: the data set's own name, never `auto`.
      train: training examples: images uint8 [examples, 28, 28], labels int32 [examples].
      test: test examples of the same shapes.
      notice: why `auto` fell back from MNIST to digits; None if it did not.
    """

    name: str
    train: Dataset
    test: Dataset
    notice: str | None


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    shard: tuple[int, int] | None = None,
) -> tuple[Dataset, Dataset]:
    """Loads a data set: 28 × 28 grey images in ten classes, or any that TFDS has prepared.

    Args:
      name: `mnist`, `fashion_mnist`, `kmnist`, `digits`, or `auto`: MNIST if it is available,
        else digits with a warning. An explicit name never falls back to another. `tfds:NAME` reads
        a data set of TensorFlow Datasets that is prepared on disk in the ArrayRecord format;
        TensorFlow is not needed.
      data_dir: folder of the IDX files. None searches `$JAXTRAIN_DATA_DIR`, then the cache folder,
        then downloads. Not used for digits. For `tfds:NAME`, TFDS's folder, by default
        `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      shard: `(index, count)` returns the part of one of several processes: the training and the
        test examples are each cut into `count` parts of equal size, in stored order. Up to
        `count - 1` examples at the end are left out.

    Returns:
      (train, test): images uint8 [examples, 28, 28] in 0 … 255, labels int32 [examples]. Of
      `tfds:NAME`, its inputs and targets as TFDS describes them.

    Raises:
      InputError: the name is unknown, a file is damaged, or `shard` is out of range.
      DataUnavailableError: the files are not on disk and could not be downloaded.
      MissingExtraError: `jaxtrain[data]` is not installed (`jaxtrain[tfds]` for `tfds:NAME`);
        only IDX files in `data_dir` need no extra.

    Example:
      >>> train, test = jt.data.load("digits")
      >>> train.inputs.shape
      (1437, 28, 28)
    """
    resolved = load_resolved(name, data_dir, shard)
    if resolved.notice is not None:
        warnings.warn(f"digits instead of MNIST: {resolved.notice}", stacklevel=2)
    return resolved.train, resolved.test


def load_resolved(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
) -> Resolved:
    """Loads as `load` does, and also returns what `auto` resolved to and why.

    Args:
      name: as in `load`.
      data_dir: as in `load`.
      shard: as in `load`.

    Raises:
      InputError: as in `load`.
      DataUnavailableError: as in `load`.
      MissingExtraError: as in `load`.

    Example:
      >>> resolved = jt.data.load_resolved("digits")
      >>> resolved.name, len(resolved.train), len(resolved.test)
      ('digits', 1437, 360)
    """
    check_arguments(load_resolved, locals())
    index, count = (0, 1) if shard is None else check_shard(shard)
    notice = None
    if name == "auto":
        try:
            name, splits = "mnist", _load_arrays("mnist", data_dir)
        except DataUnavailableError as error:
            name, splits = "digits", _load_arrays("digits")
            notice = f"{error.reason}; to train on MNIST, {error.remedy}"
    else:
        splits = _load_arrays(name, data_dir)

    def part(arrays: Images) -> Dataset:
        size = len(arrays[0]) // count
        if not size:
            raise InputError(
                f"shard is {shard} for {len(arrays[0])} examples; expected at most as many parts",
                argument="shard",
            )
        # `jnp.asarray` would compile a program for each shape.
        return Dataset(*(jax.device_put(array[index * size :][:size]) for array in arrays))

    train, test = splits
    return Resolved(name, part(train), part(test), notice)


def _load_arrays(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[Images, Images]:
    if name == "digits":
        return load_digits()
    if name in DOWNLOADS:
        return load_mnist(name, data_dir)
    if name.startswith(TFDS_PREFIX):
        return load_tfds(name.removeprefix(TFDS_PREFIX), data_dir)
    raise InputError(
        f"the data set is {name!r}; expected one of {', '.join(NAMES)}, or tfds:NAME",
        argument="dataset",
    )
