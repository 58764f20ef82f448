"""MNIST and the data sets published in its files: found on disk, or downloaded once."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np

from jaxtrain.data.dataset import Images
from jaxtrain.data.idx import read_idx
from jaxtrain.errors import DataUnavailableError, InputError

# Data set -> the builder in TensorFlow Datasets that knows its address and checksums.
BUILDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES = 10
DATA_DIR_VARIABLE = "JAXTRAIN_DATA_DIR"

# A user without a network hears so within 10 seconds; TensorFlow Datasets alone would retry for
# more than 3 minutes.
_REACHABLE_SECONDS = 6.0


def load_mnist(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Images, Images]:
    """Load `mnist`, `fashion_mnist` or `kmnist` from the folder that `locate_files` finds.

    Returns:
      (images, labels) for training and for testing: images uint8 [examples, 28, 28], labels int32
      [examples] in 0 … 9.

    Raises:
      InputError: a file is damaged, or some of the four are missing.
      DataUnavailableError: there are none, and they could not be downloaded.
    """
    folder = locate_files(name, data_dir)
    return _read_split(folder, "train"), _read_split(folder, "test")


def locate_files(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the data set's four IDX files, plain or `.gz`.

    Looks in `data_dir` (else `$JAXTRAIN_DATA_DIR`), in its subfolder `name` first, then in the
    folder itself; then in the user's cache folder, to which files found nowhere are downloaded.

    Raises:
      InputError: some of the four files are missing.
      DataUnavailableError: there are none, and they could not be downloaded.
    """
    given = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    folder = None
    try:
        if given and not Path(given).expanduser().is_dir():
            raise InputError(
                f"the data folder {given} is not a folder; expected one that holds the files of "
                f"{name}, named by --data-dir or ${DATA_DIR_VARIABLE}"
            )
        if given:
            folder = _find_folder(name, Path(given).expanduser())
    except (OSError, RuntimeError) as error:  # No permission, a name too long, no such user, …
        raise InputError(
            f"the data folder {given} cannot be read ({error}); expected a folder of IDX files, "
            f"named by --data-dir or ${DATA_DIR_VARIABLE}"
        ) from error
    return folder or _find_folder(name, cache_dir()) or _download(name, given)


def cache_dir() -> Path:
    """The user's cache folder for jaxtrain's downloads (`$XDG_CACHE_HOME/jaxtrain` on Linux)."""
    from platformdirs import user_cache_path

    return user_cache_path("jaxtrain") / "data"


def _find_file(folder: Path, file: str) -> Path | None:
    candidates = (folder / file, folder / f"{file}.gz")
    return next((path for path in candidates if path.exists()), None)


def _find_folder(name: str, data_dir: Path) -> Path | None:
    """The folder that holds the data set's four files, or None if none of them is there."""
    folders = [data_dir / name]
    if data_dir.name not in BUILDERS or data_dir.name == name:
        # A folder named after one data set is not searched for another: all name files alike.
        folders.append(data_dir)
    files = [file for pair in FILES.values() for file in pair]
    for folder in folders:
        missing = [file for file in files if _find_file(folder, file) is None]
        if not missing:
            return folder
        if len(missing) < len(files):
            raise InputError(
                f"{folder} holds some of {name}'s four files but not {', '.join(missing)} "
                "(plain or .gz); add them, or point --data-dir elsewhere"
            )
    return None


def _read_split(folder: Path, split: str) -> Images:
    image_path, label_path = (_find_file(folder, file) for file in FILES[split])
    assert image_path is not None
    assert label_path is not None
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8:
        raise InputError(
            f"{image_path} holds {images.dtype} values of shape {images.shape}; expected uint8 "
            "images of shape [examples, 28, 28]"
        )
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise InputError(
            f"{label_path} holds {labels.dtype} values of shape {labels.shape}; expected uint8 "
            "labels of shape [examples]"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{image_path} holds {len(images)} images but {label_path} {len(labels)} labels; "
            "expected one label an image"
        )
    if len(images) == 0:
        raise InputError(f"{image_path} holds no images; expected at least one")
    if labels.max() >= CLASSES:
        raise InputError(
            f"{label_path} holds the label {labels.max()} (at position {labels.argmax()}); "
            f"expected labels from 0 to {CLASSES - 1}"
        )
    return images, labels.astype(np.int32)


def _download(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """Fetch the four files into the cache folder by TensorFlow Datasets' download manager.

    It checks the registered checksums and works without TensorFlow; only its unpacking would
    need that, so the files are parsed here. The folder takes its final name when all four files
    are whole.
    """
    from tensorflow_datasets import disable_progress_bar, download
    from tensorflow_datasets.image_classification import mnist as builders

    base_url = getattr(builders, BUILDERS[name]).URL
    names = [f"{file}.gz" for pair in FILES.values() for file in pair]
    _check_reachable(name, base_url + names[0], data_dir)
    folder = cache_dir() / name
    disable_progress_bar()  # A library is silent.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="download-") as scratch:
            manager = download.DownloadManager(
                download_dir=scratch, dataset_name=name, force_checksums_validation=True
            )
            paths = manager.download({file: base_url + file for file in names})
            complete = Path(scratch) / "complete"
            complete.mkdir()
            for file, path in paths.items():
                shutil.move(path, complete / file)
            try:
                complete.replace(folder)
            except OSError:  # Another process may have been faster.
                if _find_folder(name, cache_dir()) is None:
                    raise
    except Exception as error:  # Its errors share no base class: HTTP, checksum, disk, …
        raise DataUnavailableError(
            f"{name} could not be downloaded from {base_url} ({type(error).__name__}: {error})",
            _remedy(name, data_dir),
        ) from error
    return folder


def _check_reachable(name: str, url: str, data_dir: str | os.PathLike[str] | None) -> None:
    """Raise within seconds if the server does not answer.

    In a thread, because a name look-up can hang for longer than any timeout of the request.
    """
    import requests

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=_REACHABLE_SECONDS, allow_redirects=True).raise_for_status()
            outcome.append(None)
        except requests.RequestException as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_REACHABLE_SECONDS)
    problem = outcome[0] if outcome else f"no answer in {_REACHABLE_SECONDS:g} s"
    if problem is not None:
        raise DataUnavailableError(
            f"{name} is not on disk and cannot be downloaded from {url} ({problem})",
            _remedy(name, data_dir),
        )


def _remedy(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    files = ", ".join(f"{file}[.gz]" for pair in FILES.values() for file in pair)
    looked = ""
    if data_dir:
        looked = (
            f" (looked into {Path(data_dir) / name} and {data_dir}, where they are not {name}'s)"
        )
    return f"put {files} into a folder{looked} and name it by --data-dir or ${DATA_DIR_VARIABLE}"
