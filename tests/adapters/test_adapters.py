"""Linen, NNX and Equinox modules behave alike in a TrainState."""

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
from benchmarks import frameworks

LOSS = jt.losses.cross_entropy


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16)(inputs))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class NnxNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(inputs)))))


class EquinoxNetwork(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(6, 16, key=keys[0])
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch", momentum=0.9)
        self.dropout = eqx.nn.Dropout(0.5)
        self.out = eqx.nn.Linear(16, 3, key=keys[1])

    def __call__(self, inputs, state, *, key=None):
        x, state = self.norm(self.hidden(inputs), state)
        return self.out(self.dropout(jax.nn.relu(x), key=key)), state


MODULES = {
    "Linen": LinenNetwork,
    "NNX": lambda: NnxNetwork(nnx.Rngs(0)),
    "Equinox": lambda: eqx.nn.make_with_state(EquinoxNetwork)(jax.random.key(0)),
    "Equinox without its state": lambda: EquinoxNetwork(jax.random.key(0)),
}


@pytest.fixture(params=MODULES)
def state(request, small_classes) -> jt.TrainState:
    module = MODULES[request.param]()
    return jt.init_state(module, optax.adam(0.01), small_classes.inputs[:1], key=jax.random.key(0))


def statistics(state: jt.TrainState) -> list[np.ndarray]:
    leaves = jax.tree.leaves(state.model_state)
    return [np.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def test_batch_norm_and_dropout_train(state, small_classes) -> None:
    fitted, history = jt.fit(
        state,
        small_classes,
        small_classes,
        loss_fn=LOSS,
        metric_fns={"accuracy": jt.metrics.accuracy},
        epochs=30,
        batch_size=10,
        key=jax.random.key(1),
    )
    assert history["test_accuracy"][-1] > 0.9
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
    pairs = [
        (old, new)
        for old, new in zip(statistics(state), statistics(fitted), strict=True)
        if old.size == 16
    ]
    assert len(pairs) >= 2  # mean and variance
    assert all((old != new).any() for old, new in pairs)


def test_evaluation_uses_neither_dropout_nor_batch_statistics(state, small_classes) -> None:
    first = jt.predict(state, small_classes.inputs)
    other = state.replace(key=jax.random.key(9))
    np.testing.assert_array_equal(first, jt.predict(other, small_classes.inputs))
    # With batch statistics, a prediction would depend on the other examples.
    np.testing.assert_allclose(
        first[:1], jt.predict(state, small_classes.inputs[:1]), rtol=1e-5, atol=1e-6
    )


def test_dropout_depends_on_the_key_and_the_step(state, small_classes) -> None:
    def loss(state):
        return jt.train_step(state, small_classes, LOSS)[1]["loss"].item()

    later = state.replace(step=state.step + 1)
    other = state.replace(key=jax.random.key(9))
    assert loss(state) == loss(state)
    assert len({loss(state), loss(later), loss(other)}) == 3


def test_the_old_state_stays_usable(state, small_classes) -> None:
    first, _ = jt.train_step(state, small_classes, LOSS)
    again, _ = jt.train_step(state, small_classes, LOSS)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_vmap_over_keys_equals_separate_runs(state, small_classes) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: state.replace(key=key))(keys)
    _, losses = jax.vmap(lambda s: jt.train_epoch(s, small_classes, LOSS, batch_size=25))(many)
    for key, found in zip(keys, losses, strict=True):
        _, alone = jt.train_epoch(state.replace(key=key), small_classes, LOSS, batch_size=25)
        np.testing.assert_allclose(found, alone, rtol=1e-4)


def test_a_linen_step_folds_the_step_into_the_dropout_key(small_classes) -> None:
    """The stream "dropout" has the key fold_in(key, step)."""
    state = jt.init_state(
        LinenNetwork(), optax.sgd(0.1), small_classes.inputs[:1], key=jax.random.key(0)
    )
    logits, _ = LinenNetwork().apply(
        {"params": state.params, **state.model_state},
        small_classes.inputs,
        train=True,
        rngs={"dropout": jax.random.fold_in(state.key, 0)},
        mutable=["batch_stats"],
    )
    _, metrics = jt.train_step(state, small_classes, LOSS)
    expected = LOSS(logits, small_classes.targets).mean()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_to_module_returns_the_trained_module(small_classes) -> None:
    inputs = small_classes.inputs

    def trained(module):
        state = jt.init_state(module, optax.adam(0.01), inputs[:1], key=jax.random.key(0))
        return jt.train_epoch(state, small_classes, LOSS, batch_size=10)[0]

    state = trained(MODULES["NNX"]())
    module = jt.to_module(state)
    assert isinstance(module, NnxNetwork)
    module.eval()
    np.testing.assert_allclose(module(inputs), jt.predict(state, inputs), rtol=1e-5, atol=1e-6)

    state = trained(MODULES["Equinox"]())
    module, module_state = jt.to_module(state)
    assert isinstance(module, EquinoxNetwork)
    module = eqx.nn.inference_mode(module)
    outputs, _ = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        inputs, module_state
    )
    np.testing.assert_allclose(outputs, jt.predict(state, inputs), rtol=1e-5, atol=1e-6)

    state = trained(eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0)))
    module = jt.to_module(state)
    np.testing.assert_allclose(
        jax.vmap(module)(inputs), jt.predict(state, inputs), rtol=1e-5, atol=1e-6
    )

    with pytest.raises(jt.errors.InputError, match=r"hold no parameters; use model\.apply"):
        jt.to_module(trained(LinenNetwork()))


@pytest.mark.parametrize("kind", MODULES)
def test_equal_modules_have_equal_apply_functions(small_classes, kind) -> None:
    one, other = (
        jt.init_state(
            MODULES[kind](), optax.sgd(0.1), small_classes.inputs[:1], key=jax.random.key(0)
        )
        for _ in range(2)
    )
    assert one.model.apply == other.model.apply
    assert hash(one.model.apply) == hash(other.model.apply)


def test_four_versions_of_the_mnist_network_have_the_same_losses(digits) -> None:
    """Two epochs from the same parameters."""
    optimizer = jt.optimizers.sgd(0.05)
    losses = {}
    for name, state in frameworks.states(optimizer, digits.train.inputs[:1]).items():
        state, first = jt.train_epoch(state, digits.train, LOSS, batch_size=64)
        _, second = jt.train_epoch(state, digits.train, LOSS, batch_size=64)
        losses[name] = np.concatenate([first, second])
    assert len(losses) == 4
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["Linen"], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_counter_in_an_equinox_state_counts(small_classes) -> None:
    """Also one whose initial value is weakly typed."""

    class Counting(eqx.Module):
        linear: eqx.nn.Linear
        count: eqx.nn.StateIndex

        def __init__(self, key):
            self.linear = eqx.nn.Linear(6, 3, key=key)
            self.count = eqx.nn.StateIndex(jnp.asarray(0))

        def __call__(self, inputs, state):
            return self.linear(inputs), state.set(self.count, state.get(self.count) + 1)

    model = eqx.nn.make_with_state(Counting)(jax.random.key(0))
    state = jt.init_state(model, optax.sgd(0.1), small_classes.inputs[:1], key=jax.random.key(0))
    fitted, _ = jt.fit(state, small_classes, loss_fn=LOSS, epochs=2, batch_size=10)
    module, module_state = jt.to_module(fitted)
    assert module_state.get(module.count) == 10
