"""MNIST is found in folders or downloaded; errors name damaged and missing files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.data.mnist import DOWNLOADS, FILES, Download
from tests.test_idx import encode

PIXELS = np.arange(5 * 28 * 28, dtype=np.uint32).reshape(5, 28, 28).astype(np.uint8)
LABELS = np.array([3, 0, 9, 1, 1], np.uint8)
CONTENTS = {
    name: encode(array)
    for split in FILES.values()
    for name, array in zip(split, (PIXELS, LABELS), strict=True)
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets no data folder, an empty cache, and servers that are down; allows local servers."""
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in DOWNLOADS:
        monkeypatch.setitem(DOWNLOADS, name, Download(("http://127.0.0.1:9/",), ("0" * 64,) * 4))


def write_files(folder: Path, compressed: bool = False, **changed: bytes | None) -> Path:
    """Writes the four files with some contents changed; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        content = changed.get(name.replace("-", "_").removesuffix("_ubyte"), content)
        if content is not None:
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(content) if compressed else content)
    return folder


def assert_loaded(loaded: tuple[jt.Dataset, jt.Dataset]) -> None:
    for part in loaded:
        np.testing.assert_array_equal(part.inputs, PIXELS)
        np.testing.assert_array_equal(part.targets, LABELS)
        assert part.inputs.dtype == np.uint8
        assert part.targets.dtype == np.int32


@pytest.mark.parametrize(
    ("by", "subfolder", "compressed"),
    [("argument", "", True), ("argument", "kmnist", False), ("environment", "kmnist", True)],
)
def test_files_are_found_in_the_data_folder(
    tmp_path, monkeypatch, by, subfolder, compressed
) -> None:
    write_files(tmp_path / "data" / subfolder, compressed)
    if by == "environment":
        monkeypatch.setenv("JAXTRAIN_DATA_DIR", str(tmp_path / "data"))
        assert_loaded(jt.data.load("kmnist"))
    else:
        assert_loaded(jt.data.load("kmnist", tmp_path / "data"))


def test_a_subfolder_named_after_the_data_set_has_priority(tmp_path: Path) -> None:
    write_files(tmp_path, t10k_labels_idx1=b"damaged")
    write_files(tmp_path / "mnist")
    assert_loaded(jt.data.load("mnist", tmp_path))


def test_the_folder_of_another_data_set_is_not_used(tmp_path: Path) -> None:
    """The files of MNIST and KMNIST have the same names."""
    folder = write_files(tmp_path / "mnist")
    with pytest.raises(jt.errors.DataUnavailableError):
        jt.data.load("kmnist", folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, t10k_labels_idx1=None)
    with pytest.raises(jt.errors.InputError, match=r"not t10k-labels-idx1-ubyte \(plain or \.gz\)"):
        jt.data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train_labels_idx1": encode(LABELS[:4])},
            "contains 5 images and .*train-labels-idx1-ubyte 4 labels",
        ),
        (
            {"train_labels_idx1": encode(np.array([3, 0, 10, 1, 1], np.uint8))},
            r"train-labels-idx1-ubyte contains the label 10 \(at position 2\); expected labels",
        ),
        ({"train_images_idx3": encode(LABELS)}, r"contains uint8 values of shape \(5,\)"),
        (
            {"t10k_images_idx3": encode(PIXELS[:, 4:24, 4:24])},
            r"t10k-images.* shape \(5, 20, 20\); expected .*\[examples, 28, 28\]",
        ),
        ({"train_labels_idx1": encode(LABELS.astype(np.float32))}, "contains float32 values"),
        ({"t10k_images_idx3": CONTENTS["t10k-images-idx3-ubyte"][:-5]}, "t10k-images.*truncated"),
        (
            {"train_images_idx3": encode(PIXELS[:0]), "train_labels_idx1": encode(LABELS[:0])},
            "contains no images",
        ),
    ],
)
def test_invalid_files_are_named(tmp_path: Path, changed, message) -> None:
    write_files(tmp_path, **changed)
    for name in ("mnist", "auto"):  # auto does not fall back on digits
        with pytest.raises(jt.errors.InputError, match=message):
            jt.data.load(name, tmp_path)


def test_an_unknown_name_is_refused_with_a_list_of_names() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"'minst'; expected one of auto, mnist, fashion_mnist"
    ):
        jt.data.load("minst")


def test_auto_refuses_a_missing_data_folder(tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match="missing is not a folder"):
        jt.data.load("auto", tmp_path / "missing")


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/data", "x" * 5000])
def test_a_data_folder_that_cannot_be_read_is_named(folder: str) -> None:
    with pytest.raises(jt.errors.InputError, match=r"the data folder .* cannot be read"):
        jt.data.load("mnist", folder)


def test_without_files_and_network_the_error_lists_the_alternatives(tmp_path: Path) -> None:
    # The refused connection is reported at the first attempt, not after a time limit.
    with pytest.raises(
        jt.errors.DataUnavailableError, match=r"downloaded \(http://127.*: no connection\); put"
    ) as raised:
        jt.data.load("mnist", tmp_path)
    message = str(raised.value)
    for part in ("data_dir", "$JAXTRAIN_DATA_DIR", "digits", str(tmp_path), *CONTENTS):
        assert part in message
    assert "--" not in message  # the library names no flags of the scripts
    with pytest.warns(UserWarning, match=r"digits instead of MNIST: .* to train on MNIST, put tra"):
        train, _ = jt.data.load("auto")
    assert len(train) == 1437


def test_auto_loads_mnist_where_its_files_are(tmp_path: Path) -> None:
    resolved = jt.data.load_resolved("auto", write_files(tmp_path))
    assert (resolved.name, resolved.notice) == ("mnist", None)


def test_the_published_files_have_the_published_class_sizes(mnist: jt.data.Resolved) -> None:
    assert mnist.train.inputs.shape == (60_000, 28, 28)
    assert mnist.test.inputs.shape == (10_000, 28, 28)
    # Class sizes as published with the data set.
    assert np.bincount(mnist.train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
