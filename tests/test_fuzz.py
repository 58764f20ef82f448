"""Every file that is parsed, with anything in it: a result that is right, or an InputError.

Some 4,000 inputs; `JAXTRAIN_FUZZ=100000 make test ARGS=tests/test_fuzz.py` tries more than 100,000.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxtrain as jt
from experiments.minibatch_regression import Config
from jaxtrain.checkpoint_files import Checkpoint, DamagedError, read_checkpoint
from jaxtrain.checkpoints import START, Checkpoints
from jaxtrain.command import Safety
from jaxtrain.data import read_idx
from jaxtrain.runs import RunFolder
from tests.test_checkpoints import reseal
from tests.test_idx import encode, header

INPUTS = int(os.environ.get("JAXTRAIN_FUZZ", "4000"))


def fuzz(share: float) -> settings:
    """Settings to try a share of the inputs."""
    count = max(10, int(share * INPUTS))
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
def test_idx_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file-idx"
    path.write_bytes(content)
    try:
        array = read_idx(path)
    except jt.InputError:
        return
    plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    assert encode(array, code=plain[2]) == plain


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's content with bytes changed, cut out, put in, or replaced altogether."""
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model: jt.TrainState) -> Path:
    """One of a small state."""
    folder = tmp_path_factory.mktemp("checkpoint")
    history = {"train_loss": np.array([1.5])}
    with Checkpoints(folder, configuration={"a": 1}, identity={START: "b"}, versions={}) as store:
        store.save(Checkpoint(1, model, history))
    return folder / "epoch-1"


@fuzz(0.2)
@given(data=st.data())
def test_checkpoints(tmp_path: Path, checkpoint: Path, data: st.DataObject) -> None:
    """A checkpoint with one file damaged is found out; one that is not is read."""
    names = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    original = data.draw(st.sampled_from(names))
    content = original.read_bytes()
    damaged = data.draw(damages(content))
    folder = tmp_path / "1"
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    file = folder / original.relative_to(checkpoint)
    file.write_bytes(damaged)
    try:
        if damaged == content:
            read_checkpoint(folder)
        else:
            with pytest.raises(DamagedError):
                read_checkpoint(folder)
    finally:
        file.write_bytes(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@fuzz(0.05)
@given(data=st.data())
def test_records_with_sums_that_fit(
    tmp_path: Path, checkpoint: Path, model: jt.TrainState, data: st.DataObject
) -> None:
    """Nothing but an InputError comes of a record that someone wrote, whatever it says."""
    folder = tmp_path / "epoch-1"
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    record = json.loads((checkpoint / "record.json").read_text())
    place = record
    for _ in range(data.draw(st.integers(0, 3))):
        if isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], (dict, list)):
                break
            place = place[key]
        elif isinstance(place, list) and place:
            place = place[0]
    if isinstance(place, dict):
        key = data.draw(st.sampled_from(sorted(place)) if place else st.just("new"))
        if place and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(json_values)
    (folder / "record.json").write_text(json.dumps(record))
    reseal(folder)
    with Checkpoints(tmp_path, configuration={"a": 1}, identity={START: "b"}, versions={}) as store:
        try:
            with warnings.catch_warnings(action="ignore"):  # that it is of other versions
                loaded = store.load(model, "must")
        except jt.InputError:
            return
    assert jax.tree.structure(loaded.state) == jax.tree.structure(model)


@fuzz(0.3)
@given(data=st.data())
def test_model_files(tmp_path: Path, model: jt.TrainState, data: st.DataObject) -> None:
    """Shapes and types of what is read are the model's, whatever the file."""
    path = tmp_path / "model.safetensors"
    jt.save_params(path, model)
    content = data.draw(st.one_of(damages(path.read_bytes()), st.binary(max_size=64)))
    path.write_bytes(content)
    try:
        loaded = jt.load_params(path, model)
    except jt.InputError:
        return
    for ours, theirs in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@fuzz(0.1)
@given(content=st.one_of(st.binary(max_size=32), json_values.map(lambda v: json.dumps(v).encode())))
@example(content=b'{"pictures": ["../precious.txt", "a.png", 3]}')
@example(content=b'{"pictures": null}')
@example(content=b'{"safety": {"checkpoint_dir": 3}}')
@example(content=b"[" * 100_000)
def test_what_an_earlier_run_left(tmp_path: Path, content: bytes) -> None:
    """Its summary lists pictures to remove, its configuration tells where its checkpoints are."""
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "checkpoints" / "epoch-1").mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "config.json"):
        (folder / name).write_bytes(content)
    safety = Safety(checkpoint_dir=tmp_path / "checkpoints")
    assert safety.goes_on(Config(output_dir=folder, safety=safety)) is False
    RunFolder(folder, Safety(), overwrite=True).start()
    assert (tmp_path / "precious.txt").read_text() == "mine"
