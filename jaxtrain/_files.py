"""Files to read and to write: regular ones, complete or absent, written by one run at a time."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from jaxtrain._arguments import checked_path
from jaxtrain.errors import NO_SPACE, InputError, StorageError

if TYPE_CHECKING:
    import filelock

# Suffix of files that are still being written.
PART = ".jaxtrain-part"


def make_folder(path: Path, description: str) -> None:
    """Makes a folder with its parents, and checks that it can be written.

    Args:
      path: the folder.
      description: name of the folder in messages, such as "output folder".

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
      description: name of the folder in messages.

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


def output_path(path: Any, name: str = "path") -> Path:
    """Returns the path of a file to write: a new one, or a regular one that is replaced.

    Raises:
      InputError: it is not a path, or a link, a directory, a pipe or a device.
    """
    found = checked_path(path, name)
    try:
        _existing_mode(found)
    except OSError as error:
        raise InputError(
            f"{name} is {found}, which cannot be written ({error.strerror}); expected a new file, "
            "or a regular one",
            argument=name,
        ) from error
    return found


def write_atomically(path: Path, content: bytes, *, sync_folder: bool = False) -> None:
    """Writes a file as `replace_file` does."""
    replace_file(path, content, sync_folder=sync_folder).close()


def replace_file(
    path: Path, content: bytes, *, sync_folder: bool = False, lock: bool = False
) -> BinaryIO:
    """Writes a file so that a reader sees the old content or the new, never a part.

    The temporary file has a random name and is created exclusively, so that a link planted there
    is never followed. A file that is replaced keeps its permissions. A link, a pipe or a device is
    never replaced.

    Args:
      path: the file.
      content: its new content.
      sync_folder: also flush the folder's entry, so that the name survives a power failure.
      lock: also lock the file, by `lock_file`, before it appears.

    Returns:
      The file, opened to read and append.

    Raises:
      StorageError: the disk is full, or the file cannot be written for another reason.
    """
    part = path.parent / (f".{path.name}."[:128] + secrets.token_hex(8) + PART)
    file: BinaryIO | None = None
    try:
        mode = _existing_mode(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
        file = cast(BinaryIO, os.fdopen(os.open(part, flags, 0o666), "ab+"))
        if lock:
            lock_file(file)
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        # Otherwise a power failure soon after could leave the new name on an empty file.
        os.fsync(file.fileno())
        os.replace(part, path)
        if sync_folder:
            synchronize(path.parent)
        return file
    except BaseException as error:
        if file is not None:
            with contextlib.suppress(OSError):  # closing writes what did not fit
                file.close()
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(path, NO_SPACE if full else error.strerror or str(error)) from error


def remove_file(path: Path) -> None:
    """Removes a regular file, if it exists.

    Raises:
      StorageError: it cannot be removed, or is not a regular file.
    """
    try:
        if _existing_mode(path) is not None:
            path.unlink()
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error


def lock_file(file: BinaryIO) -> None:
    """Locks an open file until it is closed.

    Raises:
      OSError: another run has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(error.errno, "another run is writing to it") from error
    except OSError:
        pass  # a file system without locks


def write_csv(path: Path, columns: Mapping[str, Iterable[Any]]) -> None:
    """Writes columns of equal length, by name, as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, text.getvalue().encode())


def read_input(path: Any, maximum: int | None = None) -> bytes:
    """Returns the content of a file that a user names.

    Args:
      path: the file.
      maximum: the size in bytes of the largest file of the model, if it is known.

    Raises:
      InputError: `path` is not a path, or the file is missing, too large, not a regular file, or
        cannot be read.
    """
    found = checked_path(path, "path")
    try:
        with open_input(found) as file:
            if maximum is not None and os.fstat(file.fileno()).st_size > maximum:
                raise InputError(
                    f"{found} is larger than a file of this model, of at most {maximum} bytes; "
                    "expected a file of the same model",
                    argument="path",
                )
            return file.read()
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "it does not fit in memory"
        raise InputError(
            f"{found} cannot be read ({reason}); fix that and try again", argument="path"
        ) from error


def open_input(path: Path) -> BinaryIO:
    """Opens a regular file, or the one that a link leads to, and never waits for a pipe.

    Raises:
      OSError: it is missing, is not a regular file, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _regular_mode(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _existing_mode(path: Path) -> int | None:
    """Returns the permissions of a regular file, or None if there is no file."""
    try:
        return _regular_mode(path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _regular_mode(found: os.stat_result) -> int:
    """Returns the permissions of a regular file, and raises OSError for anything else."""
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
    return stat.S_IMODE(found.st_mode)


def synchronize(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
