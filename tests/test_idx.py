"""read_idx reads every IDX file and names what is wrong with damaged ones."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt
from jaxtrain.data import read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode(array: np.ndarray, code: int | None = None) -> bytes:
    code = CODES[array.dtype.str[1:]] if code is None else code
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file-idx"
    path.write_bytes(content)
    return path


def test_a_file_encoded_by_hand_is_read(tmp_path: Path) -> None:
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    array = read_idx(write(tmp_path, content))
    np.testing.assert_array_equal(array, [[1, 2, 3], [4, 5, 6]])
    assert array.dtype == np.uint8


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=st.sampled_from(sorted(CODES)).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    compressed=st.booleans(),
)
def test_every_dtype_and_shape_is_read(tmp_path: Path, array, compressed) -> None:
    content = encode(array)
    result = read_idx(write(tmp_path, gzip.compress(content) if compressed else content))
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert result.dtype.isnative


GOOD = encode(IMAGES)
PACKED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0\0", "starts with the bytes 00 00"),
        (b"\x89PNG\r\n\x1a\n", "starts with the bytes 89 50 4e 47; an IDX file starts with 00 00"),
        (b"\0\0\x0a\1\0\0\0\1\7", "starts with the bytes 00 00 0a 01"),
        (GOOD[:9], "ends within its header: 5 of 12 bytes"),
        (GOOD[:-1], "is truncated: 23 of the 24 bytes"),
        (GOOD + b"x", "has trailing bytes after the 24 bytes"),
        (gzip.compress(GOOD[:-1]), "is truncated: 23 of the 24 bytes"),
        (gzip.compress(GOOD + b"x"), "has trailing bytes"),
        (PACKED[: len(PACKED) // 2], "is not a complete gzip file"),
        (PACKED[:-4], "is not a complete gzip file"),
        (PACKED[:20] + b"\xff" + PACKED[21:], "is not a complete gzip file"),
        (PACKED + b"junk", "is not a complete gzip file"),
        (encode(IMAGES)[:4] + b"\xff" * 12, "is truncated: 0 of the"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes of gzip contain the time
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(jt.errors.InputError) as raised:
        read_idx(path)
    assert str(raised.value).startswith(f"{path} ")
    assert message in str(raised.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match=r"it is a directory, .*; expected an IDX"):
        read_idx(tmp_path)
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(No such file"):
        read_idx(tmp_path / "missing")


def header(*shape: int, code: int = 8, ndim: int | None = None) -> bytes:
    ndim = len(shape) if ndim is None else ndim
    return struct.pack(f">HBB{len(shape)}I", 0, code, ndim, *shape)


def test_memory_is_bounded_by_the_content_of_the_file(tmp_path: Path) -> None:
    """A header declares 4 GiB before a few bytes, or before a megabyte compressed to 1 KiB."""
    false = header(2**32 - 1)
    compressed = gzip.compress(false + bytes(2**20))
    correct = gzip.compress(header(2**20) + bytes(2**20))
    for content, limit in ((false + b"x", 2**18), (compressed, 2**23), (correct, 2**23)):
        path = write(tmp_path, content)
        tracemalloc.start()
        try:
            read_idx(path)
        except jt.errors.InputError:
            assert content is not correct
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit
