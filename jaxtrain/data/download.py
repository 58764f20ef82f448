"""Downloads of files from the first mirror that sends them, verified by checksum."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain._extras import needs_extra

# Seconds in which each mirror must answer, and between two parts of a file.
ANSWER_SECONDS = 6.0
_SILENCE_SECONDS = 10.0


class DownloadError(Exception):
    """A file could not be downloaded from any mirror."""


def fetch(files: Mapping[str, str], mirrors: Sequence[str], folder: Path) -> None:
    """Downloads files to a folder, except those that it already contains.

    Args:
      files: SHA-256 checksums by file name.
      mirrors: addresses that a file name is appended to, in the order of preference.
      folder: where to write; made if it is missing. A file has its name once it is complete.

    Raises:
      DownloadError: no mirror sends one of the files; says what each mirror did.
      OSError: the folder cannot be read or written.
    """
    with needs_extra("data"):
        import pooch
        import requests

    def is_missing(file: str) -> bool:
        return not (folder / file).exists() or pooch.file_hash(folder / file) != files[file]

    missing = list(filter(is_missing, files))
    if not missing:
        return
    problems = _ask(mirrors, missing[0])
    download = pooch.HTTPDownloader(timeout=(ANSWER_SECONDS, _SILENCE_SECONDS))
    for file in missing:
        for mirror in (each for each in mirrors if each not in problems):
            checksum = f"sha256:{files[file]}"
            try:
                pooch.retrieve(mirror + file, checksum, file, folder, downloader=download)
                break
            except requests.RequestException as error:
                problems[mirror] = f"{file}: {_describe(error)}"
            except ValueError:  # of Pooch
                problems[mirror] = f"{file}: a file with another checksum, which was removed"
        else:
            raise DownloadError(", ".join(f"{mirror}: {problems[mirror]}" for mirror in mirrors))


def _ask(mirrors: Sequence[str], file: str) -> dict[str, str]:
    """Returns what is wrong with the mirrors before the first one that offers a file.

    Asks all at once in threads, since resolving a host name has no time limit.
    """
    import requests

    answers: dict[str, str] = {}

    def ask(mirror: str) -> None:
        try:
            answer = requests.head(mirror + file, timeout=ANSWER_SECONDS, allow_redirects=True)
            answer.raise_for_status()
            answers[mirror] = ""
        except Exception as error:
            answers[mirror] = _describe(error)

    deadline = time.monotonic() + ANSWER_SECONDS
    threads = [threading.Thread(target=ask, args=(each,), daemon=True) for each in mirrors]
    for thread in threads:
        thread.start()
    problems: dict[str, str] = {}
    for mirror, thread in zip(mirrors, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        problem = answers.get(mirror, f"no answer in {ANSWER_SECONDS:g} s")
        if not problem:
            break
        problems[mirror] = problem
    return problems


def _describe(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached or refuses (see $https_proxy and $http_proxy)"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if type(error) is requests.ConnectionError:
        return "no connection"
    return type(error).__name__
