"""MNIST and data sets in its format, read from disk or downloaded once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain._arguments import checked_path
from jaxtrain._extras import needs_extra
from jaxtrain.data.download import DownloadError, fetch
from jaxtrain.data.idx import Images, read_idx
from jaxtrain.errors import DataUnavailableError, InputError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = 10
DATA_DIR_VARIABLE = "JAXTRAIN_DATA_DIR"


class Download(NamedTuple):
    """Where a data set is downloaded from.

    Attributes:
      mirrors: the addresses of the folder of its files, in the order of preference.
      checksums: SHA-256 of the compressed files, in the order of `FILES`.
    """

    mirrors: tuple[str, ...]
    checksums: tuple[str, str, str, str]


DOWNLOADS = {
    "mnist": Download(
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        checksums=(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": Download(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        checksums=(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "kmnist": Download(
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        checksums=(
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
    ),
}
"""The data sets in MNIST's format, by name."""


def load_mnist(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Images, Images]:
    """Loads `mnist`, `fashion_mnist` or `kmnist` from the folder that `locate_files` finds.

    Returns:
      (images, labels) for training and for testing: images uint8 [examples, 28, 28], labels int32
      [examples] in 0 … 9.

    Raises:
      InputError: a file is damaged, or some of the four files are missing.
      DataUnavailableError: all are missing, and they could not be downloaded.
    """
    folder = locate_files(name, data_dir)
    return _read_split(folder, "train"), _read_split(folder, "test")


def locate_files(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder of the data set's four IDX files, plain or `.gz`.

    Searches the subfolder `name` of `data_dir` (or `$JAXTRAIN_DATA_DIR`), then the folder itself.
    If neither has the files, they are those of the user's cache folder, downloaded if missing.

    Raises:
      InputError: some of the four files are missing.
      DataUnavailableError: all are missing, and they could not be downloaded.
    """
    given = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    folder = None
    try:
        if given and not checked_path(given, "data_dir").expanduser().is_dir():
            raise InputError(
                f"the data folder {given} is not a folder; expected one that contains the files "
                f"of {name}, given as data_dir or ${DATA_DIR_VARIABLE}",
                argument="data_dir",
            )
        if given:
            folder = _find_folder(name, Path(given).expanduser())
    except (OSError, RuntimeError) as error:  # No permission, a name too long, no such user, …
        raise InputError(
            f"the data folder {given} cannot be read ({error}); expected a folder of IDX files, "
            f"given as data_dir or ${DATA_DIR_VARIABLE}",
            argument="data_dir",
        ) from error
    return folder or _download(name, given)


def _find_file(folder: Path, file: str) -> Path | None:
    candidates = (folder / file, folder / f"{file}.gz")
    return next((path for path in candidates if path.exists()), None)


def _folders(name: str, data_dir: Path) -> list[Path]:
    """Returns the folders to search; not one named after another data set with the same files."""
    is_other = data_dir.name in DOWNLOADS and data_dir.name != name
    return [data_dir / name] + ([] if is_other else [data_dir])


def _find_folder(name: str, data_dir: Path) -> Path | None:
    """Returns the folder that has the data set's four files, or None if there are no such files."""
    files = [file for pair in FILES.values() for file in pair]
    for folder in _folders(name, data_dir):
        missing = [file for file in files if _find_file(folder, file) is None]
        if not missing:
            return folder
        if len(missing) < len(files):
            raise InputError(
                f"{folder} contains some of {name}'s four files but not {', '.join(missing)} "
                "(plain or .gz); add them, or use another data_dir",
                argument="data_dir",
            )
    return None


def _read_split(folder: Path, split: str) -> Images:
    image_path, label_path = (_find_file(folder, file) for file in FILES[split])
    assert image_path is not None
    assert label_path is not None
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise InputError(
            f"{image_path} contains {images.dtype} values of shape {images.shape}; expected uint8 "
            "images of shape [examples, 28, 28]"
        )
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise InputError(
            f"{label_path} contains {labels.dtype} values of shape {labels.shape}; expected uint8 "
            "labels of shape [examples]"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{image_path} contains {len(images)} images and {label_path} {len(labels)} labels; "
            "expected one label per image"
        )
    if len(images) == 0:
        raise InputError(f"{image_path} contains no images; expected at least one")
    if labels.max() >= CLASSES:
        raise InputError(
            f"{label_path} contains the label {labels.max()} (at position {labels.argmax()}); "
            f"expected labels from 0 to {CLASSES - 1}"
        )
    return images, labels.astype(np.int32)


def _download(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns the folder of the four files in the user's cache, which are downloaded if missing."""
    with needs_extra("data"):
        import pooch

    folder = pooch.os_cache("jaxtrain") / "data" / name
    files = [f"{file}.gz" for pair in FILES.values() for file in pair]
    mirrors, checksums = DOWNLOADS[name]
    try:
        fetch(dict(zip(files, checksums, strict=True)), mirrors, folder)
    except DownloadError as error:
        raise DataUnavailableError(
            f"{name} is not on disk and could not be downloaded ({error})", _remedy(name, data_dir)
        ) from error
    except OSError as error:
        raise DataUnavailableError(
            f"{name} is not in a data folder, and the cache folder {folder} cannot be used "
            f"({error.strerror or error})",
            f"set $XDG_CACHE_HOME to another folder, or {_remedy(name, data_dir)}",
        ) from error
    return folder


def _remedy(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    files = ", ".join(f"{file}[.gz]" for pair in FILES.values() for file in pair)
    looked = ""
    if data_dir:
        searched = " and ".join(map(str, _folders(name, Path(data_dir))))
        looked = f" (not found in {searched})"
    return f"put {files} into a folder{looked} and pass it as data_dir or ${DATA_DIR_VARIABLE}"
