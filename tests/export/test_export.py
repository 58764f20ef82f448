"""save and load restore a model, and name what does not match."""

from __future__ import annotations

import functools
import json
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxtrain as jt

ADAM = jt.optimizers.adam(0.1)


class Network(nn.Module):
    """Has batch statistics, and parameters in half precision."""

    width: int = 5

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.Dense(self.width, param_dtype=jnp.bfloat16)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x) * self.param("scale", nn.initializers.ones, ())


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@functools.cache
def state_of(model, seed: int = 0) -> jt.TrainState:
    return jt.init_state(model, ADAM, jnp.ones((1, 4)), key=jax.random.key(seed))


def assert_identical(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()


def test_a_trained_model_is_restored(tmp_path: Path) -> None:
    data = jt.Dataset(jnp.eye(4)[:3], jnp.arange(3))
    trained, _ = jt.train_epoch(state_of(Network()), data, jt.losses.cross_entropy)
    jt.save(tmp_path / "model.safetensors", trained)
    fresh = state_of(Network(), seed=1)
    loaded = jt.load(tmp_path / "model.safetensors", fresh)
    assert_identical(loaded.params, trained.params)
    assert_identical(loaded.model_state, trained.model_state)
    assert loaded.model_state["batch_stats"]["BatchNorm_0"]["mean"].any()
    assert_identical((loaded.opt_state, loaded.key), (fresh.opt_state, fresh.key))
    assert loaded.step == 0
    np.testing.assert_array_equal(jt.predict(loaded, data.inputs), jt.predict(trained, data.inputs))


def test_a_model_is_loaded_without_its_optimizer(tmp_path: Path) -> None:
    inputs = jnp.eye(4)
    trained = state_of(Network()).replace(step=jnp.int32(3))
    jt.save(tmp_path / "model.safetensors", trained)
    fresh = jt.init_state(Network(), None, inputs[:1], key=jax.random.key(1))
    loaded = jt.load(tmp_path / "model.safetensors", fresh)
    assert jax.tree.leaves(loaded.opt_state) == []
    np.testing.assert_array_equal(jt.predict(loaded, inputs), jt.predict(trained, inputs))


def test_pytorch_reads_the_file(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    state = state_of(Network())
    jt.save(tmp_path / "model.safetensors", state)
    found = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert set(found) == {
        *("params.Dense_0.kernel", "params.Dense_0.bias", "params.Dense_1.kernel"),
        *("params.Dense_1.bias", "params.BatchNorm_0.scale", "params.BatchNorm_0.bias"),
        "params.scale",
        *("batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"),
    }
    assert found["params.Dense_0.kernel"].shape == (4, 5)
    np.testing.assert_array_equal(
        found["params.Dense_0.kernel"].float().numpy(),
        np.asarray(state.params["Dense_0"]["kernel"], np.float32),
    )


class Memory(NamedTuple):
    """A model state with a number and PRNG keys of two implementations."""

    mean: jax.Array
    key: jax.Array
    keys: tuple[jax.Array, ...]


def test_any_pytree_with_keys_is_restored(tmp_path: Path) -> None:
    def init(key, inputs):
        memory = Memory(
            jax.random.normal(key), key, (jax.random.split(jax.random.key(3, impl="rbg"), 2),)
        )
        return [jax.random.normal(key, (3,)), {"scale": jnp.ones(())}], memory

    def apply(params, model_state, inputs, *, train, key):
        return inputs * params[1]["scale"], model_state

    model = jt.Model(init, apply)
    saved = state_of(model)
    jt.save(tmp_path / "m.safetensors", saved)
    assert set(safetensors.numpy.load_file(tmp_path / "m.safetensors")) == {
        *("params.0", "params.1.scale"),
        *("model_state.mean", "model_state.key", "model_state.keys.0"),
    }
    other = state_of(model, seed=1)
    loaded = jt.load(tmp_path / "m.safetensors", other)
    assert (loaded.model_state.key != other.model_state.key).all()
    assert_identical((loaded.params, loaded.model_state), (saved.params, saved.model_state))
    assert jax.random.key_impl(loaded.model_state.keys[0]) == "rbg"


def test_the_first_array_that_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    jt.save(path, state_of(Network()))
    wide = state_of(Network(width=6))
    with pytest.raises(jt.errors.InputError) as raised:
        jt.load(path, wide)
    assert str(raised.value) == (
        f"{path} has float32[5] for params.BatchNorm_0.bias, where the model has float32[6]; "
        "expected a file of the same model"
    )
    plain = state_of(jt.models.FeedForward((5, 3), mean=0.0, std=1.0))
    with pytest.raises(
        jt.errors.InputError, match=r"bfloat16\[5\] for params\.Dense_0\.bias, .* float32"
    ):
        jt.load(path, plain)
    jt.save(path, plain)
    with pytest.raises(jt.errors.InputError, match=r"has nothing for params\.BatchNorm_0"):
        jt.load(path, state_of(Network()))
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**arrays, "params.extra": np.ones(1)}, path)
    with pytest.raises(
        jt.errors.InputError, match=r"has params\.extra, which the model does not have"
    ):
        jt.load(path, plain)


def test_shapes_are_compared_before_arrays_are_created(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    jt.save(path, state_of(Network(width=6)))
    monkeypatch.setattr(np, "frombuffer", lambda *_: pytest.fail("an array was created"))
    with pytest.raises(jt.errors.InputError, match="where the model has"):
        jt.load(path, state_of(Network()))


def test_a_file_that_is_not_a_complete_model_is_refused(tmp_path: Path) -> None:
    state = state_of(Network())
    path = tmp_path / "model.safetensors"
    jt.save(path, state)
    complete = path.read_bytes()
    trace = tmp_path / "executed"
    for content in (
        *(b"", complete[:4], complete[:-1], complete + b"\0", b"\xff" * 64),
        pickle.dumps(Bomb(trace)),
        len(complete).to_bytes(8, "little") + json.dumps({"a": 1}).encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(jt.errors.InputError, match="is not a complete safetensors file"):
            jt.load(path, state)
    assert not trace.exists()
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(No such file"):
        jt.load(tmp_path / "missing", state)
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(it is a directory, not a"):
        jt.load(tmp_path, state)
    with pytest.raises(jt.errors.InputError, match="expected a path"):
        jt.load("model\0", state)
    with pytest.raises(jt.errors.StorageError, match="could not be written"):
        jt.save(tmp_path / "missing" / "model.safetensors", state)


def test_pipes_devices_and_huge_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    state = state_of(Network())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "zero"):
        with pytest.raises(jt.errors.InputError, match=r"read \(it is a (pipe|device), not"):
            jt.load(tmp_path / name, state)
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(Too many levels"):
        jt.load(tmp_path / "loop", state)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(jt.errors.InputError, match="is larger than a file of this model"):
        jt.load(tmp_path / "sparse", state)


def test_the_placement_of_the_state_is_kept(tmp_path: Path) -> None:
    device = jax.devices()[-1]
    state = state_of(Network())
    jt.save(tmp_path / "m.safetensors", state)
    assert not jax.tree.leaves(jt.load(tmp_path / "m.safetensors", state).params)[0].committed
    placed = jt.load(tmp_path / "m.safetensors", jax.device_put(state, device))
    for leaf in jax.tree.leaves((placed.params, placed.model_state)):
        assert leaf.committed
        assert leaf.devices() == {device}


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    twice = {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}
    with pytest.raises(jt.errors.InputError, match=r"two arrays have the path params\.a\.b"):
        jt.save(tmp_path / "m.safetensors", state_of(Network()).replace(params=twice))


def test_a_dtype_that_the_format_does_not_support_is_named(tmp_path: Path) -> None:
    state = state_of(Network())
    odd = state.replace(params={"weight": jnp.zeros(3, jnp.float8_e4m3b11fnuz)})
    with pytest.raises(jt.errors.InputError, match=r"params\.weight has the dtype float8_e4m3b11"):
        jt.save(tmp_path / "model.safetensors", odd)
    assert not list(tmp_path.iterdir())


def test_arrays_of_the_other_byte_order_are_restored(tmp_path: Path) -> None:
    state = state_of(Network()).replace(params={"weight": np.arange(3, dtype=">f4")})
    jt.save(tmp_path / "model.safetensors", state)
    loaded = jt.load(tmp_path / "model.safetensors", state)
    assert loaded.params["weight"].tolist() == [0, 1, 2]


def test_objects_other_than_a_train_state_are_refused(tmp_path: Path) -> None:
    # The type checker of `make test TYPES=1` raises a TypeError first.
    with pytest.raises(
        (jt.errors.InputError, TypeError), match=r"state is a builtins.dict|parameter 'state'"
    ):
        jt.save(tmp_path / "model.safetensors", {"params": {}})
