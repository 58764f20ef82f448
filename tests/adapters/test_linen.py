"""The adapter of Linen modules computes exactly what Flax computes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jaxtyping import Array

import jaxtrain as jt
from benchmarks import frameworks
from jaxtrain import adapters

INPUTS = jax.random.normal(jax.random.key(3), (8, 4))
TARGETS = jnp.arange(8) % 3
KEY = jax.random.key(0)


class Network(nn.Module):
    features: Any = (16, 3)
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(self.features[0])(x))
        return nn.Dense(self.features[1])(
            nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        )


class Latent(nn.Module):
    """Draws from its own RNG stream, also in `init`."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(3)(x)
        assert not (train and self.is_initializing())
        if train or self.is_initializing():
            x += jax.random.normal(self.make_rng("latent"), x.shape)
        return nn.Dropout(0.5, deterministic=not train)(x)


def start(module: nn.Module, rngs: tuple[str, ...] = ("dropout",)) -> tuple[jt.Model, Any, Any]:
    model, held = adapters.adapt(module, rngs)
    assert held is None
    return model, *model.init(KEY, INPUTS)


def loss(model: jt.Model, params: Any, model_state: Any, key: Array) -> tuple[Array, Any]:
    outputs, model_state = model.apply(params, model_state, INPUTS, train=True, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, TARGETS).mean(), model_state


def equal(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_init_matches_flax_bit_by_bit() -> None:
    _, params, model_state = start(Network())
    expected = jax.jit(Network().init, static_argnames="train")(KEY, INPUTS, train=False)
    assert equal({"params": params, **model_state}, expected)


def test_init_needs_only_shapes() -> None:
    model, params, _ = start(Network())
    shapes = jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)
    assert equal(model.init(KEY, shapes)[0], params)


def test_training_matches_flax_bit_by_bit() -> None:
    model, params, model_state = start(Network())
    found = model.apply(params, model_state, INPUTS, train=True, key=KEY)
    expected = Network().apply(
        {"params": params, **model_state},
        INPUTS,
        train=True,
        rngs={"dropout": KEY},
        mutable=["batch_stats"],
    )
    assert equal(found, expected)
    assert not equal(found[1], model_state)


def test_evaluation_matches_flax_and_keeps_the_state() -> None:
    model, params, model_state = start(Network())
    outputs, after = model.apply(params, model_state, INPUTS, train=False, key=None)
    assert equal(outputs, Network().apply({"params": params, **model_state}, INPUTS))
    assert after is model_state


def test_gradient_steps_reduce_the_loss() -> None:
    model, params, model_state = start(Network())

    @jax.jit
    def step(params, model_state):
        (value, model_state), grads = jax.value_and_grad(loss, argnums=1, has_aux=True)(
            model, params, model_state, KEY
        )
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), model_state, value

    values = []
    for _ in range(20):
        params, model_state, value = step(params, model_state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_dropout_depends_on_the_key_alone() -> None:
    model, params, model_state = start(Network())
    first, again, other = (
        model.apply(params, model_state, INPUTS, train=True, key=jax.random.key(seed))[0]
        for seed in (1, 1, 2)
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_each_rng_stream_has_its_own_key() -> None:
    model, params, model_state = start(Latent(), ("dropout", "latent"))
    latent = jax.random.fold_in(KEY, zlib.crc32(b"latent"))
    expected = Latent().apply(
        {"params": params}, INPUTS, train=True, rngs={"dropout": KEY, "latent": latent}
    )
    assert equal(model.apply(params, model_state, INPUTS, train=True, key=KEY)[0], expected)


def test_a_module_without_the_argument_train_is_called_without_it() -> None:
    module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])
    model, params, model_state = start(module)
    for train, key in ((True, KEY), (False, None)):
        outputs, _ = model.apply(params, model_state, INPUTS, train=train, key=key)
        assert equal(outputs, module.apply({"params": params}, INPUTS))


def test_a_module_without_parameters_has_none() -> None:
    model, params, model_state = start(nn.Sequential([jnp.square]))
    assert (params, model_state) == ({}, {})
    outputs, _ = model.apply({}, {}, INPUTS, train=True, key=KEY)
    assert equal(outputs, INPUTS**2)


def test_another_name_of_the_argument_train_is_refused() -> None:
    class Other(nn.Module):
        def __call__(self, x: Array, training: bool = False) -> Array:
            return x

    with pytest.raises(jt.errors.InputError, match="takes 'training' and not 'train'"):
        adapters.adapt(Other(), ())


def test_equal_modules_have_equal_models() -> None:
    compilations = 0

    def predict(model: jt.Model, params: Any, model_state: Any) -> Array:
        nonlocal compilations
        compilations += 1
        return model.apply(params, model_state, INPUTS, train=False, key=None)[0]

    jitted = jax.jit(predict, static_argnums=0)
    one, other = start(Network(features=(16, 3))), start(Network(features=(16, 3)))
    assert one[0] == other[0]
    assert hash(one[0]) == hash(other[0])
    jitted(*one)
    jitted(*other)
    assert compilations == 1
    for different in (start(Network(rate=0.4))[0], start(Network(), ("dropout", "noise"))[0]):
        assert different != one[0]


def test_an_unhashable_module_equals_itself() -> None:
    module = Network(features=np.array([16, 3]))
    model, params, model_state = start(module)
    assert model == start(module)[0]
    assert model != start(Network(features=np.array([16, 3])))[0]
    assert loss(model, params, model_state, KEY)[0] > 0


@pytest.mark.parametrize("train", [False, True])
def test_missing_batch_statistics_are_named(train) -> None:
    model, params, _ = start(Network())
    with pytest.raises(jt.errors.InputError, match="the model_state that init_state returns"):
        model.apply(params, {}, INPUTS, train=train, key=KEY)


def test_to_module_refuses_linen_modules_and_plain_functions() -> None:
    model, params, model_state = start(Network())
    with pytest.raises(jt.errors.InputError, match="Linen modules hold no parameters"):
        adapters.to_module(model, params, model_state)
    plain = jt.Model(lambda key, inputs: ({}, {}), frameworks.plain_apply)
    with pytest.raises(jt.errors.InputError, match="plain functions"):
        adapters.to_module(plain, params, model_state)


def test_a_model_is_returned_unchanged() -> None:
    model = jt.Model(lambda key, inputs: ({}, {}), frameworks.plain_apply)
    adapted, held = adapters.adapt(model, ())
    assert adapted is model
    assert held is None


@dataclasses.dataclass
class Unhashable:
    def __call__(self) -> None:
        """A data class that is not frozen has no hash."""


def flax_state() -> train_state.TrainState:
    return train_state.TrainState.create(apply_fn=len, params={}, tx=optax.sgd(0.1))


def torch_module() -> Any:
    return pytest.importorskip("torch").nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Network, r"the class Network; expected an instance of it, such as Network\("),
        (lambda: jt.init_state(Network(), optax.sgd(0.1), INPUTS, key=KEY), "state.model"),
        (flax_state, "flax.TrainState; .* pass the module of this state"),
        (torch_module, "torch.Linear; .* PyTorch modules must be rewritten"),
        (lambda: len, "builtin_function_or_method; .* wrap the function in a Model"),
        (lambda: (len, len), r"tuple; .* jaxtrain.Model\(\*model\)"),
        (lambda: (Network(), Network()), "tuple; expected"),
        (lambda: None, "NoneType; expected a Linen, NNX or Equinox module"),
        (lambda: jt.Model(len, None), "Model.apply is None"),
        (lambda: jt.Model(len, Unhashable()), "not hashable"),
        (nn.Module, "the module Module has no __call__"),
    ],
)
def test_objects_other_than_models_are_refused(make, match) -> None:
    with pytest.raises(jt.errors.InputError, match=match):
        adapters.adapt(make(), ())


def test_rng_streams_must_be_a_sequence_of_names() -> None:
    with pytest.raises(jt.errors.InputError, match="expected the names of RNG streams"):
        adapters.adapt(Network(), "dropout")


def test_four_versions_of_the_mnist_network_have_the_same_gradients() -> None:
    images = jax.random.randint(jax.random.key(1), (32, 28, 28), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(32) % 10
    results = {}
    for name, state in frameworks.states(optax.sgd(0.1), images).items():

        def mean_loss(params, state=state):
            outputs, _ = state.model.apply(params, state.model_state, images, train=True, key=KEY)
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            return losses.mean(), outputs

        grads, outputs = jax.jit(jax.grad(mean_loss, has_aux=True))(state.params)
        # NNX stores kernels as [in, out].
        leaves = [leaf.T if name == "NNX" else leaf for leaf in jax.tree.leaves(grads)]
        results[name] = [outputs, *sorted(leaves, key=lambda leaf: (leaf.ndim, leaf.shape))]
    assert len(results) == 4
    for name, arrays in results.items():
        for found, expected in zip(arrays, results["Linen"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_adapters_import_a_framework_when_it_is_used() -> None:
    code = """
import sys, flax.linen
before = set(sys.modules)
from jaxtrain import adapters
adapters.adapt(flax.linen.Dense(3), ())
imported = set(sys.modules) - before
print("equinox" in imported, any(name.endswith(("._nnx", "._equinox")) for name in imported))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]
