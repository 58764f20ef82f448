"""Checkpoints of any content are restored correctly or raise InputError.

`JAXTRAIN_FUZZ=100000 make test ARGS=tests/checkpoint/test_fuzz.py` tries 35,000 inputs.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.checkpoint import DamagedError, checkpoint_path, verify
from jaxtrain.errors import InputError
from tests.checkpoint.helpers import (
    COLUMNS,
    accept,
    forge,
    make_state,
    open_store,
    write_three,
)

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
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_three(folder)
    return checkpoint_path(folder, 3)


@fuzz(0.2)
@given(data=st.data())
def test_any_change_of_bytes_is_detected(
    tmp_path: Path, checkpoint: Path, data: st.DataObject
) -> None:
    content = checkpoint.read_bytes()
    damaged = data.draw(damages(content))
    path = tmp_path / "epoch-3.safetensors"
    path.write_bytes(damaged)
    if damaged == content:
        verify(path)
    else:
        with pytest.raises(DamagedError):
            verify(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@fuzz(0.1)
@given(data=st.data())
def test_forged_files_are_restored_or_refused(
    tmp_path: Path, checkpoint: Path, data: st.DataObject
) -> None:
    """Whatever the header and the record contain, a result has the structure of the model."""
    path = tmp_path / "epoch-3.safetensors"
    path.write_bytes(checkpoint.read_bytes())

    def change(header, record) -> None:
        place = data.draw(st.sampled_from([header, record]))
        for _ in range(data.draw(st.integers(0, 3))):
            children = list(place.values()) if isinstance(place, dict) else place
            children = [child for child in children if isinstance(child, (dict, list)) and child]
            if not children:
                break
            place = data.draw(st.sampled_from(children))
        if isinstance(place, dict):
            key = data.draw(st.sampled_from([*sorted(place), "new"]))
        else:
            key = data.draw(st.integers(0, len(place) - 1))
        if key != "new" and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(json_values)

    try:
        forge(path, change)
    except (TypeError, ValueError):  # the change cannot be written as JSON
        return
    like = make_state()
    with open_store(tmp_path) as store:
        try:
            restored = store.restore(like, COLUMNS, accept)
        except InputError:
            return
    assert restored is not None
    assert restored.epoch == 3
    assert list(restored.history) == COLUMNS
    assert jax.tree.structure(restored.state) == jax.tree.structure(like)
    for name, leaf in like.items():
        assert (restored.state[name].dtype, restored.state[name].shape) == (leaf.dtype, leaf.shape)


@fuzz(0.05)
@given(content=st.binary(max_size=64))
def test_files_of_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    checkpoint_path(tmp_path, 1).write_bytes(content)
    with (
        warnings.catch_warnings(action="error"),
        open_store(tmp_path) as store,
        pytest.raises(InputError, match="no intact checkpoint"),
    ):
        store.restore(make_state(), COLUMNS, accept)
