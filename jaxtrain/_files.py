"""Files that appear complete or not at all, in folders that one process at a time writes to."""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.errors import NO_SPACE, InputError, StorageError

if TYPE_CHECKING:
    import filelock

# Suffix of files that are still being written.
PART = ".jaxtrain-part"


def make_folder(path: Path, description: str) -> None:
    """Makes a folder with its parents, and checks that it can be written.

    Args:
      path: the folder.
      description: what the folder is to the user, "output folder" for example.

    Raises:
      InputError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the {description} {path} cannot be written ({reason}); use another folder"
        ) from error


def lock_folder(path: Path, description: str) -> filelock.BaseFileLock:
    """Keeps other runs out of a folder, by a lock on the file `.lock` in it.

    Args:
      path: the folder.
      description: what the folder is to the user.

    Returns:
      The lock, acquired. `release()` ends it, and so does the end of the process. (On file systems
      without locking, such as some network ones, the existence of a file is the lock.)

    Raises:
      InputError: another run holds the lock, or the file cannot be made.
    """
    import filelock

    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise InputError(
            f"the {description} {path} is in use by another run; wait until it ends, or use "
            "another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the {description} {path} cannot be locked ({reason}); use another folder"
        ) from error
    return lock


def write_atomically(path: Path, content: bytes, *, sync_folder: bool = False) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    The temporary file has a random name and is created exclusively, so that a link planted there
    is never followed. A file that is replaced keeps its permissions.

    Args:
      path: the file.
      content: its new content.
      sync_folder: also flush the folder's entry, so that the name survives a power failure.

    Raises:
      StorageError: the disk is full, or the file cannot be written for another reason.
    """
    part: Path | None = None
    try:
        try:
            mode = _mode_of(path)
            name = f".{path.name}."[:128] + secrets.token_hex(8) + PART
            descriptor = os.open(path.parent / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            part = path.parent / name
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                file.write(content)
                file.flush()
                # Otherwise a power failure soon after could leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(part, path)
            if sync_folder:
                synchronize(path.parent)
        except BaseException:
            if part is not None:
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(path, NO_SPACE if full else error.strerror or str(error)) from error


def write_csv(path: Path, columns: Mapping[str, Iterable[Any]]) -> None:
    """Writes columns of equal length, by name, as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, text.getvalue().encode())


def _mode_of(path: Path) -> int | None:
    """Returns the permissions of a regular file, or None if there is none."""
    try:
        found = path.lstat()
        if stat.S_ISREG(found.st_mode):
            return stat.S_IMODE(found.st_mode)
    except FileNotFoundError:
        pass
    return None


def read_regular_file(path: Path, maximum: int | None = None) -> bytes:
    """Reads a regular file; links, devices and pipes are refused, so that nothing hangs.

    Args:
      path: the file.
      maximum: the largest size to read, in bytes.

    Raises:
      OSError: it is missing, is not a regular file, is larger than `maximum`, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if maximum is not None and found.st_size > maximum:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes are too many", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def synchronize(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
