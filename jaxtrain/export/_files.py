"""Reads a file that a user names."""

from __future__ import annotations

import errno
from pathlib import Path

from jaxtrain._files import read_regular_file
from jaxtrain.errors import InputError


def read_file(path: Path, maximum: int | None = None) -> bytes:
    """Returns the content of a file, or of the file that a link leads to.

    Args:
      path: the file.
      maximum: the size in bytes of the largest file of the model, if it is known.

    Raises:
      InputError: it is missing, too large, a directory, a device or a pipe, or cannot be read.
    """
    try:
        return read_regular_file(path.resolve(strict=True), maximum)
    except (OSError, ValueError, RuntimeError) as error:  # a null character, or a loop of links
        if getattr(error, "errno", None) == errno.EFBIG:
            raise InputError(
                f"{path} is larger than a file of this model, of at most {maximum} bytes; expected "
                "a file of the same model"
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {reason}") from error
