"""Folders that one process at a time writes to, in files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from jaxtrain.errors import NO_SPACE, InputError, StorageError

# How the names of files end that are not whole yet.
PART = ".jaxtrain-part"


def make_folder(path: Path, what: str, flag: str) -> None:
    """Make a folder with its parents if it is missing, and see that it can be written.

    Args:
      path: the folder.
      what: what it is to the user, "output folder" for instance.
      flag: the flag or argument that names another.

    Raises:
      InputError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"the {what} {path} cannot be written ({error.strerror or error}); "
            f"name another by {flag}"
        ) from error


def lock_folder(path: Path, what: str, flag: str) -> int:
    """Keep other runs out of a folder; same arguments as `make_folder`.

    Returns:
      A file descriptor: closing it lets go of the folder, as does the end of the process, however
      it comes. (On file systems without locks, some network ones, nobody is kept out.)

    Raises:
      InputError: another run holds it.
    """
    import fcntl  # of Unix alone; the rest of the library does without

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"the {what} {path} is in use by another run; wait for its end, or name another by "
            f"{flag}"
        ) from error
    except OSError:
        pass  # no locks here
    return descriptor


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks sees the old content or the new, never a part.

    Raises:
      StorageError: the disk is full, or refuses for another reason.
    """
    scratch = path.parent / f".{path.name}.{os.getpid()}{PART}"
    try:
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                # Else a power cut soon after could leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(path, NO_SPACE if full else error.strerror or str(error)) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
