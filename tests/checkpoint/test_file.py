"""A checkpoint file is restored bit by bit, or refused with a reason."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import textwrap
import warnings
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

from jaxtrain.checkpoint import (
    DamagedError,
    PartOfEpoch,
    Snapshot,
    checkpoint_path,
    digest,
    verify,
)
from jaxtrain.errors import InputError
from tests.checkpoint.helpers import (
    COLUMNS,
    accept,
    assert_identical,
    forge,
    make_snapshot,
    make_state,
    open_store,
    read_header,
    write_three,
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
        st.just(optax.EmptyState()),
        st.none(),
    ),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(state=trees, other=st.booleans(), best=st.booleans(), data=st.data())
def test_any_state_is_restored(tmp_path_factory, state, other, best, data) -> None:
    length = data.draw(st.integers(0, 3))
    shapes = st.sampled_from([(length,), (length, 2), (length, 3, 1)])
    columns = st.tuples(st.sampled_from([np.float64, np.int64, np.float32]), shapes).flatmap(
        lambda pair: hnp.arrays(*pair)
    )
    history = data.draw(st.dictionaries(names.filter(lambda n: n != "epoch"), columns, max_size=3))
    losses = data.draw(hnp.arrays(np.float32, st.integers(0, 3)))
    folder = tmp_path_factory.mktemp("checkpoints")
    state = {"tree": state}
    best_state = (dict(state) if other else state) if best else None
    with open_store(folder) as store:
        store.save(Snapshot(7, state, history, losses, best_state, "train_loss"))
        store.wait()
        restored = store.restore(state, list(history), accept)
    assert restored is not None
    assert restored.epoch == 7
    assert_identical(restored.state, state)
    assert list(restored.history) == list(history)
    assert_identical(restored.history, history)
    assert_identical(restored.step_losses, losses)
    assert (restored.best is None) == (not best)
    if best:
        assert_identical(restored.best, state)
    assert restored.monitor == "train_loss"
    assert restored.part is None
    verify(checkpoint_path(folder, 7))


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
    arrays = {"loss", "weight", "sums"}
    for name, value in PART._asdict().items():
        found = getattr(restored.part, name)
        assert name in arrays or found == value
        if name in arrays:
            assert_identical(found, value)
    assert_identical(restored.step_losses, np.zeros(4 * epoch, np.float32))


def test_a_part_of_an_epoch_with_another_number_of_losses_is_damaged(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save(make_snapshot(2))
        store.save(make_snapshot(2, part=PART._replace(step=3)))
        store.wait()
        with pytest.warns(UserWarning, match="losses are not one number per step"):
            assert store.restore(make_state(), COLUMNS, accept, sums=PART.sums).part is None


def save_and_restore(path: Path, state, like=None, **options):
    with open_store(path, **options) as store:
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
    assert_identical(restored.best, other)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_the_implementation_of_a_key_is_restored(tmp_path: Path, impl: str) -> None:
    state = {"key": jax.random.key(3, impl=impl)}
    restored = save_and_restore(tmp_path, state).state["key"]
    assert jax.random.key_impl(restored) == jax.random.key_impl(state["key"])
    assert jax.random.bits(restored) == jax.random.bits(state["key"])


def test_a_key_of_another_implementation_is_refused(tmp_path: Path) -> None:
    """The data of rbg and unsafe_rbg keys have the same shape."""
    one, other = ({"key": jax.random.key(3, impl=impl)} for impl in ("rbg", "unsafe_rbg"))
    message = r"has \['key'\] of key<rbg>\[\] where this run has \['key'\] of key<unsafe_rbg>\[\]"
    with pytest.raises(InputError, match=message):
        save_and_restore(tmp_path, one, other)


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


def test_the_safetensors_library_reads_the_arrays(tmp_path: Path) -> None:
    write_three(tmp_path)
    with open(checkpoint_path(tmp_path, 3), "rb") as file:
        found = safetensors.numpy.load(file.read())
    np.testing.assert_array_equal(found["state.w"], make_state(3)["w"])
    assert found["history.1.train_loss"].tolist() == [2, 1.5, 1]


def test_digests_differ_with_values_dtypes_and_shapes() -> None:
    state = make_state(1)
    assert digest(state) == digest(make_state(1)) != digest(make_state(2))
    assert digest({"a": jnp.zeros(2)}) != digest({"a": jnp.zeros((2, 1))})
    assert digest(jnp.zeros(1, "float32")) != digest(jnp.zeros(1, "int32"))
    assert digest([jax.random.key(0)]) == digest([jax.random.key_data(jax.random.key(0))])


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


def test_a_change_of_any_byte_is_detected(tmp_path: Path) -> None:
    write_three(tmp_path)
    path, choice = checkpoint_path(tmp_path, 3), random.Random(0)
    content = path.read_bytes()
    verify(path)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << choice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            verify(path)
    for damaged in (content + b"\0", b"", content[:7], content[:-1], content[1:], content * 2):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match="wrong checksum"):
            verify(path)


def test_a_change_of_any_digit_of_the_checksum_is_detected(tmp_path: Path) -> None:
    """Including a change to capital letters."""
    write_three(tmp_path)
    path = checkpoint_path(tmp_path, 3)
    digits = read_header(path)[0]["__metadata__"]["sha256"].encode()
    content = path.read_bytes()
    others = [
        digits[:place] + bytes([digit]) + digits[place + 1 :]
        for place in range(64)
        for digit in b"0123456789abcdef"
        if digit != digits[place]
    ]
    for other in (*others, digits.upper()):
        path.write_bytes(content.replace(digits, other))
        with pytest.raises(DamagedError, match="wrong checksum"):
            verify(path)


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """Neither pickles as the file or its data, nor code as dtypes and names."""
    trace = tmp_path / "executed"
    array = io.BytesIO()
    np.save(array, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    code = f"__import__('os').mkdir({str(trace)!r})"

    def change_dtype(header, record) -> None:
        header["state.w"]["dtype"] = code

    def change_name(header, record) -> None:
        header[code] = header.pop("state.w")

    def change_record(header, record) -> None:
        record["leaves"]["state.w"] = code

    folder = tmp_path / "checkpoints"
    write_three(folder)
    path = checkpoint_path(folder, 3)
    original = path.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    for plant in (pickle.dumps(Bomb(trace)), array.getvalue(), code.encode()):
        path.write_bytes(plant)
        with open_store(folder) as store, pytest.warns(UserWarning, match="damaged"):
            assert store.restore(make_state(), COLUMNS, accept).epoch == 2
        path.write_bytes(original[:start] + plant.ljust(len(original) - start, b"."))
        forge(path, lambda header, record: None)
        with open_store(folder) as store, warnings.catch_warnings(action="ignore"):
            assert store.restore(make_state(), COLUMNS, accept)
    for change in (change_dtype, change_name, change_record):
        alone = tmp_path / change.__name__
        alone.mkdir()
        checkpoint_path(alone, 3).write_bytes(original)
        forge(checkpoint_path(alone, 3), change)
        with open_store(alone) as store, pytest.raises(InputError, match="epoch-3"):
            store.restore(make_state(), COLUMNS, accept)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))  # the pickle does execute code
    assert trace.exists()


SHARDED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.checkpoint.helpers import COLUMNS, accept, make_snapshot, open_store

count, save = int(sys.argv[2]), sys.argv[3] == "save"
assert jax.device_count() == count
mesh = jax.make_mesh((count,), ("data",))
rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
last = jax.devices()[-1]
state = {
    "rows": jax.device_put(jnp.arange(64.0).reshape(16, 4) * save, rows),
    "copies": jax.device_put(jnp.arange(3) * save, copies),
    "keys": jax.device_put(jax.random.split(jax.random.key(int(save)), 8), rows),
    "last": jax.device_put(jnp.float32(save), last),
    "free": jnp.float32(save),
}
with open_store(Path(sys.argv[1])) as store:
    if save:
        store.save(make_snapshot(1, state))
        store.wait()
    found = store.restore(state, COLUMNS, accept).state
for name, like in state.items():
    assert found[name].sharding == like.sharding, name
    assert found[name].committed == like.committed, name
np.testing.assert_array_equal(found["rows"], np.arange(64.0).reshape(16, 4))
assert len(found["rows"].addressable_shards) == count
assert found["rows"].addressable_shards[0].data.shape == (16 // count, 4)
assert found["copies"].tolist() == [0, 1, 2] and found["last"] == found["free"] == 1
words = jax.random.key_data(jax.random.split(jax.random.key(1), 8))
np.testing.assert_array_equal(jax.random.key_data(found["keys"]), words)
"""


def test_a_sharded_state_is_restored_on_any_number_of_devices(tmp_path: Path) -> None:
    for count, action in ((8, "save"), (8, "restore"), (4, "restore"), (1, "restore")):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path), str(count), action],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=120,
        )


def test_the_command_verifies_files(tmp_path: Path) -> None:
    write_three(tmp_path)
    good, bad = checkpoint_path(tmp_path, 1), tmp_path / "line\nbreak"
    bad.write_bytes(b"x")

    def run(*files: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "jaxtrain.checkpoint", *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    intact = run(good)
    assert (intact.returncode, intact.stdout) == (0, f"{good}: intact\n")
    mixed = run(bad, good, tmp_path / "none")
    assert mixed.returncode == 1
    lines = mixed.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/line\\nbreak has the wrong checksum"
    assert lines[1] == f"{good}: intact"
    assert "No such file" in lines[2]
    assert mixed.stderr == ""
