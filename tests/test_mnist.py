"""MNIST is found in folders or downloaded; errors name damaged and missing files."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.data import download
from jaxtrain.data.mnist import FILES, cache_dir
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
    """Sets no data folder and an empty cache, and bypasses a proxy for local servers."""
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("subfolder", ["", "kmnist"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_files_are_found_in_the_data_folder(
    tmp_path, monkeypatch, compressed, subfolder, by
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


def test_the_folder_of_another_data_set_is_not_used(tmp_path: Path, dead_server) -> None:
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


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A local server of MNIST's files, registered with TensorFlow Datasets as the source.

    Yields the files by name; a test may change their content, but not the checksums.
    """
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import mnist

    files = {f"{name}.gz": gzip.compress(content) for name, content in CONTENTS.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content = files.get(self.path.removeprefix("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content is not None:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(mnist.MNIST, "URL", url)
    infos = {
        url + name: checksums.UrlInfo(len(content), sha256(content).hexdigest(), name)
        for name, content in files.items()
    }
    monkeypatch.setattr(mnist.MNIST, "url_infos", infos)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_are_downloaded_once(serve: dict[str, bytes]) -> None:
    assert_loaded(jt.data.load("mnist"))
    serve.clear()
    assert_loaded(jt.data.load("mnist"))
    assert sorted(path.name for path in cache_dir().rglob("*")) == sorted(
        ["mnist", *(f"{name}.gz" for name in CONTENTS)]
    )


def test_concurrent_downloads_succeed(serve: dict[str, bytes]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        for resolved in pool.map(lambda _: jt.data.load_resolved("auto"), range(3)):
            assert resolved.name == "mnist"
            assert_loaded((resolved.train, resolved.test))


def test_a_file_with_the_wrong_checksum_is_not_kept(serve: dict[str, bytes]) -> None:
    serve["train-labels-idx1-ubyte.gz"] = gzip.compress(encode(LABELS[::-1]))
    with pytest.raises(jt.errors.DataUnavailableError, match="checksum"):
        jt.data.load("mnist")
    assert not list(cache_dir().iterdir())


def test_a_file_without_a_registered_checksum_is_not_downloaded(
    serve: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow_datasets.image_classification import mnist

    monkeypatch.delitem(mnist.MNIST.url_infos, f"{mnist.MNIST.URL}t10k-images-idx3-ubyte.gz")
    with pytest.raises(jt.errors.DataUnavailableError, match="has no registered checksum"):
        jt.data.load("mnist")
    assert not list(cache_dir().iterdir())


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the server of the data sets unreachable."""
    from tensorflow_datasets.image_classification import mnist

    for builder in (mnist.MNIST, mnist.KMNIST):
        monkeypatch.setattr(builder, "URL", "http://127.0.0.1:9/")


def test_auto_refuses_a_missing_data_folder(tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match="missing is not a folder"):
        jt.data.load("auto", tmp_path / "missing")


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/data", "x" * 5000])
def test_a_data_folder_that_cannot_be_read_is_named(folder: str) -> None:
    with pytest.raises(jt.errors.InputError, match=r"the data folder .* cannot be read"):
        jt.data.load("mnist", folder)


def test_without_files_and_network_the_error_lists_the_alternatives(
    tmp_path: Path, dead_server
) -> None:
    # The refused connection is reported at the first attempt, not after a time limit.
    with pytest.raises(
        jt.errors.DataUnavailableError, match=r"downloaded: .*: ConnectionError"
    ) as raised:
        jt.data.load("mnist", tmp_path)
    message = str(raised.value)
    for part in ("data_dir", "$JAXTRAIN_DATA_DIR", "digits", str(tmp_path), *CONTENTS):
        assert part in message
    assert "--" not in message  # the library names no flags of the scripts


def test_a_server_that_never_answers_times_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    from tensorflow_datasets.image_classification import mnist

    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(mnist.MNIST, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(jt.errors.DataUnavailableError, match="no answer in"):
            jt.data.load("mnist")


def test_auto_warns_that_digits_are_not_mnist(dead_server) -> None:
    resolved = jt.data.load_resolved("auto")
    assert resolved.name == "digits"
    assert resolved.notice is not None
    assert "to train on MNIST, put train-images-idx3-ubyte" in resolved.notice
    with pytest.warns(UserWarning, match="digits instead of MNIST"):
        jt.data.load("auto")


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
