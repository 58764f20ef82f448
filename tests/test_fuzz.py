"""Files with any content: every parser returns a correct result or raises InputError.

About 500 inputs; `JAXTRAIN_FUZZ=100000 make test ARGS=tests/test_fuzz.py` tries 100,000.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxtrain as jt
from jaxtrain.checkpoint import DamagedError, checkpoint_path, verify
from jaxtrain.data import read_idx
from tests.checkpoint.helpers import write
from tests.test_idx import encode, header

INPUTS = int(os.environ.get("JAXTRAIN_FUZZ", "600"))


def fuzz(fraction: float) -> settings:
    """Returns settings that try a fraction of the inputs."""
    count = max(10, int(fraction * INPUTS))
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


mostly_idx = st.builds(
    lambda shape, code, ndim, payload: header(*shape, code=code, ndim=ndim) + payload,
    st.lists(st.sampled_from([0, 1, 2, 3, 2**16, 2**31, 2**32 - 1]), max_size=6),
    st.integers(0, 255),
    st.one_of(st.none(), st.integers(0, 255)),
    st.binary(max_size=64),
)


@fuzz(0.4)
@given(
    content=st.one_of(
        st.binary(max_size=64),
        mostly_idx,
        mostly_idx.map(gzip.compress),
        st.tuples(mostly_idx.map(gzip.compress), st.integers(0, 40)).map(lambda p: p[0][: p[1]]),
    )
)
@example(content=header(*[1] * 100) + b"x")  # more axes than NumPy has
@example(content=header(0, 2**32 - 1, 2**32 - 1, 2**32 - 1))  # no elements, impossible strides
def test_idx_files_of_any_content_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file-idx"
    path.write_bytes(content)
    try:
        array = read_idx(path)
    except jt.errors.InputError:
        return
    plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    assert encode(array, code=plain[2]) == plain


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws a file's content with bytes changed, removed, inserted or replaced."""
    at = draw(st.integers(0, len(content)))
    until = draw(st.integers(at, min(len(content), at + draw(st.sampled_from([0, 1, 8, 10**9])))))
    new = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"\0", b"\n", b'"', b"9" * 20])))
    return content[:at] + new + content[until:]


@pytest.fixture(scope="module")
def model() -> jt.TrainState:
    return jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(0.1),
        jnp.ones((1, 2)),
        key=jax.random.key(0),
    )


@fuzz(0.3)
@given(data=st.data())
def test_model_files_of_any_content_are_loaded_or_refused(
    tmp_path: Path, model: jt.TrainState, data: st.DataObject
) -> None:
    """Arrays that are loaded have the shapes and dtypes of the model."""
    path = tmp_path / "model.safetensors"
    jt.save(path, model)
    content = data.draw(st.one_of(damages(path.read_bytes()), st.binary(max_size=64)))
    path.write_bytes(content)
    try:
        loaded = jt.load(path, model)
    except jt.errors.InputError:
        return
    for ours, theirs in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, 3)
    return checkpoint_path(folder, 3).read_bytes()


@fuzz(0.3)
@given(data=st.data())
def test_any_change_of_a_checkpoint_is_detected(tmp_path: Path, checkpoint: bytes, data) -> None:
    content = data.draw(st.one_of(damages(checkpoint), st.binary(max_size=64)))
    path = checkpoint_path(tmp_path, 3)
    path.write_bytes(content)
    if content == checkpoint:
        verify(path)
    else:
        with pytest.raises(DamagedError):
            verify(path)
