"""Downloads from a local server with every fault: the error, the time limit, and the files left."""

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
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(download, "_MIN_SECONDS", 2.0)
    monkeypatch.setattr(download, "_MIN_BYTES_PER_SECOND", 10**9)


@pytest.fixture
def mirror() -> Iterator[tuple[str, list[Answer]]]:
    """The address of a server, and a list whose last function answers requests."""
    answers: list[Answer] = [complete]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answers[-1](self)
            except OSError:  # the client closed the connection
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


def complete(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT)


def cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler)
    handler.wfile.write(CONTENT[:1000])


def cut_without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler, None)
    handler.wfile.write(CONTENT[:1000])


def other_content(handler: http.server.BaseHTTPRequestHandler) -> None:
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
    time.sleep(30)


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    head(handler, None)
    while True:
        handler.wfile.write(CONTENT)


def decompression_bomb(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Sends a megabyte that decompresses to a gigabyte."""
    import zlib

    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    packer = zlib.compressobj(wbits=31)
    for _ in range(1024):
        handler.wfile.write(packer.compress(bytes(2**20)))
    handler.wfile.write(packer.flush())


def redirecting_to_a_local_file(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"file://{__file__}")
    handler.end_headers()


def redirecting_in_circles(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/file")
    handler.end_headers()


def redirecting_with_an_endless_body(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A client that reads the body would run out of memory."""
    handler.send_response(302)
    handler.send_header("Location", "/file")
    handler.end_headers()
    while True:
        handler.wfile.write(CONTENT)


def dripping_headers(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.flush_headers()
    for _ in range(300):
        handler.wfile.write(b"X")
        time.sleep(0.1)


def malformed(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff" * 1000 + b"\r\n\r\n")


# The messages of slow answers name the time limit: without it, the answers would end with other
# messages, or never.
FAULTS = [
    (cut, "the connection was lost"),
    (cut_without_length, "disconnected after 1000 of 262144 bytes"),
    (
        other_content,
        f"a file with the checksum [0-9a-f]{{64}} instead of {CHECKSUM}; the file was removed",
    ),
    (not_found, "the server answered 404 Not Found"),
    (dripping, r"is too slow: \d+ of 262144 bytes in 2 s"),
    (silent, "no answer in time"),
    (endless, "sends more than the 262144 bytes"),
    (decompression_bomb, "sends more than the 262144 bytes"),
    (redirecting_to_a_local_file, "redirects to file:///.*; expected http or https"),
    (redirecting_in_circles, "redirects more than 5 times"),
    (redirecting_with_an_endless_body, "redirects more than 5 times"),
    (dripping_headers, "is too slow: no complete answer in 2 s"),
    (malformed, "ConnectionError|BadStatusLine|Protocol"),
]


def test_a_file_is_downloaded(mirror, tmp_path: Path) -> None:
    url, _ = mirror
    fetch(url, tmp_path / "file", len(CONTENT), CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    (tmp_path / "other").touch()  # has the default permissions
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(("answer", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_of_the_server_is_named_in_time_and_leaves_no_file(
    mirror, tmp_path, answer, message
) -> None:
    url, answers = mirror
    answers.append(answer)
    with pytest.raises(DownloadError, match=message) as raised:
        fetch(url, tmp_path / "file", len(CONTENT), CHECKSUM)
    assert str(raised.value).startswith(url)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_an_abandoned_download_does_not_overwrite_a_later_one(mirror, tmp_path: Path) -> None:
    """The first answer is complete only after the second download has ended."""
    url, answers = mirror
    late = threading.Event()

    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        late.wait(10)
        complete(handler)

    answers.append(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_MIN_SECONDS", 0.0)
        patch.setattr(download, "_SILENCE_SECONDS", 10.0)
        with pytest.raises(DownloadError, match="is too slow"):
            fetch(url, tmp_path / "file", len(CONTENT), CHECKSUM)
    answers.append(complete)
    fetch(url, tmp_path / "file", len(CONTENT), CHECKSUM)
    late.set()
    for thread in threading.enumerate():
        if "work" in thread.name:
            thread.join(10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_unreachable_proxy_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"the proxy cannot be reached .*http_proxy"):
        fetch("http://example.invalid/file", tmp_path / "file", 1, CHECKSUM)
    with pytest.raises(DownloadError, match=r"the proxy cannot be reached .*http_proxy"):
        check_reachable("http://example.invalid/file")


def test_a_file_that_cannot_be_written_is_named(mirror, tmp_path: Path) -> None:
    url, _ = mirror
    with pytest.raises(DownloadError, match="No such file or directory"):
        fetch(url, tmp_path / "missing" / "file", len(CONTENT), CHECKSUM)


def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(jt.errors.DataUnavailableError) as raised:
        jt.data.load("mnist")
    assert f"the cache folder {cache_dir()} cannot be written (Not a directory)" in str(
        raised.value
    )
    assert "$XDG_CACHE_HOME" in str(raised.value)


def test_a_cache_folder_that_cannot_be_read_is_named(monkeypatch) -> None:
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "x" * 300)
    with pytest.raises(
        jt.errors.InputError, match=r"the cache folder /x+/jaxtrain/data cannot be read"
    ):
        jt.data.load("mnist")


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs permission to mount a disk (unshare -rm)")
def test_a_read_only_cache_folder_is_named(tmp_path: Path) -> None:
    program = (
        "import jaxtrain as jt\n"
        "try: jt.data.load('mnist')\n"
        "except jt.errors.InputError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != DATA_DIR_VARIABLE}
    disk = tmp_path / "disk"
    commands = f"mount -o remount,ro {disk} && {sys.executable} -c {shlex.quote(program)}"
    stdout, stderr = run_with_a_disk(
        {**environment, "XDG_CACHE_HOME": str(disk)}, "1m", disk, commands
    )
    assert "cannot be written (Read-only file system); set $XDG_CACHE_HOME" in stdout, stderr


def test_a_killed_download_leaves_no_file_under_the_final_name(
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
    {base!r} + name: checksums.UrlInfo({len(CONTENT)}, {CHECKSUM!r}, name) for name in names
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
