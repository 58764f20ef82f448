"""Files with any content, and calls with odd arguments.

Every parser returns a correct result or raises InputError, and every public callable returns a
value, or raises an error of the library or a documented one of JAX. About 600 files and 400 calls;
`JAXTRAIN_FUZZ=100000 JAXTRAIN_FUZZ_CALLS=8000 make test ARGS=tests/test_fuzz.py` tries more.
"""

from __future__ import annotations

import gzip
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxtrain as jt
from jaxtrain.checkpoint import DamagedError, checkpoint_path, verify
from jaxtrain.data import read_idx
from tests import fuzz_calls
from tests.checkpoint.helpers import write
from tests.fuzz_calls import Call
from tests.public_names import public_names
from tests.test_idx import encode, header

CALLS = int(os.environ.get("JAXTRAIN_FUZZ_CALLS", "400"))
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


VALID = [Call(text) for text in fuzz_calls.CALLS.strip().splitlines()]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    return fuzz_calls.names(tmp_path_factory.mktemp("calls"))


def test_every_public_callable_has_a_valid_call_or_a_reason() -> None:
    def is_called(name: str) -> bool:
        method = f"train.{name.removeprefix('Dataset.')}"
        return any(f"jt.{name}(" in x or f"jt.{name})" in x or method in x for x in texts)

    texts = [each.text for each in VALID]
    needed = {
        name
        for name, value in public_names().items()
        if callable(value) and not name.startswith("errors.") and name[0] != "_"
    }
    unknown = {name for name in needed - set(fuzz_calls.NOT_CALLED) if not is_called(name)}
    assert unknown == {"losses.Loss", "metrics.PerExampleMetric"}  # types


@pytest.mark.parametrize("call", VALID, ids=lambda call: call.text.partition("(")[0])
def test_odd_arguments_give_a_value_or_a_documented_error(
    call: Call, values: dict[str, Any], tmp_path_factory, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(values["folder"])
    raw = []
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function, positional, given = call.bound(values)
        function(*[given.pop(name) for name in positional], **given)
        for odd, attempt in fuzz_calls.odd_calls(call, values, max(1, CALLS // len(VALID))):
            try:
                attempt()
            except Exception as error:
                if not fuzz_calls.is_documented(error, call.name, odd):
                    raw.append(f"{odd}: {type(error).__name__}: {str(error)[:200]}")
    assert raw == []
