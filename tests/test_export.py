"""A model's file: what is written is read, and what does not fit is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

import jaxtrain as jt
from tests.test_checkpoints import Bomb, assert_identical


class Network(nn.Module):
    """Batch norm, and parameters in half precision."""

    width: int = 5

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.Dense(self.width, param_dtype=jnp.bfloat16)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(x) * self.param("scale", nn.initializers.ones, ())


def state_of(model: nn.Module, seed: int = 0) -> jt.TrainState:
    return jt.init_state(model, jt.optimizers.adam(0.1), jnp.ones((1, 4)), key=jax.random.key(seed))


def test_a_trained_model_comes_back(tmp_path: Path) -> None:
    data = jt.Dataset(jnp.eye(4)[:3], jnp.arange(3))
    trained, _ = jt.fit(state_of(Network()), data, loss_fn=jt.losses.cross_entropy, epochs=3)
    jt.save_params(tmp_path / "model.safetensors", trained)
    fresh = state_of(Network(), seed=1)
    loaded = jt.load_params(tmp_path / "model.safetensors", fresh)
    assert_identical(loaded.params, trained.params)
    assert_identical(loaded.model_state, trained.model_state)
    assert loaded.model_state["batch_stats"]["BatchNorm_0"]["mean"].any()
    assert_identical((loaded.opt_state, loaded.key), (fresh.opt_state, fresh.key))
    assert loaded.step == 0
    np.testing.assert_array_equal(jt.predict(loaded, data.inputs), jt.predict(trained, data.inputs))


def test_other_libraries_read_it(tmp_path: Path) -> None:
    state = state_of(Network())
    jt.save_params(tmp_path / "model.safetensors", state)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
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


def test_the_first_variable_that_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    jt.save_params(path, state_of(Network()))
    wide = state_of(Network(width=6))
    with pytest.raises(jt.InputError) as raised:
        jt.load_params(path, wide)
    assert str(raised.value) == (
        f"{path} has float32[5] for batch_stats.BatchNorm_0.mean, of which the model has "
        "float32[6]; expected a file of the same model"
    )
    plain = state_of(jt.models.FeedForward((5, 3), mean=0.0, std=1.0))
    with pytest.raises(jt.InputError, match=r"bfloat16\[5\] for params\.Dense_0\.bias, .* float32"):
        jt.load_params(path, plain)
    jt.save_params(path, plain)
    with pytest.raises(jt.InputError, match="has nothing for batch_stats"):
        jt.load_params(path, state_of(Network()))
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**arrays, "params.extra": np.ones(1)}, path)
    with pytest.raises(jt.InputError, match=r"has params\.extra, which the model has not"):
        jt.load_params(path, plain)


def test_what_is_no_file_of_a_model_is_refused(tmp_path: Path) -> None:
    state = state_of(Network())
    path = tmp_path / "model.safetensors"
    jt.save_params(path, state)
    whole = path.read_bytes()
    trace = tmp_path / "executed"
    for content in (
        *(b"", whole[:4], whole[:-1], whole + b"\0", b"\xff" * 64),
        pickle.dumps(Bomb(trace)),
        len(whole).to_bytes(8, "little") + json.dumps({"a": 1}).encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(jt.InputError, match="is no whole safetensors file"):
            jt.load_params(path, state)
    assert not trace.exists()
    with pytest.raises(jt.InputError, match="cannot be read: No such file"):
        jt.load_params(tmp_path / "missing", state)
    with pytest.raises(jt.InputError, match="cannot be read: Is a directory"):
        jt.load_params(tmp_path, state)
    with pytest.raises(jt.StorageError, match="could not be written"):
        jt.save_params(tmp_path / "missing" / "model.safetensors", state)


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    twice = {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}
    with pytest.raises(jt.InputError, match=r"two variables have the path params\.a\.b"):
        jt.save_params(tmp_path / "m.safetensors", state_of(Network()).replace(params=twice))


def test_an_element_type_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    state = state_of(Network())
    odd = state.replace(params={"weight": jnp.zeros(3, jnp.float8_e4m3b11fnuz)})
    with pytest.raises(jt.InputError, match=r"params\.weight has the element type float8_e4m3b11"):
        jt.save_params(tmp_path / "model.safetensors", odd)
    assert not list(tmp_path.iterdir())
