"""The IDX file format, in which MNIST and its relatives are published."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np

from jaxtrain._arguments import checked_path
from jaxtrain._files import open_input
from jaxtrain.errors import InputError

# Images uint8 [examples, 28, 28] and labels int32 [examples].
Images: TypeAlias = tuple[np.ndarray, np.ndarray]

# Third byte of the magic number -> big-endian element type
# (the format's definition: http://yann.lecun.com/exdb/mnist/).
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 16


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads one IDX file, plain or gzip-compressed (recognized by its first bytes).

    Args:
      path: the file. Memory is bounded by a constant factor of the file's real content, whatever
        its header declares.

    Returns:
      The array with the shape and element type of the header, in native byte order.

    Raises:
      InputError: the file is missing, not a file, or not exactly one complete IDX array.

    Example:
      >>> content = bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 0, 4])  # 1 axis of 3 bytes: 5, 0, 4
      >>> with open("labels-idx1-ubyte", "wb") as file:
      ...     size = file.write(content)
      >>> jt.data.read_idx("labels-idx1-ubyte")
      array([5, 0, 4], dtype=uint8)
    """
    path = checked_path(path, "path")
    try:
        with open_input(path) as file:
            start = file.read(2)
            if not start:
                raise InputError(f"{path} is empty; expected an IDX file")
            file.seek(0)
            return _read_stream(gzip.open(file) if start == _GZIP_MAGIC else file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} is not a complete gzip file ({error}); download or copy it again"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be read ({reason}); expected an IDX file") from error


def _read_stream(stream: IO[bytes] | gzip.GzipFile, path: Path) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        raise InputError(
            f"{path} starts with the bytes {magic.hex(' ')}; an IDX file starts with 00 00, "
            "an element type (08, 09 or 0b to 0e) and the number of axes"
        )
    dtype, axes = np.dtype(_DTYPES[magic[2]]), magic[3]
    header = stream.read(4 * axes)
    if len(header) < 4 * axes:
        raise InputError(
            f"{path} ends within its header: {len(header)} of {4 * axes} bytes of axis lengths"
        )
    shape = tuple(int(length) for length in np.frombuffer(header, ">u4"))
    expected = math.prod(shape) * dtype.itemsize
    payload = bytearray()
    while len(payload) <= expected:
        # Asks for one byte more than declared, to notice trailing bytes.
        chunk = stream.read(min(_CHUNK_BYTES, expected + 1 - len(payload)))
        if not chunk:
            break
        payload += chunk
    if len(payload) < expected:
        raise InputError(
            f"{path} is truncated: {len(payload)} of the {expected} bytes of data that its "
            f"header declares for shape {shape}"
        )
    if len(payload) > expected:
        raise InputError(
            f"{path} has trailing bytes after the {expected} bytes of data that its header "
            f"declares for shape {shape}"
        )
    try:
        array = np.frombuffer(payload, dtype).reshape(shape)
    except ValueError as error:
        raise InputError(f"{path} has the shape {shape}, which NumPy refuses: {error}") from error
    return array.astype(dtype.newbyteorder("="), copy=False)
