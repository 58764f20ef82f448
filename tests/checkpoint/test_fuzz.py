"""Checkpoints of any content are restored correctly or raise InputError.

`JAXTRAIN_FUZZ=100000 make test ARGS=tests/checkpoint/test_fuzz.py` tries 25,000 inputs.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.checkpoint import DamagedError, checkpoint_path, verify
from jaxtrain.errors import InputError
from tests.checkpoint.helpers import restore, write

INPUTS = int(os.environ.get("JAXTRAIN_FUZZ", "4000"))


def fuzz(fraction: float) -> settings:
    count = max(10, int(fraction * INPUTS))
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws the content of a file with bytes changed, removed or inserted."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.sampled_from([0, 1, 8, len(content)]))
    new = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"\0", b"\n", b'"', b"9" * 20])))
    return content[:start] + new + content[start + length :]


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, 3)
    return checkpoint_path(folder, 3).read_bytes()


@fuzz(0.2)
@given(data=st.data())
def test_any_change_of_bytes_is_detected(tmp_path: Path, content: bytes, data) -> None:
    damaged = data.draw(damages(content))
    path = tmp_path / "epoch-3.safetensors"
    path.write_bytes(damaged)
    if damaged == content:
        verify(path)
    else:
        with pytest.raises(DamagedError):
            verify(path)


@fuzz(0.05)
@given(content=st.binary(max_size=64))
def test_files_of_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    checkpoint_path(tmp_path, 1).write_bytes(content)
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(InputError, match="no intact checkpoint"),
    ):
        restore(tmp_path)
