"""Linen, NNX and Equinox modules train alike, and compute what they compute without jaxtrain."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import jaxtrain as jt
from tests.adapters.helpers import (
    DATA,
    INPUTS,
    KEY,
    LOSS,
    assert_close,
    assert_equal,
    evaluate,
    init,
    train,
)
from tests.checkpoint.helpers import assert_identical


class LinenNetwork(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(nn.relu(x)))


class NnxNetwork(nnx.Module):
    def __init__(self, seed: int = 0, rate: float = 0.5) -> None:
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


class EquinoxNetwork(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, seed: int = 0, rate: float = 0.5) -> None:
        keys = jax.random.split(jax.random.key(seed))
        self.hidden = eqx.nn.Linear(4, 16, key=keys[0])
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch", momentum=0.9)
        self.dropout = eqx.nn.Dropout(rate)
        self.out = eqx.nn.Linear(16, 3, key=keys[1])

    def __call__(self, x, state, *, key):
        x, state = self.norm(self.hidden(x), state)
        return self.out(self.dropout(jax.nn.relu(x), key=key)), state


MODULES = {
    "Linen": lambda seed=0, rate=0.5: LinenNetwork(rate),
    "NNX": NnxNetwork,
    "Equinox": eqx.nn.make_with_state(EquinoxNetwork),
}
HOLDING = [kind for kind in MODULES if kind != "Linen"]  # those that hold their parameters


@pytest.fixture(params=MODULES, scope="module")
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def state(kind: str) -> jt.TrainState:
    return init(MODULES[kind]())


@pytest.fixture(scope="module")
def fitted(state: jt.TrainState) -> tuple[jt.TrainState, jt.History]:
    metrics = {"accuracy": jt.metrics.accuracy}
    options = {"epochs": 40, "batch_size": 10, "key": KEY, "callbacks": []}
    return jt.fit(state, DATA, DATA, loss_fn=LOSS, metric_fns=metrics, **options)


def statistics(model_state: Any) -> list[Any]:
    """Returns the mean and the variance of batch norm."""
    return [x for x in jax.tree.leaves(model_state) if x.shape == (16,)]


def call_equinox(module: Any, state: Any, key: Any = KEY) -> tuple[Any, Any]:
    call = jax.vmap(
        lambda x, state, key: module(x, state, key=key),
        in_axes=(0, None, 0),
        out_axes=(0, None),
        axis_name="batch",
    )
    return call(INPUTS, state, jax.random.split(key, len(INPUTS)))


def alone(kind: str, state: jt.TrainState, key: Any = None) -> tuple[Any, list[Any]]:
    """Returns the outputs of the module itself and its statistics; in training, with a key."""
    if kind == "Linen":
        variables = {"params": state.params, **state.model_state}
        if key is None:
            return LinenNetwork().apply(variables, INPUTS), statistics(state.model_state)
        options = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
        outputs, updated = LinenNetwork().apply(variables, INPUTS, **options)
        return outputs, statistics(updated)
    if kind == "NNX":
        module = NnxNetwork()
        nnx.update(module, state.params, state.model_state)
        module.eval()
        if key is not None:
            module.train()
            module.dropout.rngs.key.set_value(jax.random.fold_in(key, 0))
            module.dropout.rngs.count.set_value(jnp.uint32(0))
        return module(INPUTS), [module.norm.mean[...], module.norm.var[...]]
    module = eqx.nn.inference_mode(MODULES[kind]()[0], value=key is None)
    trained = lambda m: (m.hidden, m.norm.weight, m.norm.bias, m.out)  # noqa: E731
    module = eqx.tree_at(trained, module, trained(state.params))
    module_state = state.model_state["state"]
    outputs, module_state = call_equinox(module, module_state, KEY if key is None else key)
    return outputs, list(module_state.get(module.norm.batch_state_index))


def test_a_network_with_batch_norm_and_dropout_learns(state, fitted) -> None:
    after, history = fitted
    assert history["test_accuracy"][-1] > 0.9
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
    changed = zip(statistics(state.model_state), statistics(after.model_state), strict=True)
    assert [(old != new).any() for old, new in changed] == [True, True]


def test_training_computes_what_the_module_computes(kind, state) -> None:
    outputs, after = train(state)
    assert_close((outputs, statistics(after)), alone(kind, state, KEY))
    assert jax.tree.structure(after) == jax.tree.structure(state.model_state)


def test_evaluation_computes_what_the_module_computes_and_keeps_its_state(kind, fitted) -> None:
    outputs, after = evaluate(fitted[0])
    assert_close(outputs, alone(kind, fitted[0])[0])
    assert_identical(after, fitted[0].model_state)
    assert_close(jt.predict(fitted[0], INPUTS[:1]), outputs[:1])  # whatever the other examples


def test_a_step_draws_from_its_own_key_and_keeps_the_old_state(kind, state) -> None:
    losses = []
    for each in (state, state.replace(step=state.step + 1), state.replace(key=jax.random.key(9))):
        key = jax.random.fold_in(each.key, each.step)
        expected = LOSS(alone(kind, each, key)[0], DATA.targets).mean()
        for _ in range(2):
            losses.append(float(jt.train_step(each, DATA, LOSS)[1]["loss"]))
            assert losses[-1] == pytest.approx(float(expected), rel=1e-5)
    assert len(set(losses)) == 3


def test_vmap_over_keys_equals_separate_runs(state) -> None:
    keys = jax.random.split(KEY, 2)
    many = jax.vmap(lambda key: state.replace(key=key))(keys)
    _, metrics = jax.vmap(lambda s: jt.train_step(s, DATA, LOSS))(many)
    for key, found in zip(keys, metrics["loss"], strict=True):
        _, expected = jt.train_step(state.replace(key=key), DATA, LOSS)
        np.testing.assert_allclose(found, expected["loss"], rtol=1e-5)


@pytest.mark.parametrize("kind", HOLDING, scope="module")
def test_to_module_returns_the_trained_module(kind, fitted) -> None:
    module = jt.to_module(fitted[0])
    outputs = module(INPUTS) if kind == "NNX" else call_equinox(*module)[0]
    assert_close(outputs, evaluate(fitted[0])[0])
    again = init(module)
    assert again.model == fitted[0].model
    assert_equal(again.params, fitted[0].params)


def test_equal_modules_have_equal_models(kind, state) -> None:
    other = init(MODULES[kind](seed=1))
    assert other.model == state.model
    assert hash(other.model) == hash(state.model)
    assert jax.tree.structure(other) == jax.tree.structure(state)  # one compiled step
    assert init(MODULES[kind](rate=0.4)).model != state.model


@pytest.mark.parametrize("kind", HOLDING)
def test_init_is_refused_since_the_module_holds_its_parameters(kind) -> None:
    with pytest.raises(jt.errors.InputError, match="holds its own parameters"):
        init(MODULES[kind]()).model.init(KEY, INPUTS)


def plain_apply(params, model_state, x, *, train, key):
    hidden = jax.nn.relu(x @ params[0]["kernel"] + params[0]["bias"][None])
    return hidden @ params[1]["kernel"] + params[1]["bias"][None], model_state


def test_the_same_network_has_the_same_losses_in_every_framework() -> None:
    linen = init(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]))
    layers = [linen.params["layers_0"], linen.params["layers_2"]]
    flax = [nnx.Linear(*layer["kernel"].shape, rngs=nnx.Rngs(0)) for layer in layers]
    equinox = [eqx.nn.Linear(*layer["kernel"].shape, key=KEY) for layer in layers]
    for number, layer in enumerate(layers):
        flax[number].kernel, flax[number].bias = map(nnx.Param, (layer["kernel"], layer["bias"]))
        weights = layer["kernel"].T, layer["bias"]
        equinox[number] = eqx.tree_at(lambda x: (x.weight, x.bias), equinox[number], weights)
    others = [
        nnx.Sequential(flax[0], nnx.relu, flax[1]),
        eqx.nn.Sequential([equinox[0], eqx.nn.Lambda(jax.nn.relu), equinox[1]]),
        jt.Model(lambda key, inputs: (layers, {}), plain_apply),
    ]
    losses = []
    for state in (linen, *map(init, others)):
        losses.append([])
        for _ in range(3):
            state, metrics = jt.train_step(state, DATA, LOSS)
            losses[-1].append(float(metrics["loss"]))
        np.testing.assert_allclose(losses[-1], losses[0], rtol=1e-5)


@dataclasses.dataclass
class Unhashable:
    def __call__(self) -> None:
        """A data class that is not frozen has no hash."""


def flax_state() -> train_state.TrainState:
    return train_state.TrainState.create(apply_fn=len, params={}, tx=optax.sgd(0.1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NnxNetwork, r"the class NnxNetwork; expected an instance of it, such as Nnx"),
        (lambda: init(LinenNetwork()), "state.model"),
        (flax_state, "flax.TrainState; .* pass the module of this state"),
        (lambda: len, "builtin_function_or_method; .* wrap the function in a Model"),
        (lambda: (len, len), r"tuple; .* jaxtrain.Model\(\*model\)"),
        (lambda: (LinenNetwork(), LinenNetwork()), "tuple; expected"),
        (lambda: (EquinoxNetwork(), None), "tuple; expected"),
        (lambda: None, "NoneType; expected a Linen, NNX, Equinox or PyTorch module"),
        (lambda: jt.Model(len, None), "Model.apply is None"),
        (lambda: jt.Model(len, Unhashable()), "not hashable"),
        (lambda: type("Empty", (nn.Module,), {})(), "the module Empty has no __call__"),
        (lambda: nnx.Rngs(0), r"flax.Rngs; expected an nnx.Module"),
        (lambda: MODULES["Equinox"]()[1], "equinox.State; expected an eqx.Module"),
        (lambda: MODULES["Equinox"]()[0], r"comes without its state; expected the pair"),
    ],
)
def test_objects_other_than_models_are_refused(make, match) -> None:
    with pytest.raises(jt.errors.InputError, match=match):
        init(make())


def test_plain_functions_have_no_module() -> None:
    state = init(jt.Model(lambda key, inputs: ({}, {}), plain_apply))
    with pytest.raises(jt.errors.InputError, match="plain functions"):
        jt.to_module(state)


def test_adapters_import_a_framework_when_it_is_used() -> None:
    code = """
import sys, flax.linen, jax, optax
import jaxtrain as jt
before = set(sys.modules)
jt.init_state(flax.linen.Dense(3), optax.sgd(0.1), jax.numpy.ones((1, 2)), key=jax.random.key(0))
imported = set(sys.modules) - before
print("equinox" in imported, any(name.endswith(("._nnx", "._equinox")) for name in imported))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]
