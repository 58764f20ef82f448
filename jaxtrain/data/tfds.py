"""Data sets that TensorFlow Datasets (TFDS) prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from jaxtrain._arguments import checked_path
from jaxtrain._extras import needs_extra
from jaxtrain.data.idx import Images
from jaxtrain.errors import InputError, first_line

# Of names that `load` and `stream` take.
TFDS_PREFIX = "tfds:"
# data_set/configuration:version; not a name with a namespace, which TFDS would look up online.
_NAME = re.compile(r"(\w+)(?:/([\w+.-]+))?(?::((?:\d+|\*)(?:\.(?:\d+|\*)){2}))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource:
    """Random access to the examples of one split, as (inputs, target) of NumPy values.

    Scalars and arrays have the data set's dtype; strings are `bytes`, and nested features are what
    TFDS returns. A pickled source opens its files again where it is used.

    Attributes:
      name: the data set's name.
      split: the split, such as "train" or "train[:80%]".
      keys: the features that are the inputs and the target.
    """

    def __init__(self, builder: Any, split: str, keys: tuple[str, str] | None = None) -> None:
        """Opens a split of a TFDS builder; see `open_tfds`."""
        with needs_extra("tfds"):
            import tensorflow_datasets as tfds

            # TFDS imports it late, without naming an extra.
            from array_record.python import array_record_data_source  # noqa: F401

        info = builder.info
        self.name, self.split, self.keys = str(info.name), split, _check_keys(info, keys)
        formats = sorted(file_format.value for file_format in info.available_file_formats())
        if "array_record" not in formats:
            raise InputError(
                f"the data set {self.name} in {builder.data_dir} is in the format "
                f"{' and '.join(formats)}; expected array_record; where TensorFlow is installed, "
                f"convert it with tfds convert_format --dataset_version_dir={builder.data_dir} "
                "--out_file_format=array_record",
                argument="name",
            )
        unused = {key: tfds.decode.SkipDecoding() for key in info.features if key not in self.keys}
        try:
            self._source = builder.as_data_source(
                split, decoders=unused, file_format="array_record"
            )
        except (ValueError, KeyError, AssertionError, TypeError) as error:  # unknown, or empty
            raise InputError(
                f"the split is {split!r}; expected one of {', '.join(info.splits)} of {self.name}, "
                "or a part that is not empty, such as 'train[:80%]'",
                argument="split",
            ) from error
        self._dtypes = [info.features[key].np_dtype for key in self.keys]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = self._check_index(index)
        try:
            return self._select(self._source[index])
        except Exception as error:  # RuntimeError of a damaged file, or whatever a decoder raises
            raise InputError(
                f"example {index} of {self.name} (split {self.split!r}) cannot be read "
                f"({first_line(error)}); correct the cause, or prepare the data set again"
            ) from error

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Any, Any]]:
        """Reads a batch of examples; faster than one at a time."""
        checked = [self._check_index(index) for index in indices]
        try:
            return [self._select(example) for example in self._source.__getitems__(checked)]
        except Exception:  # one at a time, the error names the example
            return [self[index] for index in checked]

    def __repr__(self) -> str:
        return f"TfdsSource({self.name!r}, split={self.split!r}, {len(self)} examples)"

    def _check_index(self, index: SupportsIndex) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"the index is {index}; expected one from 0 to {len(self) - 1}")
        return index

    def _select(self, example: dict[str, Any]) -> tuple[Any, Any]:
        inputs, target = (
            # TFDS returns scalars as Python's.
            np.dtype(dtype).type(value) if isinstance(value, bool | int | float) else value
            for value, dtype in zip((example[key] for key in self.keys), self._dtypes, strict=True)
        )
        return inputs, target


def open_tfds(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    keys: tuple[str, str] | None = None,
) -> TfdsSource:
    """Opens a split of a data set that is prepared on disk; never downloads or prepares one.

    Args:
      name: the name in TFDS, such as "mnist", "mnist:3.0.1" or "glue/cola". Without a version, the
        newest in the folder.
      split: the split, or a part of it in TFDS's notation, such as "train[:80%]".
      data_dir: the folder of the prepared data sets. None means `$TFDS_DATA_DIR`, or else
        `~/tensorflow_datasets`.
      keys: the features that are the inputs and the target. None means the data set's own
        `supervised_keys`.

    Returns:
      The examples, in the order of the files.

    Raises:
      InputError: the data set is not in the folder, is not in the ArrayRecord format, or has no
        such split or features.
      MissingExtraError: `jaxtrain[tfds]` is not installed.

    Example:
      >>> source = jt.data.open_tfds("mnist", "train[:80%]")
      >>> image, label = source[0]
      >>> stream = jt.data.stream(source, batch_size=16, key=jax.random.key(0))
    """
    return TfdsSource(_open_builder(name, data_dir), split, keys)


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Images, Images]:
    """Reads the splits "train" and "test" (else "validation") of a prepared data set into memory.

    Args:
      name: as in `open_tfds`.
      data_dir: as in `open_tfds`.

    Returns:
      (inputs, targets) for training and for testing. Integer labels that fit are int32; other
      values have the data set's dtype.

    Raises:
      InputError: as in `open_tfds`; a split is missing; a record is damaged; or the values are not
        numbers of one shape.
      MissingExtraError: `jaxtrain[tfds]` is not installed.

    Example:
      >>> (images, labels), test = load_tfds("mnist")
      >>> images.shape
      (60000, 28, 28, 1)
    """
    builder = _open_builder(name, data_dir)
    splits = list(builder.info.splits)
    test = "test" if "test" in splits else "validation"
    if "train" not in splits or test not in splits:
        raise InputError(
            f"the data set {name} has the splits {', '.join(splits)}; expected train and test (or "
            "validation); open the ones you need with open_tfds",
            argument="name",
        )
    return _read(TfdsSource(builder, "train")), _read(TfdsSource(builder, test))


def _open_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Returns a builder made from the files alone.

    `tfds.builder` would import the data set's code, and asks the network for its description if it
    is not prepared.
    """
    with needs_extra("tfds"):
        import tensorflow_datasets as tfds

    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"the data set's name is {name!r}; expected a name in TFDS, such as 'mnist', "
            "'mnist:3.0.1' or 'glue/cola'",
            argument="name",
        )
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    # Worker processes may run in another folder.
    root = checked_path(given, "data_dir").expanduser().absolute()
    try:
        return tfds.builder_from_directory(_find_folder(name, root, *match.groups()))
    except InputError:
        raise
    except Exception as error:  # of JSON, of protobuf, of the file system, of an old format, …
        raise InputError(
            f"the data set {name} in {root} cannot be opened ({first_line(error)}); correct the "
            f"cause, or {_remedy(name, root)}",
            argument="data_dir",
        ) from error


def _find_folder(
    name: str, root: Path, dataset: str, config: str | None, version: str | None
) -> Path:
    """Returns the folder of the newest prepared version."""
    folders = [
        info.parent
        for part in ([f"{config}/"] if config else ["", "*/"])
        for info in root.glob(f"{dataset}/{part}{version or '*.*.*'}/dataset_info.json")
        if _VERSION.fullmatch(info.parent.name)  # not one of an unfinished preparation.
    ]
    configs = sorted({folder.parent.relative_to(root).as_posix() for folder in folders})
    if not configs:
        raise InputError(
            f"the data set {name} is not prepared in {root}; pass another data_dir, or "
            f"{_remedy(name, root)}",
            argument="name",
        )
    if len(configs) > 1:
        raise InputError(
            f"the data set's name is {name!r}, of which {root} has several configurations; "
            f"expected one of {', '.join(configs)}",
            argument="name",
        )
    return max(folders, key=lambda folder: tuple(map(int, folder.name.split("."))))


def _remedy(name: str, root: Path) -> str:
    return (
        f"prepare it where TensorFlow is installed, with tfds.builder({name!r}, "
        f"data_dir={str(root)!r}, file_format='array_record').download_and_prepare()"
    )


def _check_keys(info: Any, keys: tuple[str, str] | None) -> tuple[str, str]:
    features = sorted(info.features)  # those of a file have no order
    chosen = info.supervised_keys if keys is None else keys
    match chosen:
        case (str(inputs), str(target)) if inputs in features and target in features:
            return inputs, target
    problem = f"keys is {keys!r}" if keys is not None else f"the supervised_keys are {chosen!r}"
    raise InputError(
        f"{problem} for the data set {info.name}; expected two of its features "
        f"{', '.join(features)}; pass keys=(input, target)",
        argument="keys",
    )


def _read(source: TfdsSource) -> Images:
    """Reads all examples into two arrays."""
    columns = zip(*source.__getitems__(range(len(source))), strict=True)
    inputs, targets = (
        _stack(values, key, source) for values, key in zip(columns, source.keys, strict=True)
    )
    if targets.ndim == 1 and targets.dtype.kind in "iu":
        labels = targets.astype(np.int32)
        targets = labels if np.array_equal(labels, targets) else targets
    return inputs, targets


def _stack(values: Sequence[Any], key: str, source: TfdsSource) -> np.ndarray:
    shapes = sorted({np.shape(value) for value in values})
    kind = type(values[0]).__name__
    if len(shapes) == 1:
        array = np.stack(values)
        if array.dtype.kind not in "OSU":
            return array
        kind = f"{array.dtype} values"
    raise InputError(
        f"the feature {key!r} of {source.name} (split {source.split!r}) has {kind} of the shapes "
        f"{', '.join(map(str, shapes[:3]))}; expected arrays of numbers of one shape; read the "
        "data set with jt.data.stream and a transform that makes them so",
        argument="name",
    )
