"""A PyTorch module and a JAX model with the same weights, inputs and no dropout."""

from __future__ import annotations

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtrain as jt
from jaxtrain.inspect import port, without_dropout

torch = pytest.importorskip("torch")

IMAGES = np.random.default_rng(0).normal(size=(4, 2, 6, 5)).astype(np.float32)
KEY = jax.random.key(0)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(3, (3, 3), padding=1)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(0.5, deterministic=not train)(linen.relu(x))
        return linen.Dense(2)(x.reshape(x.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(90, 2, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.head(x.reshape(x.shape[0], -1))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=key)
        self.norm = eqx.nn.BatchNorm(3, "batch", momentum=0.9, mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(90, 2, key=key)

    def __call__(self, x, state, key):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.dropout(jax.nn.relu(x), key=key).reshape(-1)), state


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(90, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.nn.functional.dropout(x, 0.5, training=self.training)
        return self.head(x.flatten(1))


MODELS = {
    "Linen": Linen,
    "NNX": lambda: Nnx(nnx.Rngs(0)),
    "Equinox": lambda: eqx.nn.make_with_state(Equinox)(KEY),
}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Torch()


@pytest.mark.parametrize("framework", MODELS)
def test_a_port_has_the_outputs_of_the_module_in_both_modes(framework: str, module) -> None:
    state, inputs, *_ = port(module, MODELS[framework](), IMAGES, jt.optimizers.sgd(0.1), key=KEY)
    assert inputs.shape == ((4, 2, 6, 5) if framework == "Equinox" else (4, 6, 5, 2))
    theirs = module.eval()(torch.tensor(IMAGES)).detach().numpy()
    np.testing.assert_allclose(jt.predict(state, jnp.asarray(inputs)), theirs, atol=1e-6)

    copy = without_dropout(module).train()
    theirs = copy(torch.tensor(IMAGES)).detach().numpy()
    model = without_dropout(state.model)
    ours, _ = model.apply(state.params, state.model_state, inputs, train=True, key=KEY)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    dropped, _ = state.model.apply(state.params, state.model_state, inputs, train=True, key=KEY)
    assert abs(dropped - theirs).max() > 0.1
    assert without_dropout(state.model) == model  # so that it is compiled once


def test_dropout_inside_other_layers_is_left_out() -> None:
    class Attention(linen.Module):
        @linen.compact
        def __call__(self, x, train: bool = False):
            return linen.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not train)(
                x
            )

    state = jt.init_state(Attention(), None, jnp.ones((1, 3, 4)), key=KEY)
    x = jax.random.normal(KEY, (2, 3, 4))
    in_training, _ = without_dropout(state.model).apply(
        state.params, state.model_state, x, train=True, key=KEY
    )
    np.testing.assert_allclose(in_training, jt.predict(state, x), atol=1e-6)

    nn = torch.nn
    layers = [nn.LSTM(4, 4, 2, dropout=0.5), nn.MultiheadAttention(4, 2, dropout=0.5)]
    x = torch.randn(2, 3, 4)
    for layer, inputs in zip(layers, [(x,), (x, x, x)], strict=True):
        copy = without_dropout(layer).train()
        torch.testing.assert_close(copy(*inputs)[0], layer.eval()(*inputs)[0])
    packed = torch.nn.utils.rnn.pack_sequence(list(x))
    for layer in (layers[0], nn.GRU(4, 4, 2, dropout=0.5)):
        copy = without_dropout(layer).train()
        torch.testing.assert_close(copy(packed)[0].data, layer.eval()(packed)[0].data)


def test_the_inputs_keep_their_layout_where_it_fits() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 3), torch.nn.GELU())

    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.gelu(linen.Dense(3)(x.reshape(x.shape[0], -1)), approximate=False)

    state, inputs, *_ = port(module, Dense(), IMAGES, None, key=KEY)
    assert inputs.shape == IMAGES.shape
    given = np.moveaxis(IMAGES, 1, -1)
    state, inputs, *_ = port(module, Dense(), IMAGES, None, key=KEY, model_inputs=given)
    np.testing.assert_array_equal(inputs, given)
    theirs = module(torch.tensor(IMAGES)).detach().numpy()
    np.testing.assert_allclose(jt.predict(state, jnp.asarray(inputs)), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear, linen.Dense(3), IMAGES), "expected a torch.nn.Module"),
        ((torch.nn.Linear(7, 3), linen.Dense(3), IMAGES), "Linear does not take the inputs"),
        ((torch.nn.Linear(5, 3), linen.Dense(4), IMAGES), "has no counterpart in the model"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message: str) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        port(*arguments, None, key=KEY)
