"""Layers behind flattened images are converted exactly or refused; outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.export import load_torch, to_torch

torch = pytest.importorskip("torch")

from tests.export.test_torch import (  # noqa: E402
    assert_same_model,
    outputs_of,
    randomize,
    state_of,
)

IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 2, (3, 6))
FEATURES = IMAGES[:, 0, :, 0].copy()


class Port(nn.Module):
    """A network from a function of the module and the inputs."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return self.function(self, inputs)


class Torch(torch.nn.Module):
    """A network from layers, parameters and a function of the module and the inputs."""

    def __init__(self, function, **layers) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        if inputs.ndim > 2:
            inputs = inputs.movedim(-1, 1)
        return self.function(self, inputs)


def flat(x):
    return x.reshape(len(x), -1)


def conv(filters: int = 3, **options):
    return nn.Conv(filters, (3, 3), padding="VALID", **options)


def pooled(module, images):
    x = conv()(images)
    return nn.Dense(2)(jnp.concatenate([flat(x), x.mean((1, 2))], 1))


def branches(module, images):
    return nn.Dense(2)(jnp.concatenate([flat(conv()(images)), flat(conv(4)(images))], 1))


def channels(module, images):
    return nn.Dense(2)(flat(jnp.concatenate([conv()(images), conv(4)(images)], -1)))


def layer_norm(module, images):
    return nn.Dense(2)(nn.LayerNorm(epsilon=1e-5)(flat(conv()(images))))


def batch_norm(module, images):
    train = module.is_mutable_collection("batch_stats")
    return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(flat(conv()(images))))


def linear(module, images):
    return jt.models.Linear(2)(flat(nn.max_pool(nn.relu(conv()(images)), (2, 2), (2, 2))))


def transposed(module, images):
    return nn.Dense(2)(flat(conv()(images).transpose(0, 3, 1, 2)))


def attention_by_pixel(module, images):
    x = conv()(images)
    x = x * nn.sigmoid(nn.Dense(3)(x.mean((1, 2))))[:, None, None]
    maps = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
    x = x * nn.sigmoid(nn.Conv(1, (3, 3), padding=1)(maps))
    return nn.Dense(2)(flat(x[:, 1:3].mean(1)))


def torch_attention_by_pixel(m, x):
    x = m.conv(x)
    x = x * torch.sigmoid(m.gate(x.mean((2, 3))))[:, :, None, None]
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return m.fc((x * torch.sigmoid(m.map(maps)))[:, :, 1:3].mean(2).flatten(1))


def upsampled(module, images):
    x = conv()(images)
    y = jax.image.resize(conv(4)(x), (len(x), 4, 4, 4), "nearest")
    return nn.Dense(2)(flat(nn.Conv(2, (3, 3), padding="VALID")(jnp.concatenate([x, y], -1))))


def torch_upsampled(m, x):
    x = m.conv(x)
    y = torch.nn.functional.interpolate(m.conv2(x), size=(4, 4))
    return m.fc(m.conv3(torch.cat([x, y], 1)).flatten(1))


def recurrent(module, sequences):
    x = nn.Conv(4, (3,), padding="VALID")(sequences)
    return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(5))(x)[:, -1])


def transformer(module, images):
    x = nn.Conv(8, (2, 2), (2, 2))(images).reshape(len(images), -1, 8)
    start = module.param("start", nn.initializers.zeros, (1, 1, 8))
    x = jnp.concatenate([jnp.tile(start, (len(x), 1, 1)), x], 1)
    x = x + module.param("position", nn.initializers.normal(), (1, 10, 8))
    q, k, v = jnp.split(nn.Dense(24)(x).reshape(-1, 10, 6, 4), 3, axis=2)
    x = x + nn.Dense(8)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    return nn.Dense(3)(nn.LayerNorm(epsilon=1e-5)(x)[:, 0])


def torch_transformer(m, x):
    x = m.conv(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.start.expand(len(x), -1, -1), x], 1) + m.position
    q, k, v = m.qkv(x).reshape(-1, 10, 6, 4).transpose(1, 2).chunk(3, 1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return m.head(m.norm(x + m.out(y.transpose(1, 2).reshape(x.shape)))[:, 0])


def layers(inputs: int, **others: Any) -> dict[str, Any]:
    """Returns a convolution, other layers, and a last dense layer of this many inputs."""
    return {"conv": torch.nn.Conv2d(2, 3, 3)} | others | {"fc": torch.nn.Linear(inputs, 2)}


SECOND = {"conv2": torch.nn.Conv2d(2, 4, 3)}
EXACT = {
    "concatenated with pooled features": (
        pooled,
        Torch(
            lambda m, x: m.fc(torch.cat([m.conv(x).flatten(1), m.conv(x).mean((2, 3))], 1)),
            **layers(51),
        ),
    ),
    "two flattened branches": (
        branches,
        Torch(
            lambda m, x: m.fc(torch.cat([m.conv(x).flatten(1), m.conv2(x).flatten(1)], 1)),
            **layers(112, **SECOND),
        ),
    ),
    "concatenated channels": (
        channels,
        Torch(
            lambda m, x: m.fc(torch.cat([m.conv(x), m.conv2(x)], 1).flatten(1)),
            **layers(112, **SECOND),
        ),
    ),
    "layer norm": (
        layer_norm,
        Torch(
            lambda m, x: m.fc(m.norm(m.conv(x).flatten(1))),
            **layers(48, norm=torch.nn.LayerNorm(48)),
        ),
    ),
    "batch norm": (
        batch_norm,
        Torch(
            lambda m, x: m.fc(m.norm(m.conv(x).flatten(1))),
            **layers(48, norm=torch.nn.BatchNorm1d(48)),
        ),
    ),
    "pooled, and a layer with PyTorch's layout": (
        linear,
        Torch(
            lambda m, x: m.fc(torch.nn.functional.max_pool2d(torch.relu(m.conv(x)), 2).flatten(1)),
            **layers(12),
        ),
    ),
    "transposed before": (transposed, Torch(lambda m, x: m.fc(m.conv(x).flatten(1)), **layers(48))),
    "attention by channel and by pixel": (
        attention_by_pixel,
        Torch(
            torch_attention_by_pixel,
            **layers(12, gate=torch.nn.Linear(3, 3), map=torch.nn.Conv2d(2, 1, 3, padding=1)),
        ),
    ),
    "upsampled": (
        upsampled,
        Torch(
            torch_upsampled,
            **layers(
                8,
                conv2=torch.nn.Conv2d(3, 4, 3),
                conv3=torch.nn.Conv2d(7, 2, 3),
            ),
        ),
    ),
    "vision transformer": (
        transformer,
        Torch(
            torch_transformer,
            start=torch.nn.Parameter(torch.zeros(1, 1, 8)),
            position=torch.nn.Parameter(torch.zeros(1, 10, 8)),
            conv=torch.nn.Conv2d(2, 8, 2, 2),
            qkv=torch.nn.Linear(8, 24),
            out=torch.nn.Linear(8, 8),
            norm=torch.nn.LayerNorm(8),
            head=torch.nn.Linear(8, 3),
        ),
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_features_of_images_are_reordered(case: str) -> None:
    function, module = EXACT[case]
    assert_same_model(randomize(module), state_of(Port(function), IMAGES), IMAGES)


def test_a_convolution_before_a_recurrent_layer() -> None:
    module = Torch(
        lambda m, x: m.fc(m.lstm(m.conv(x).transpose(1, 2))[0][:, -1]),
        conv=torch.nn.Conv1d(2, 4, 3),
        lstm=torch.nn.LSTM(4, 5, batch_first=True),
        fc=torch.nn.Linear(5, 3),
    )
    sequences = IMAGES[:, 0].copy()
    assert_same_model(randomize(module), state_of(Port(recurrent), sequences), sequences)


def last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a network of a convolution, a function and a flattening dense layer."""
    return lambda module, images: nn.Dense(2, name="fc")(flat(function(conv()(images))))


REFUSED = {
    "a dense layer on each pixel": (
        last(lambda x: nn.Dense(3)(x)),
        layers(48, d=torch.nn.Linear(3, 3)),
    ),
    "a layer norm of each pixel": (
        last(lambda x: nn.LayerNorm()(x)),
        layers(48, n=torch.nn.LayerNorm(3)),
    ),
    "a reshape in two steps": (last(lambda x: x.reshape(len(x), 16, 3)), layers(48)),
    "swapped axes": (last(lambda x: x.swapaxes(1, 2)), layers(48)),
    "a part of the features": (last(lambda x: flat(x)[:, :20]), layers(20)),
    "images without a convolution": (
        lambda module, images: nn.Dense(2, name="fc")(flat(images)),
        {"fc": torch.nn.Linear(72, 2)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_whose_order_is_in_doubt_are_refused(case: str) -> None:
    function, parts = REFUSED[case]
    state, module = state_of(Port(function), IMAGES), randomize(Torch(None, **parts))
    message = (
        r"^the order of the features that fc takes is in doubt, .*, or channels={'fc': \.\.\.}"
    )
    for convert in (
        lambda: load_torch(state, module),
        lambda: to_torch(state, module.state_dict()),
    ):
        with pytest.raises(jt.errors.InputError, match=message):
            convert()


def test_features_that_become_an_image_are_refused() -> None:
    def decoder(module, inputs):
        return nn.Conv(2, (3, 3))(nn.Dense(48)(inputs).reshape(-1, 4, 4, 3))

    module = Torch(None, fc=torch.nn.Linear(6, 48), conv=torch.nn.Conv2d(3, 2, 3))
    with pytest.raises(jt.errors.InputError, match="the features that Conv_0 takes is in"):
        load_torch(state_of(Port(decoder), FEATURES), module)


def test_channels_decide_where_the_order_is_in_doubt() -> None:
    def by_pixel(module, images):
        return nn.Dense(2)(nn.LayerNorm(epsilon=1e-5)(flat(nn.Dense(5)(conv()(images)))))

    module = Torch(
        lambda m, x: m.fc(m.norm(m.d(m.conv(x).movedim(1, -1)).movedim(-1, 1).flatten(1))),
        **layers(80, d=torch.nn.Linear(3, 5), norm=torch.nn.LayerNorm(80)),
    )
    expected = outputs_of(randomize(module), IMAGES)
    state = state_of(Port(by_pixel), IMAGES)
    given = {"norm": 5, "fc": 5}
    loaded = load_torch(state, module, channels=given)
    np.testing.assert_allclose(jt.predict(loaded, IMAGES), expected, atol=1e-5)
    returned = to_torch(loaded, module, channels=given)
    np.testing.assert_array_equal(returned["fc.weight"], module.fc.weight.detach())
    with pytest.raises(jt.errors.InputError, match=r"differ by .*, first after norm \(Lay"):
        load_torch(state, module, channels={"norm": 1, "fc": 1})
    for names, message in (
        ({"fc": 3}, "channels has 3 for fc, which has 80 inputs; expected a divisor"),
        (
            {"conv": 3},
            "channels has the layer 'conv'; expected one of the dense and norm",
        ),
    ):
        with pytest.raises(jt.errors.InputError, match=message):
            load_torch(state, module, channels=given | names)


# Comparison of the outputs


class Padded(nn.Module):
    padding: str

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.relu(nn.Conv(3, (3, 3), padding=self.padding, name="first")(images))
        x = nn.Conv(3, (3, 3), padding="VALID", name="second")(x)
        return nn.Dense(2)(x.mean((1, 2)))


def torch_padded(padding: int) -> Any:
    return Torch(
        lambda m, x: m.fc(m.second(torch.relu(m.first(x))).mean((2, 3))),
        first=torch.nn.Conv2d(2, 3, 3, padding=padding),
        second=torch.nn.Conv2d(3, 3, 3),
        fc=torch.nn.Linear(3, 2),
    )


def test_other_outputs_name_the_first_layer_that_differs() -> None:
    module, state = randomize(torch_padded(0)), state_of(Padded("SAME"), IMAGES)
    before = copy.deepcopy(module.state_dict())
    message = "^the outputs of the PyTorch module and of the state differ by .* of the largest, fir"
    for convert in (load_torch, to_torch):
        with pytest.raises(jt.errors.InputError, match=message) as caught:
            convert(state, module.train())
        assert "after first (first); expected the same network" in str(caught.value)
    assert module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    loaded = load_torch(state, module.state_dict())  # nothing to compare with
    assert to_torch(loaded, module.state_dict()).keys() == before.keys()


def test_layers_in_another_order_are_noticed() -> None:
    def ours(module, inputs):
        return nn.Dense(6)(nn.tanh(nn.Dense(6)(inputs)))

    module = Torch(
        lambda m, x: m.first(torch.tanh(m.second(x))),
        first=torch.nn.Linear(6, 6),
        second=torch.nn.Linear(6, 6),
    )
    with pytest.raises(jt.errors.InputError, match=r"differ by .*, first after second \("):
        load_torch(state_of(Port(ours), FEATURES), randomize(module))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_that_only_the_state_normalizes_are_compared(dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(dtype)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2), torch.nn.Linear(2, 2))
    state = state_of(jt.models.FeedForward((2, 2)), images)
    with pytest.raises(jt.errors.InputError, match="differ by"):
        load_torch(state, randomize(module))
    module.insert(2, torch.nn.ReLU())
    loaded = load_torch(state, module)
    assert to_torch(loaded, module).keys() == module.state_dict().keys()


def test_a_log_softmax_on_one_side_is_no_difference() -> None:
    module, state = randomize(torch_padded(0)), state_of(Padded("VALID"), IMAGES)
    forward = module.function
    module.function = lambda m, x: torch.log_softmax(forward(m, x), 1)
    loaded = load_torch(state, module)
    expected = outputs_of(module, IMAGES)
    np.testing.assert_allclose(nn.log_softmax(jt.predict(loaded, IMAGES)), expected, atol=1e-5)


# Tied tensors


def torch_tied() -> Any:
    module = Torch(
        lambda m, x: m.head(m.hidden(m.wte(x))),
        wte=torch.nn.Embedding(9, 4),
        hidden=torch.nn.Linear(4, 4),
        head=torch.nn.Linear(4, 9, bias=False),
    )
    module.head.weight = module.wte.weight
    return randomize(module)


def tied(module, tokens):
    embedding = nn.Embed(9, 4)
    return embedding.attend(nn.Dense(4)(embedding(tokens)))


def untied(module, tokens):
    return nn.Dense(9, use_bias=False)(nn.Dense(4)(nn.Embed(9, 4)(tokens)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("ours", [tied, untied])
def test_tied_tensors_are_one_layer_or_two(ours, strict: bool) -> None:
    module, tokens = torch_tied(), TOKENS[:, :2].copy()
    state = state_of(Port(ours), tokens)
    module.forward = lambda x: module.function(module, x)
    expected = outputs_of(module, tokens)
    loaded = load_torch(state, module, strict=strict)
    np.testing.assert_allclose(jt.predict(loaded, tokens), expected, atol=1e-5)
    module.load_state_dict(to_torch(loaded, module, strict=strict))
    np.testing.assert_allclose(outputs_of(module, tokens), expected, atol=1e-6)


def test_two_arrays_do_not_become_one_tied_tensor() -> None:
    state = state_of(Port(untied), TOKENS)
    with pytest.raises(jt.errors.InputError, match=r"wte.weight and head.weight are one t"):
        to_torch(state, torch_tied())
