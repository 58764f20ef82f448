"""Downloads of single files, limited in time and size and verified by checksum."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

# Seconds until a server must answer, and until it must send more; then the download is aborted.
ANSWER_SECONDS = 6.0
_SILENCE_SECONDS = 10.0
# Time limit of a download: a constant, plus time in proportion to the size of the file.
_MIN_SECONDS = 30.0
_MIN_BYTES_PER_SECOND = 20_000

_CHUNK_BYTES = 1 << 16
_MAX_REDIRECTIONS = 5
_calls = itertools.count()


class DownloadError(Exception):
    """A file could not be downloaded."""


def fetch(url: str, path: Path, size: int, sha256: str) -> None:
    """Downloads a file.

    Args:
      url: the address, http or https; redirections to other schemes are refused.
      path: the file to write; it does not exist if the download fails.
      size: the expected size in bytes; a server that sends more is disconnected.
      sha256: the expected checksum.

    Raises:
      DownloadError: the server cannot be reached, refuses, disconnects, is too slow or sends
        another file; or the file cannot be written.
    """
    limit = _MIN_SECONDS + size / _MIN_BYTES_PER_SECOND
    outcome: list[BaseException | None] = []
    given_up = threading.Event()
    # A unique name: an abandoned thread may still write to it before it cleans up.
    part = path.with_name(f"{path.name}.{os.getpid()}-{next(_calls)}.part")

    def work() -> None:
        try:
            _fetch(url, part, size, sha256, limit)
            outcome.append(None)
        except BaseException as error:
            part.unlink(missing_ok=True)
            outcome.append(error)
        if given_up.is_set():
            part.unlink(missing_ok=True)

    # In a thread, since slowly arriving headers have no timeout.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join(limit + 1)
    finally:
        failure = (
            outcome[0]
            if outcome
            else DownloadError(f"{url} is too slow: no complete answer in {limit:.0f} s")
        )
        if failure is not None:  # also after Ctrl-C
            given_up.set()
            part.unlink(missing_ok=True)
    try:
        if failure is None:
            part.replace(path)
    except OSError as error:
        failure = error
    if isinstance(failure, DownloadError):
        raise failure
    if failure is not None:  # an error of requests, urllib3, http.client, or the disk
        raise DownloadError(f"{url}: {describe(failure)}") from failure


def _fetch(url: str, path: Path, size: int, sha256: str, limit: float) -> None:
    deadline = time.monotonic() + limit
    found, received = hashlib.sha256(), 0
    with _open(url) as response, path.open("wb") as file:
        response.raise_for_status()
        # Reads what has arrived, even one byte: waiting for more would hide a slow server.
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=True):
            received += len(chunk)
            if received > size:
                raise DownloadError(f"{url} sends more than the {size} bytes of the file")
            if time.monotonic() > deadline:
                raise DownloadError(
                    f"{url} is too slow: {received} of {size} bytes in {limit:.0f} s"
                )
            file.write(chunk)
            found.update(chunk)
    if received < size:
        raise DownloadError(f"{url} disconnected after {received} of {size} bytes")
    if found.hexdigest() != sha256:
        raise DownloadError(
            f"{url} sends a file with the checksum {found.hexdigest()} instead of {sha256}; the "
            "file was removed"
        )


def _open(url: str) -> Any:
    """Returns the response after following redirections, whose bodies are not read."""
    import requests

    session, address = requests.Session(), url
    for _ in range(_MAX_REDIRECTIONS + 1):
        request = session.prepare_request(requests.Request("GET", address))
        settings = session.merge_environment_settings(address, {}, True, None, None)
        # Through the adapter, since a session would read the body of a redirection, however long.
        response = session.get_adapter(address).send(
            request, timeout=(ANSWER_SECONDS, _SILENCE_SECONDS), **settings
        )
        if not response.is_redirect:
            return response
        response.close()
        address = urljoin(address, response.headers["location"])
        if urlsplit(address).scheme not in ("http", "https"):
            raise DownloadError(f"{url} redirects to {address}; expected http or https")
    raise DownloadError(f"{url} redirects more than {_MAX_REDIRECTIONS} times")


def check_reachable(url: str) -> None:
    """Raises DownloadError within seconds if the server does not answer.

    Runs in a thread, since a DNS lookup can take longer than any timeout of the request.
    """
    import requests

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=ANSWER_SECONDS, allow_redirects=True).raise_for_status()
            outcome.append(None)
        except Exception as error:
            outcome.append(describe(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    problem = outcome[0] if outcome else f"no answer in {ANSWER_SECONDS:g} s"
    if problem is not None:
        raise DownloadError(f"{url}: {problem}")


def describe(error: BaseException) -> str:
    """Returns a short description of an error."""
    import requests
    import urllib3

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached or refuses (see $https_proxy and $http_proxy)"
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return "no answer in time"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection was lost"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
