"""Downloads from local mirrors: what is kept, and what the error says."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxtrain as jt
from jaxtrain.data import download
from jaxtrain.data.mnist import DOWNLOADS, Download
from tests.test_mnist import CONTENTS, assert_loaded, elsewhere  # noqa: F401

FILES = {f"{name}.gz": gzip.compress(content) for name, content in CONTENTS.items()}
DAMAGED = dict.fromkeys(FILES, gzip.compress(b"another file"))


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The folders of two mirrors of MNIST, which are served; they contain no files yet."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    checksums = tuple(hashlib.sha256(content).hexdigest() for content in FILES.values())
    urls = tuple(f"http://127.0.0.1:{server.server_port}/{folder.name}/" for folder in folders)
    monkeypatch.setitem(DOWNLOADS, "mnist", Download(urls, checksums))
    yield folders
    server.shutdown()
    thread.join()
    server.server_close()


def offer(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_files_are_downloaded_once_and_again_if_damaged(tmp_path: Path, mirrors) -> None:
    offer(mirrors[0], FILES)
    cache = tmp_path / "cache" / "jaxtrain" / "data" / "mnist"
    for damage in ("none", "missing", "other content"):
        if damage == "missing":
            (cache / "train-images-idx3-ubyte.gz").unlink()
        elif damage == "other content":
            offer(cache, DAMAGED)
        assert_loaded(jt.data.load("mnist"))
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == FILES
    for file in mirrors[0].iterdir():
        file.unlink()
    assert jt.data.load_resolved("auto").name == "mnist"


@pytest.mark.parametrize("first", [{}, DAMAGED], ids=["no files", "other content"])
def test_the_next_mirror_is_used_where_one_has_no_such_file(mirrors, first) -> None:
    offer(mirrors[0], first)
    offer(mirrors[1], FILES)
    assert_loaded(jt.data.load("mnist"))


def test_the_error_says_what_each_mirror_did_and_no_file_stays(tmp_path: Path, mirrors) -> None:
    offer(mirrors[0], DAMAGED)
    one, other = map(re.escape, DOWNLOADS["mnist"].mirrors)
    expected = (
        rf"^mnist is not on disk and could not be downloaded \({one}: train-images.*another "
        rf"checksum, .*, {other}: train-.*: the server answered 404 File not found\); put .* digits"
    )
    with pytest.raises(jt.errors.DataUnavailableError, match=expected) as raised:
        jt.data.load("mnist")
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_servers_that_are_down_or_silent_are_named_in_time(monkeypatch) -> None:
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        urls = "http://127.0.0.1:9/", f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setitem(DOWNLOADS, "mnist", Download(urls, ("0" * 64,) * 4))
        expected = rf"{urls[0]}: no connection, {urls[1]}: no answer in "
        with pytest.raises(jt.errors.DataUnavailableError, match=expected):
            jt.data.load("mnist")


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path: Path, mirrors) -> None:
    offer(mirrors[0], FILES)
    (tmp_path / "cache").write_text("in the way")
    expected = rf"cache folder {tmp_path}/cache/.* cannot be used \(Not a dir.*\$XDG_CACHE_HOME"
    with pytest.raises(jt.errors.DataUnavailableError, match=expected):
        jt.data.load("mnist")
