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
from jaxtrain.errors import InputError
from jaxtrain.export import load_torch, to_torch

torch = pytest.importorskip("torch")

from tests.export.test_torch import (  # noqa: E402
    Port,
    Torch,
    assert_same_model,
    outputs_of,
    randomize,
    state_of,
)

IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
FEATURES = IMAGES[:, 0, :, 0].copy()


def flat(x):
    return x.reshape(len(x), -1)


def conv(filters: int = 3, size: int = 3):
    return nn.Conv(filters, (size, size), padding="VALID")


def dense(function: Callable[..., Any]) -> Port:
    """Returns a convolution, a function of it, and a dense layer behind a flatten."""
    return Port(lambda module, images: nn.Dense(2, name="fc")(flat(function(conv()(images)))))


def batch_norm(module, images):
    train = module.is_mutable_collection("batch_stats")
    x = nn.BatchNorm(use_running_average=not train)(flat(conv()(images)))
    return nn.Dense(2, name="fc")(x)


def torch_dense(inputs: int, function: Callable[..., Any], **layers: Any) -> Any:
    """Returns the same in PyTorch; the function also takes the module and the images."""
    layers = {"conv": torch.nn.Conv2d(2, 3, 3), **layers, "fc": torch.nn.Linear(inputs, 2)}
    forward = lambda m, x: m.fc(function(m, m.conv(x.movedim(-1, 1)), x).flatten(1))  # noqa: E731
    return randomize(Torch(forward, **layers))


def upsampled(x):
    y = jax.image.resize(conv(4)(x), (len(x), 4, 4, 4), "nearest")
    return conv(2)(jnp.concatenate([x, y], -1))


def torch_upsampled(m, x, _):
    y = torch.nn.functional.interpolate(m.conv2(x), size=(4, 4))
    return m.conv3(torch.cat([x, y], 1))


def transformer(module, images):
    x = nn.Conv(8, (2, 2), (2, 2))(images).reshape(len(images), -1, 8)
    start = module.param("start", nn.initializers.zeros, (1, 1, 8))
    x = jnp.concatenate([jnp.tile(start, (len(x), 1, 1)), x], 1)
    x = x + module.param("position", nn.initializers.normal(), (1, 10, 8))
    q, k, v = jnp.split(nn.Dense(24)(x).reshape(-1, 10, 6, 4), 3, axis=2)
    x = x + nn.Dense(8)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    return nn.Dense(3)(nn.LayerNorm(epsilon=1e-5)(x)[:, 0])


def torch_transformer(m, x):
    x = m.conv(x.movedim(-1, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([m.start.expand(len(x), -1, -1), x], 1) + m.position
    q, k, v = m.qkv(x).reshape(-1, 10, 6, 4).transpose(1, 2).chunk(3, 1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return m.head(m.norm(x + m.out(y.transpose(1, 2).reshape(x.shape)))[:, 0])


CONV2, CONV3 = torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(3, 4, 3)
EXACT = {
    "concatenated with pooled features": (
        dense(lambda x: jnp.concatenate([flat(x), x.mean((1, 2))], 1)),
        torch_dense(51, lambda m, x, _: torch.cat([x.flatten(1), x.mean((2, 3))], 1)),
    ),
    "two flattened branches": (
        Port(lambda m, x: nn.Dense(2)(jnp.concatenate([flat(conv()(x)), flat(conv(4)(x))], 1))),
        torch_dense(
            112,
            lambda m, x, y: torch.cat([x.flatten(1), m.conv2(y.movedim(-1, 1)).flatten(1)], 1),
            conv2=CONV2,
        ),
    ),
    "concatenated channels": (
        Port(lambda m, x: nn.Dense(2)(flat(jnp.concatenate([conv()(x), conv(4)(x)], -1)))),
        torch_dense(112, lambda m, x, y: torch.cat([x, m.conv2(y.movedim(-1, 1))], 1), conv2=CONV2),
    ),
    "layer norm": (
        dense(lambda x: nn.LayerNorm(epsilon=1e-5)(flat(x))),
        torch_dense(48, lambda m, x, _: m.norm(x.flatten(1)), norm=torch.nn.LayerNorm(48)),
    ),
    "batch norm": (
        Port(batch_norm),
        torch_dense(48, lambda m, x, _: m.norm(x.flatten(1)), norm=torch.nn.BatchNorm1d(48)),
    ),
    "group norm": (
        dense(lambda x: nn.GroupNorm(2, epsilon=1e-5)(conv(4)(x))),
        torch_dense(
            16, lambda m, x, _: m.norm(m.conv2(x)), conv2=CONV3, norm=torch.nn.GroupNorm(2, 4)
        ),
    ),
    "pooled, and a layer with PyTorch's layout": (
        Port(lambda m, x: jt.models.Linear(2)(flat(nn.max_pool(conv()(x), (2, 2), (2, 2))))),
        torch_dense(12, lambda m, x, _: torch.nn.functional.max_pool2d(x, 2)),
    ),
    "an LSTM of flattened frames": (
        dense(lambda x: nn.RNN(nn.OptimizedLSTMCell(5))(flat(x)[None])[0]),
        torch_dense(
            5,
            lambda m, x, _: m.lstm(x.flatten(1)[None])[0][0],
            lstm=torch.nn.LSTM(48, 5, batch_first=True),
        ),
    ),
    "transposed before": (
        dense(lambda x: nn.Dense(3)(x).transpose(0, 3, 1, 2)),
        torch_dense(
            48, lambda m, x, _: m.d(x.movedim(1, -1)).movedim(-1, 1), d=torch.nn.Linear(3, 3)
        ),
    ),
    "attention by channel and by pixel": (
        dense(lambda x: x * nn.Dense(3)(x.mean((1, 2)))[:, None, None] * conv(1, 1)(x)),
        torch_dense(
            48,
            lambda m, x, _: x * m.gate(x.mean((2, 3)))[:, :, None, None] * m.map(x),
            gate=torch.nn.Linear(3, 3),
            map=torch.nn.Conv2d(3, 1, 1),
        ),
    ),
    "upsampled": (
        dense(upsampled),
        torch_dense(8, torch_upsampled, conv2=CONV3, conv3=torch.nn.Conv2d(7, 2, 3)),
    ),
    "vision transformer": (
        Port(transformer),
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
    model, module = EXACT[case]
    assert_same_model(randomize(module), state_of(model, IMAGES), IMAGES)


# What PyTorch flattens depends on how its module is written: two forms, of which the module
# has the second.
DOUBTFUL = {
    "a dense layer on each pixel": (
        dense(lambda x: nn.Dense(3)(x)),
        torch_dense(48, lambda m, x, _: m.d(x.movedim(1, -1)), d=torch.nn.Linear(3, 3)),
    ),
    "and channels first again": (
        dense(lambda x: nn.LayerNorm(epsilon=1e-5)(flat(nn.Dense(3)(x)))),
        torch_dense(
            48,
            lambda m, x, _: m.n(m.d(x.movedim(1, -1)).movedim(-1, 1).flatten(1)),
            d=torch.nn.Linear(3, 3),
            n=torch.nn.LayerNorm(48),
        ),
    ),
    "a layer norm of each pixel": (
        dense(lambda x: nn.LayerNorm(epsilon=1e-5)(x)),
        torch_dense(
            48, lambda m, x, _: m.n(x.movedim(1, -1)).movedim(-1, 1), n=torch.nn.LayerNorm(3)
        ),
    ),
    "a reshape in two steps": (
        dense(lambda x: x.reshape(len(x), 16, 3)),
        torch_dense(48, lambda m, x, _: x),
    ),
    "rows of an image": (
        dense(lambda x: x.reshape(len(x), 4, 12)[:, 0]),
        torch_dense(12, lambda m, x, _: x[:, :, 0].movedim(1, -1)),
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_an_order_in_doubt_is_refused_unless_the_outputs_of_the_module_decide(case: str) -> None:
    model, module = DOUBTFUL[case]
    state = state_of(model, IMAGES)
    message = "^the order of the features that .* takes is in doubt, .*, or the PyTorch module its"
    for convert in (load_torch, to_torch):
        with pytest.raises(InputError, match=message):
            convert(state, module.state_dict())
    assert_same_model(module, state, IMAGES, source=module)


def decoder(module, inputs):
    return nn.Conv(2, (3, 3), name="fc")(nn.Dense(48)(inputs).reshape(-1, 4, 4, 3))


UNKNOWN = {
    # The module takes images of both layouts, so its outputs do not decide.
    "images without a convolution": (
        Port(lambda m, x: nn.Dense(2, name="fc")(flat(x))),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 2)),
        IMAGES,
    ),
    "a part of the features": (dense(lambda x: flat(x)[:, :20]), torch_dense(20, None), IMAGES),
    "swapped axes": (dense(lambda x: x.swapaxes(1, 2)), torch_dense(48, None), IMAGES),
    "features that become an image": (
        Port(decoder),
        Torch(None, d=torch.nn.Linear(6, 48), fc=torch.nn.Conv2d(3, 2, 3)),
        FEATURES,
    ),
    "an image without a convolution behind it": (
        Port(lambda m, x: nn.Dense(12, name="fc")(x).reshape(-1, 2, 2, 3)),
        Torch(None, fc=torch.nn.Linear(6, 12)),
        FEATURES,
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_order_that_is_unknown_is_refused(case: str) -> None:
    model, module, inputs = UNKNOWN[case]
    with pytest.raises(InputError, match=r"^the order of the features that fc takes"):
        load_torch(state_of(model, inputs), module)


def test_functions_are_not_traced_so_a_dense_layer_behind_a_convolution_is_in_doubt() -> None:
    def init(key, inputs):
        return {"a": {"kernel": jnp.zeros((3, 3, 2, 4))}, "b": {"kernel": jnp.zeros((64, 2))}}, {}

    def apply(params, model_state, inputs, *, train, key):
        names, kernel = ("NHWC", "HWIO", "NHWC"), params["a"]["kernel"]
        x = jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "VALID", dimension_numbers=names)
        return flat(x) @ params["b"]["kernel"], model_state

    state = state_of(jt.Model(init, apply), IMAGES)
    tensors = {"conv.weight": torch.ones(4, 2, 3, 3), "fc.weight": torch.ones(2, 64)}
    with pytest.raises(InputError, match="the order of the features that b takes is in doubt"):
        load_torch(state, tensors)
    del tensors["fc.weight"]  # to be converted by hand
    loaded = load_torch(state, tensors, strict=False)
    assert loaded.params["a"]["kernel"].all()


# Comparison of the outputs


def padded(padding: Any) -> Port:
    def function(module, images):
        x = nn.relu(nn.Conv(3, (3, 3), padding=padding, name="first")(images))
        return nn.Dense(2)(nn.Conv(3, (3, 3), padding="VALID", name="second")(x).mean((1, 2)))

    return Port(function)


def torch_padded(last: Callable[..., Any] = lambda x: x) -> Any:
    return randomize(
        Torch(
            lambda m, x: last(m.fc(m.second(torch.relu(m.first(x))).mean((2, 3)))),
            first=torch.nn.Conv2d(2, 3, 3),
            second=torch.nn.Conv2d(3, 3, 3),
            fc=torch.nn.Linear(3, 2),
        )
    )


def test_other_outputs_name_the_first_layer_that_differs() -> None:
    module, state = torch_padded().train(), state_of(padded("SAME"), IMAGES)
    before = copy.deepcopy(module.state_dict())
    message = "^the outputs of the PyTorch module and of the state differ by .* of the largest, fir"
    for convert in (load_torch, to_torch):
        with pytest.raises(InputError, match=message) as caught:
            convert(state, module)
        assert "after first (first); expected the same network" in str(caught.value)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    loaded = load_torch(state, module.state_dict())  # nothing to compare with
    assert to_torch(loaded, module.state_dict()).keys() == before.keys()


def test_layers_in_another_order_are_noticed() -> None:
    layers = {name: torch.nn.Linear(6, 6) for name in ("first", "second")}
    module = randomize(Torch(lambda m, x: m.first(torch.tanh(m.second(x))), **layers))
    state = state_of(Port(lambda m, x: nn.Dense(6)(nn.tanh(nn.Dense(6)(x)))), FEATURES)
    with pytest.raises(InputError, match=r"differ by .*, first after second \("):
        load_torch(state, module)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_that_only_the_state_normalizes_are_compared(dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(dtype)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2), torch.nn.Linear(2, 2))
    state = state_of(jt.models.FeedForward((2, 2)), images)
    with pytest.raises(InputError, match="differ by"):
        load_torch(state, randomize(module))
    module.insert(2, torch.nn.ReLU())
    loaded = load_torch(state, module)
    assert to_torch(loaded, module).keys() == module.state_dict().keys()


def test_a_log_softmax_on_one_side_is_no_difference() -> None:
    module, state = torch_padded(lambda x: torch.log_softmax(x, 1)), state_of(padded(0), IMAGES)
    expected = outputs_of(module, np.moveaxis(IMAGES, -1, 1).copy())
    logits = jt.predict(load_torch(state, module), IMAGES)
    np.testing.assert_allclose(nn.log_softmax(logits), expected, atol=1e-5)
