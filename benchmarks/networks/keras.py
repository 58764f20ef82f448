"""The networks as Keras 3 models on JAX, which take normalized images [batch, 28, 28]."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops

from benchmarks.networks import Layer, layers_of
from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> keras.Model:
    """Returns the network of a problem with these parameters."""
    images = keras.Input(problem.images.shape[1:])
    model = keras.Model(images, _apply(layers_of(problem, params), images))
    for name, parts in params.items():  # in the order of each layer's variables
        variables = model.get_layer(name).trainable_variables
        for variable, (part, value) in zip(variables, parts.items(), strict=True):
            variable.assign(value.T if part == "weight" else value)
    return model


def _apply(sequence: Sequence[Layer], x: Any) -> Any:
    for layer in sequence:
        x = FUNCTIONS[layer.kind](x) if layer.kind in FUNCTIONS else _make(layer, x)
    return x


def _make(layer: Layer, x: Any) -> Any:
    name, params = layer.name, layer.params
    if layer.kind == "Residual":
        return layers.Add()([_apply(layer.shortcut, x), _apply(layer.main, x)])
    if layer.kind == "Dropout":
        return layers.Dropout(layer.option)(x)
    if layer.kind == "Dense":
        return layers.Dense(len(params["bias"]), name=name)(x)
    if layer.kind == "BatchNorm":
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)
    if layer.kind == "LayerNorm":
        return layers.LayerNormalization(epsilon=1e-5, name=name)(x)
    if layer.kind == "LSTM":
        return layers.LSTM(128, name=name)(x)
    if layer.kind == "Embedding":
        return Embedding(name=name)(x)
    size, _, _, filters = params["kernel"].shape
    padding = "valid" if layer.option is None else "same"
    if layer.option == 2:  # Keras would pad the end only
        x, padding = layers.ZeroPadding2D(size // 2)(x), "valid"
    options = {"use_bias": "bias" in params, "name": name}
    return layers.Conv2D(filters, size, layer.option or 1, padding, **options)(x)


class Embedding(layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the vectors."""
        self.position = self.add_weight(shape=input_shape[1:], name="position")

    def call(self, x: Any) -> Any:
        """Returns the sum."""
        return x + self.position


def _attention(x: Any) -> Any:
    q, k, v = ops.split(ops.reshape(x, (-1, 49, 12, 16)), 3, axis=2)
    return ops.reshape(ops.nn.dot_product_attention(q, k, v), (-1, 49, 64))


def _patches(x: Any) -> Any:
    x = ops.transpose(ops.reshape(x, (-1, 7, 4, 7, 4)), (0, 1, 3, 2, 4))
    return ops.reshape(x, (-1, 49, 16))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Flatten": lambda x: layers.Flatten()(x),
    "Channel": lambda x: layers.Reshape((28, 28, 1))(x),
    "ReLU": lambda x: layers.ReLU()(x),
    "GELU": lambda x: ops.gelu(x, approximate=False),
    "MaxPool": lambda x: layers.MaxPooling2D(2)(x),
    "Mean": lambda x: ops.mean(x, axis=tuple(range(1, len(x.shape) - 1))),
    "Attention": _attention,
    "Patches": _patches,
}
