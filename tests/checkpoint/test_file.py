"""A checkpoint file is restored bit by bit, or refused with a reason."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint import (
    DamagedError,
    PartOfEpoch,
    Snapshot,
    checkpoint_path,
    digest,
    read_file,
    verify,
)
from jaxtrain.errors import InputError
from tests.checkpoint.helpers import (
    COLUMNS,
    METADATA,
    accept,
    assert_identical,
    forge,
    make_snapshot,
    make_state,
    open_store,
    restore,
    write,
)

ROOT = Path(__file__).parents[2]
DTYPES = [
    *("float32", "float16", "bfloat16", "int32", "int16", "int8", "uint32", "uint8", "bool"),
    *("complex64", "float8_e4m3fn", "float8_e5m2"),
]


@st.composite
def arrays(draw: st.DrawFn) -> jax.Array:
    """Draws arrays of any bits and dtype."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape))
    if dtype.kind == "b":
        return jnp.asarray(draw(hnp.arrays(bool, shape)))
    content = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return jnp.asarray(np.frombuffer(content, dtype).reshape(shape))


keys = st.builds(
    lambda seed, impl, count: jax.random.split(jax.random.key(seed, impl=impl), count)[()],
    st.integers(0, 2**32 - 1),
    st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]),
    st.sampled_from([(), (3,), (0,)]),
)
leaves = st.one_of(arrays(), keys, hnp.arrays(np.float64, 2))
# Including lone surrogates, control characters and dots.
names = st.text(min_size=1, max_size=5)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(optax.TraceState, children),
        st.none(),
    ),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(state=trees, other=st.booleans(), best=st.booleans(), data=st.data())
def test_any_state_is_restored(tmp_path_factory, state, other, best, data) -> None:
    length = data.draw(st.integers(0, 3))
    shapes = st.sampled_from([(length,), (length, 2)])
    columns = st.tuples(st.sampled_from([np.float64, np.int64]), shapes).flatmap(
        lambda pair: hnp.arrays(*pair)
    )
    history = data.draw(st.dictionaries(names, columns, max_size=3))
    losses = data.draw(hnp.arrays(np.float32, st.integers(0, 3)))
    folder = tmp_path_factory.mktemp("checkpoints")
    state = {"tree": state}
    best_state = (dict(state) if other else state) if best else None
    with open_store(folder) as store:
        store.save(Snapshot(7, state, history, losses, best_state, "train_loss"))
        store.wait()
        restored = store.restore(state, list(history), accept)
    assert list(restored.history) == list(history)
    expected = (state, history, losses, best_state)
    assert_identical(
        (restored.state, restored.history, restored.step_losses, restored.best), expected
    )
    assert (restored.epoch, restored.monitor, restored.part) == (7, "train_loss", None)


PART = PartOfEpoch(
    step=2,
    examples=32,
    loss=np.float32([0.5, np.nan]),
    weight=np.float32([16, 16]),
    sums={"accuracy": np.float32(3), "confusion": np.arange(4).reshape(2, 2)},
    counts={"skipped_steps": 1},
    seconds=0.1,
    positions=['{"json": 3}'],
)


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_part_of_an_epoch_is_restored(tmp_path: Path, epoch: int) -> None:
    """Also one of the first epoch, where the history is empty."""
    with open_store(tmp_path) as store:
        store.save(make_snapshot(epoch, make_state(), part=PART))
        store.wait()
        sums = jax.tree.map(np.zeros_like, PART.sums)
        restored = store.restore(make_state(), COLUMNS, accept, sums=sums)
        with pytest.raises(InputError, match=r"\['confusion'\] of int64\[2, 2\] where .* nothing"):
            store.restore(make_state(), COLUMNS, accept, sums={"accuracy": sums["accuracy"]})
    assert checkpoint_path(tmp_path, epoch, 2).exists()
    assert restored.epoch == epoch
    for name, value in PART._asdict().items():
        found = getattr(restored.part, name)
        if name in ("loss", "weight", "sums"):
            assert_identical(found, value)
        else:
            assert found == value


def save_and_restore(path: Path, state, like=None):
    with open_store(path) as store:
        store.save(make_snapshot(1, state))
        store.wait()
        return store.restore(state if like is None else like, COLUMNS, accept)


def test_a_best_state_that_is_the_last_state_is_stored_once(tmp_path: Path) -> None:
    state, other = {"w": jnp.ones(1000)}, {"w": jnp.zeros(1000)}
    sizes = []
    for number, best in enumerate([None, state, other]):
        with open_store(tmp_path / str(number)) as store:
            store.save(make_snapshot(1, state, best))
            store.wait()
            restored = store.restore(state, COLUMNS, accept)
        assert (restored.best is restored.state) == (best is state)
        sizes.append(checkpoint_path(tmp_path / str(number), 1).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 100 < 4000 < sizes[2] - sizes[1]


@pytest.mark.parametrize("value", [np.complex128(1), np.longdouble(1), jnp.zeros(2, "int4")])
def test_a_dtype_that_the_format_does_not_support_is_named(tmp_path: Path, value) -> None:
    with pytest.raises(InputError, match=r"state\.deep\.w has the dtype .* expected one of"):
        save_and_restore(tmp_path, {"deep": {"w": value}})


def test_arrays_can_be_modified_after_save(tmp_path: Path) -> None:
    """The thread that writes has its own copy of NumPy arrays."""
    state = {"w": np.zeros(1_000_000, np.float32)}
    snapshot = make_snapshot(1, state)
    with open_store(tmp_path) as store:
        store.save(snapshot)
        state["w"][:] = 1
        snapshot.history["train_loss"][:] = 7
        store.wait()
        restored = store.restore(state, COLUMNS, accept)
    assert not restored.state["w"].any()
    assert restored.history["train_loss"] == [2]


def test_other_programs_read_the_arrays_and_the_record(tmp_path: Path) -> None:
    write(tmp_path)
    path = checkpoint_path(tmp_path, 3)
    found = safetensors.numpy.load(path.read_bytes())
    np.testing.assert_array_equal(found["state.w"], make_state(3)["w"])
    assert found["history.1.train_loss"].tolist() == [2, 1.5, 1]
    record, _ = read_file(path)
    assert (record["format"], record["metadata"], record["columns"]) == (4, METADATA, COLUMNS)
    assert record["leaves"]["state.key"] == "['key'] of key<threefry2x32>[]"
    assert json.loads(json.dumps(record)) == record


def test_digests_differ_with_values_dtypes_and_shapes() -> None:
    state = make_state(1)
    assert digest(state) == digest(make_state(1)) != digest(make_state(2))
    assert digest({"a": jnp.zeros(2)}) != digest({"a": jnp.zeros((2, 1))})
    assert digest(jnp.zeros(1, "float32")) != digest(jnp.zeros(1, "int32"))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((2, 3))}, r"has .*\['w'\] of float32\[3, 2\] where .* float32\[2, 3\]"),
        ({"w": jnp.zeros((3, 2), "int32")}, r"of float32\[3, 2\] where .* of int32\[3, 2\]"),
        ({"v": jnp.zeros((3, 2))}, r"\['w'\] of .* where .* \['v'\] of"),
        ({}, r"has \['w'\] of .* where this run has nothing more"),
        ({"w": jnp.zeros((3, 2)), "x": jnp.zeros(1)}, r"has nothing more where .* \['x'\]"),
    ],
)
def test_another_structure_is_refused(tmp_path: Path, like, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        save_and_restore(tmp_path, {"w": jnp.ones((3, 2))}, like)
    assert not isinstance(error.value, DamagedError)


def test_a_key_of_another_implementation_is_refused(tmp_path: Path) -> None:
    """The data of rbg and unsafe_rbg keys have the same shape."""
    one, other = ({"key": jax.random.key(3, impl=impl)} for impl in ("rbg", "unsafe_rbg"))
    message = r"has \['key'\] of key<rbg>\[\] where this run has \['key'\] of key<unsafe_rbg>\[\]"
    with pytest.raises(InputError, match=message):
        save_and_restore(tmp_path, one, other)


def test_a_change_of_any_byte_is_detected(tmp_path: Path) -> None:
    write(tmp_path)
    path, choice = checkpoint_path(tmp_path, 3), random.Random(0)
    content = path.read_bytes()
    verify(path)
    changed = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << choice.randrange(8)
        changed.append(bytes(damaged))
    changed += [content + b"\0", b"", content[:7], content[:-1], content[1:], content * 2]
    digits = content.split(b'"sha256":"')[1][:64]
    changed.append(content.replace(digits, digits.upper()))
    for damaged in changed:
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            verify(path)


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """Neither pickles as the file or its data, nor code as a dtype or a description."""
    trace, folder = tmp_path / "executed", tmp_path / "checkpoints"
    code, bomb = f"__import__('os').mkdir({str(trace)!r})", pickle.dumps(Bomb(trace))
    write(folder)
    path = checkpoint_path(folder, 3)
    original = path.read_bytes()
    size = len(original) - 8 - int.from_bytes(original[:8], "little")

    def forged(change, data=None) -> Path:
        path.write_bytes(original)
        forge(path, change, data)
        return folder

    with pytest.warns(UserWarning, match="damaged"):
        restore(forged(lambda header, record: header["state.w"].update(dtype=code)))
    with pytest.raises(InputError, match="where this run has"):
        restore(forged(lambda header, record: record["leaves"].update({"state.w": code})))
    assert restore(forged(lambda header, record: None, bomb.ljust(size, b"."))).epoch == 3
    for plant in (bomb, code.encode()):
        path.write_bytes(plant)
        with pytest.warns(UserWarning, match="damaged"):
            assert restore(folder).epoch == 2
    assert not trace.exists()
    pickle.loads(bomb)  # the pickle does execute code
    assert trace.exists()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_sharded_state_is_restored_on_any_number_of_devices(tmp_path: Path) -> None:
    def place(count: int, saved: bool) -> dict:
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        return {
            "rows": jax.device_put(jnp.arange(64.0).reshape(16, 4) * saved, rows),
            "copies": jax.device_put(jnp.arange(3) * saved, copies),
            "keys": jax.device_put(jax.random.split(jax.random.key(int(saved)), 8), rows),
            "last": jax.device_put(jnp.float32(saved), jax.devices()[count - 1]),
            "free": jnp.float32(saved),
        }

    expected = place(8, True)
    with open_store(tmp_path) as store:
        store.save(make_snapshot(1, expected))
    for count in (8, 4, 1):
        like = place(count, False)
        found = restore(tmp_path, like).state
        for name, leaf in found.items():
            assert leaf.sharding == like[name].sharding, name
            assert leaf.committed == like[name].committed, name
        assert_identical(found, expected)


def test_the_command_verifies_files(tmp_path: Path) -> None:
    write(tmp_path, 1)
    good, bad = checkpoint_path(tmp_path, 1), tmp_path / "line\nbreak"
    bad.write_bytes(b"x")
    command = [sys.executable, "-m", "jaxtrain.checkpoint", bad, good, tmp_path / "none"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = found.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/line\\nbreak has the wrong checksum"
    assert lines[1] == f"{good}: intact"
    assert "No such file" in lines[2]
    assert (found.returncode, found.stderr) == (1, "")
