"""A mirror on this machine with every fault of one: what is said, how soon, and what is left."""

from __future__ import annotations

import hashlib
import http.server
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jaxtrain as jt
from jaxtrain.data import download
from jaxtrain.data.download import DownloadError, check_reachable, fetch
from jaxtrain.data.mnist import DATA_DIR_VARIABLE, cache_dir
from tests.test_survival import HAS_NAMESPACES, run_with_a_disk

CONTENT = bytes(range(256)) * 1024  # 256 KiB
SUM = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(download, "_MIN_SECONDS", 2.0)
    monkeypatch.setattr(download, "_MIN_BYTES_PER_SECOND", 10**9)


@pytest.fixture
def mirror() -> Iterator[tuple[str, list[Answer]]]:
    """An address, and a list whose last entry answers."""
    answers: list[Answer] = [whole]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answers[-1](self)
            except OSError:  # the client has left
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/file", answers
    server.shutdown()
    thread.join()
    server.server_close()


def head(handler: http.server.BaseHTTPRequestHandler, length: int | None = len(CONTENT)) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def whole(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT)


def cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT[:1000])


def cut_without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler, None)
    handler.wfile.write(CONTENT[:1000])


def wrong(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT[::-1])


def not_found(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_error(404)


def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    for byte in CONTENT:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def half(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])
    time.sleep(5)


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT[:1000])
    time.sleep(3)


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler, None)
    while True:
        handler.wfile.write(CONTENT)


def packed_bomb(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A megabyte on the way, a gigabyte unpacked."""
    import zlib

    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    packer = zlib.compressobj(wbits=31)
    for _ in range(1024):
        handler.wfile.write(packer.compress(bytes(2**20)))
    handler.wfile.write(packer.flush())


def to_a_local_file(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"file://{__file__}")
    handler.end_headers()


def round_and_round(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/file")
    handler.end_headers()


def redirection_without_end(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Its body is not read, or it would fill the memory."""
    handler.send_response(302)
    handler.send_header("Location", "/file")
    handler.end_headers()
    while True:
        handler.wfile.write(CONTENT)


def dripping_headers(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.flush_headers()
    for _ in range(40):
        handler.wfile.write(b"X")
        time.sleep(0.1)


def nonsense(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff" * 1000 + b"\r\n\r\n")


FAULTS = [
    (cut, "the connection was lost"),
    (cut_without_length, "disconnected after 1000 of 262144 bytes"),
    (wrong, f"a file with the checksum [0-9a-f]{{64}} instead of {SUM}; the file was removed"),
    (not_found, "the server answered 404 Not Found"),
    (dripping, r"is too slow: \d+ of 262144 bytes in 2 s"),
    (silent, "no answer in time"),
    (endless, "sends more than the 262144 bytes"),
    (packed_bomb, "sends more than the 262144 bytes"),
    (to_a_local_file, "redirects to file:///.*; expected http or https"),
    (round_and_round, "redirects more than 5 times"),
    (redirection_without_end, "redirects more than 5 times"),
    (dripping_headers, "is too slow: no complete answer in 2 s"),
    (nonsense, "ConnectionError|BadStatusLine|Protocol"),
]


def test_a_whole_file_comes_through(mirror, tmp_path: Path) -> None:
    url, _ = mirror
    fetch(url, tmp_path / "file", len(CONTENT), SUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    (tmp_path / "other").touch()  # as readable for others as any file
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(("answer", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_is_said_in_time_and_leaves_nothing(mirror, tmp_path, answer, message) -> None:
    url, answers = mirror
    answers.append(answer)
    started = time.monotonic()
    with pytest.raises(DownloadError, match=message) as raised:
        fetch(url, tmp_path / "file", len(CONTENT), SUM)
    assert time.monotonic() - started < 6
    assert str(raised.value).startswith(url)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_was_given_up_does_not_come_in_late(mirror, tmp_path: Path) -> None:
    """The first answer comes whole, but after its time; the second one is there by then."""
    url, answers = mirror
    late = threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        late.wait(10)
        whole(handler)

    answers.append(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_MIN_SECONDS", 0.0)
        patch.setattr(download, "_SILENCE_SECONDS", 10.0)
        with pytest.raises(DownloadError, match="is too slow"):
            fetch(url, tmp_path / "file", len(CONTENT), SUM)
    answers.append(whole)
    fetch(url, tmp_path / "file", len(CONTENT), SUM)
    late.set()
    for thread in threading.enumerate():
        if "work" in thread.name:
            thread.join(10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_proxy_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"the proxy cannot be reached .*http_proxy"):
        fetch("http://example.invalid/file", tmp_path / "file", 1, SUM)
    with pytest.raises(DownloadError, match=r"the proxy cannot be reached .*http_proxy"):
        check_reachable("http://example.invalid/file")


def test_a_disk_that_refuses_the_file_is_said(mirror, tmp_path: Path) -> None:
    url, _ = mirror
    with pytest.raises(DownloadError, match="No such file or directory"):
        fetch(url, tmp_path / "missing" / "file", len(CONTENT), SUM)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(jt.DataUnavailableError) as raised:
        jt.data.load("mnist")
    assert f"the cache folder {cache_dir()} cannot be written (Not a directory)" in str(
        raised.value
    )
    assert "$XDG_CACHE_HOME" in str(raised.value)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs leave to mount a disk (unshare -rm)")
def test_a_read_only_cache_folder_is_named(tmp_path: Path) -> None:
    program = (
        "import jaxtrain as jt\ntry: jt.data.load('mnist')\nexcept jt.InputError as e: print(e)"
    )
    environment = {name: value for name, value in os.environ.items() if name != DATA_DIR_VARIABLE}
    disk = tmp_path / "disk"
    commands = f"mount -o remount,ro {disk} && {sys.executable} -c {shlex.quote(program)}"
    stdout, stderr = run_with_a_disk(
        {**environment, "XDG_CACHE_HOME": str(disk)}, "1m", disk, commands
    )
    assert "cannot be written (Read-only file system); set $XDG_CACHE_HOME" in stdout, stderr


def test_killed_while_downloading_it_leaves_nothing_under_the_final_name(
    mirror, tmp_path: Path, monkeypatch
) -> None:
    url, answers = mirror
    answers.append(half)
    base = url.removesuffix("file")
    program = f"""
import jaxtrain as jt
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import mnist
from jaxtrain.data.mnist import FILES
names = [f"{{name}}.gz" for pair in FILES.values() for name in pair]
mnist.MNIST.URL = {base!r}
mnist.MNIST.url_infos = {{
    {base!r} + name: checksums.UrlInfo({len(CONTENT)}, {SUM!r}, name) for name in names
}}
jt.data.load("mnist")
"""
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    folder = tmp_path / "jaxtrain" / "data"
    deadline = time.monotonic() + 60
    while not [path for path in folder.rglob("*.gz.*") if path.stat().st_size]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "mnist").exists()
