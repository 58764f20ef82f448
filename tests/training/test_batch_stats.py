"""update_batch_stats against update_bn of PyTorch, for modules of every library."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from jaxtrain import adapters

INPUTS = np.random.default_rng(0).normal(7, 3, size=(60, 5)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


class Linen(nn.Module):
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4, use_bias=False, kernel_init=lambda *_: jnp.asarray(WEIGHT))(x)
        x = nn.BatchNorm(use_running_average=self.frozen or not train, momentum=0.9)(x)
        return nn.BatchNorm(use_running_average=not train)(nn.relu(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(5, 4, use_bias=False, rngs=rngs)
        self.dense.kernel[...] = jnp.asarray(WEIGHT)
        self.first = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.second = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(self.dense(x))))


class Equinox(eqx.Module):
    dense: eqx.nn.Linear
    first: eqx.nn.BatchNorm
    second: eqx.nn.BatchNorm

    def __init__(self, mode: str):
        dense = eqx.nn.Linear(5, 4, use_bias=False, key=jax.random.key(0))
        self.dense = eqx.tree_at(lambda layer: layer.weight, dense, jnp.asarray(WEIGHT.T))
        self.first = eqx.nn.BatchNorm(4, "batch", mode=mode, momentum=0.9)
        self.second = eqx.nn.BatchNorm(4, "batch", mode=mode, momentum=0.99)

    def __call__(self, x, state):
        x, state = self.first(self.dense(x), state)
        return self.second(jax.nn.relu(x), state)


MODELS = {
    "Linen": Linen,
    "NNX": lambda: Nnx(nnx.Rngs(0)),
    "Equinox ema": lambda: eqx.nn.make_with_state(Equinox)("ema"),
    "Equinox batch": lambda: eqx.nn.make_with_state(Equinox)("batch"),
}


def statistics(state) -> list[np.ndarray]:
    """Returns mean and variance of each layer."""
    layers = adapters.batch_statistics(state.model, state.params, state.model_state)
    leaves = dict(jt.dataset.named_arrays(state.model_state, "model_state"))
    return [leaves[path] / each.scale for each in layers.values() for path in (each.mean, each.var)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("streamed", [False, True])
def test_statistics_are_those_of_pytorch(name: str, streamed: bool) -> None:
    """PyTorch's variances are those of samples, n / (n - 1) as large."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(
        *(torch.nn.Linear(5, 4, bias=False), torch.nn.BatchNorm1d(4)),
        *(torch.nn.ReLU(), torch.nn.BatchNorm1d(4, momentum=0.01)),
    )
    module[0].weight.data = torch.tensor(WEIGHT.T.copy())
    batches = [INPUTS[first : first + 20] for first in (0, 20, 40)]
    torch.optim.swa_utils.update_bn(map(torch.tensor, batches), module)
    state = jt.init_state(MODELS[name](), optax.sgd(0.1), INPUTS[:1], key=jax.random.key(0))
    data = [(batch, np.zeros(20)) for batch in batches] if streamed else jt.Dataset(INPUTS)
    found = jt.update_batch_stats(state, data, batch_size=20)
    expected = [
        (layer.running_mean.numpy(), layer.running_var.numpy() * 19 / 20)
        for layer in (module[1], module[3])
    ]
    for ours, theirs in zip(statistics(found), sum(expected, ()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6)
    targets = np.zeros((60, 4), np.float32)  # the state may be trained further
    jt.train_step(found, (INPUTS, targets), jt.losses.mean_squared_error)


def test_a_layer_that_does_not_learn_its_statistics_keeps_them() -> None:
    def call(module, inputs, *, train, rngs):  # a layer in evaluation mode on purpose
        return module(inputs, train=train)

    state = jt.init_state(
        Linen(frozen=True), optax.sgd(0.1), INPUTS[:1], key=jax.random.key(0), call=call
    )
    found = jt.update_batch_stats(state, jt.Dataset(INPUTS), batch_size=60)
    mean, var, second, _ = statistics(found)
    np.testing.assert_array_equal((mean, var), (np.zeros(4), np.ones(4)))
    hidden = np.maximum(INPUTS @ WEIGHT / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(second, hidden.mean(axis=0), rtol=1e-5)


def test_statistics_are_those_of_the_average() -> None:
    """With those of all examples at once, evaluation equals training mode."""
    data = jt.Dataset(INPUTS, (INPUTS @ WEIGHT > 5).argmax(axis=1))
    optimizer = jt.optimizers.average_parameters(jt.optimizers.sgd(0.5), 0.95)
    state = jt.init_state(Linen(), optimizer, INPUTS[:1], key=jax.random.key(0))
    state, _ = jt.train_epoch(state, data, jt.losses.cross_entropy, batch_size=20)
    found = jt.update_batch_stats(state, data, batch_size=60)
    expected, _ = state.model.apply(
        *(state.evaluation_params, state.model_state, INPUTS), train=True, key=jax.random.key(0)
    )
    np.testing.assert_allclose(jt.predict(found, INPUTS), expected, rtol=1e-4, atol=1e-4)


class Digits(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(64)(images.reshape(len(images), -1) / 16.0)
        return nn.Dense(10)(nn.relu(nn.BatchNorm(use_running_average=not train)(x)))


def test_an_early_average_of_digits_is_better_with_its_own_statistics(digits) -> None:
    """After one epoch: 75 % of the test images are right, and then 86 %."""
    optimizer = jt.optimizers.average_parameters(jt.optimizers.sgd(0.5), 0.98)
    inputs, key = digits.train.inputs[:1], jax.random.key(1)
    state = jt.init_state(Digits(), optimizer, inputs, key=jax.random.key(0))
    state, _ = jt.train_epoch(state, digits.train, jt.losses.cross_entropy, key=key)

    def accuracy(state) -> float:
        metrics = {"accuracy": jt.metrics.accuracy}
        return float(jt.evaluate(state, digits.test, jt.losses.cross_entropy, metrics)["accuracy"])

    assert accuracy(jt.update_batch_stats(state, digits.train, key=key)) > accuracy(state) + 0.08


def test_a_model_without_statistics_is_refused() -> None:
    state = jt.init_state(nn.Dense(4), optax.sgd(0.1), INPUTS[:1], key=jax.random.key(0))
    with pytest.raises(jt.errors.InputError, match="no running statistics of batch norm"):
        jt.update_batch_stats(state, jt.Dataset(INPUTS))


def test_inputs_of_weight_0_may_be_nan() -> None:
    state = jt.init_state(Linen(), optax.sgd(0.1), INPUTS[:1], key=jax.random.key(0))
    weights = (np.arange(len(INPUTS)) != 7).astype(np.float32)
    missing = np.where(weights[:, None] == 0, np.nan, INPUTS)
    found, expected = (
        statistics(jt.update_batch_stats(state, jt.Dataset(x, weights=weights), batch_size=20))
        for x in (missing, np.nan_to_num(missing))
    )
    np.testing.assert_array_equal(found, expected)
