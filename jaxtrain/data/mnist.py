"""MNIST and data sets in its format, read from disk or downloaded once."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain.data.download import DownloadError, check_reachable, fetch
from jaxtrain.data.idx import Images, read_idx
from jaxtrain.errors import DataUnavailableError, InputError

# Data set -> the builder in TensorFlow Datasets that registers its URL and checksums.
BUILDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = 10
DATA_DIR_VARIABLE = "JAXTRAIN_DATA_DIR"

# Prefix of the folder of an unfinished download; abandoned if older than any download can take.
_SCRATCH = "download-"
_ABANDONED_SECONDS = 2 * 60 * 60


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

    Searches the subfolder `name` of `data_dir` (or `$JAXTRAIN_DATA_DIR`), then the folder itself,
    then the user's cache folder. If no folder has the files, downloads them to the cache.

    Raises:
      InputError: some of the four files are missing.
      DataUnavailableError: all are missing, and they could not be downloaded.
    """
    given = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    folder = None
    try:
        if given and not Path(given).expanduser().is_dir():
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
    return folder or _find_in_cache(name) or _download(name, given)


def _find_in_cache(name: str) -> Path | None:
    try:
        return _find_folder(name, cache_dir())
    except OSError as error:
        raise InputError(
            f"the cache folder {cache_dir()} cannot be read ({error.strerror or error}); set "
            "$XDG_CACHE_HOME to another folder"
        ) from error


def cache_dir() -> Path:
    """Returns the user's cache folder for downloads (`$XDG_CACHE_HOME/jaxtrain` on Linux)."""
    with needs_extra("data"):
        from platformdirs import user_cache_path

    return user_cache_path("jaxtrain") / "data"


def _find_file(folder: Path, file: str) -> Path | None:
    candidates = (folder / file, folder / f"{file}.gz")
    return next((path for path in candidates if path.exists()), None)


def _folders(name: str, data_dir: Path) -> list[Path]:
    """Returns the folders to search; not one named after another data set with the same files."""
    is_other = data_dir.name in BUILDERS and data_dir.name != name
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
    """Downloads the four files to the cache folder, with the URLs and checksums of TFDS.

    TensorFlow Datasets' own download manager limits neither time nor size, and needs TensorFlow to
    read the files. The folder gets its final name once all four files are complete.
    """
    with needs_extra("data"):
        import requests  # noqa: F401
        import urllib3  # noqa: F401
        from tensorflow_datasets.image_classification import mnist as builders

    builder = getattr(builders, BUILDERS[name])
    files = [f"{file}.gz" for pair in FILES.values() for file in pair]
    folder = cache_dir() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_SCRATCH) as scratch:
            check_reachable(builder.URL + files[0])
            complete = Path(scratch) / "complete"
            complete.mkdir()
            for file in files:
                url = builder.URL + file
                known = builder.url_infos.get(url)
                if known is None:
                    raise DownloadError(f"{url} has no registered checksum")
                fetch(url, complete / file, int(known.size), known.checksum)
            try:
                complete.replace(folder)
            except OSError:  # Another process may have been faster.
                if _find_folder(name, cache_dir()) is None:
                    raise
    except DownloadError as error:
        raise DataUnavailableError(
            f"{name} is not on disk and could not be downloaded: {error}", _remedy(name, data_dir)
        ) from error
    except OSError as error:
        raise DataUnavailableError(
            f"{name} is not on disk, and the cache folder {folder.parent} cannot be written "
            f"({error.strerror or error})",
            f"set $XDG_CACHE_HOME to another folder, or {_remedy(name, data_dir)}",
        ) from error
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Removes the unfinished downloads of killed processes."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _remedy(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    files = ", ".join(f"{file}[.gz]" for pair in FILES.values() for file in pair)
    looked = ""
    if data_dir:
        searched = " and ".join(map(str, _folders(name, Path(data_dir))))
        looked = f" (not found in {searched})"
    return f"put {files} into a folder{looked} and pass it as data_dir or ${DATA_DIR_VARIABLE}"
