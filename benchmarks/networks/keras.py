"""The networks as Keras 3 models on JAX, which take normalized images [batch, 28, 28]."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

from typing import Any

import keras
from keras import layers, ops

from benchmarks.problem import Params, Problem


def make(problem: Problem, params: Params) -> keras.Model:
    """Returns the network of a problem with these parameters."""
    images = keras.Input(problem.images.shape[1:])
    if problem.features:
        logits = feed_forward(images, problem.features, problem.dropout_rates)
    elif problem.network == "CNN":
        logits = conv_net(images, problem.dropout_rates)
    else:
        logits = {"ResNet": resnet, "LSTM": row_lstm, "ViT": vit}[problem.network](images)
    model = keras.Model(images, logits)
    _load(model, params)
    return model


def _load(model: keras.Model, params: Params) -> None:
    """Copies the parameters, which are in the order of each layer's variables, by layer."""
    for name, parts in params.items():
        variables = model.get_layer(name).trainable_variables
        for variable, (part, value) in zip(variables, parts.items(), strict=True):
            variable.assign(value.T if part == "weight" else value)


def feed_forward(x: Any, features: tuple[int, ...], dropout_rates: tuple[float, ...]) -> Any:
    """Returns the logits of dense layers, with ReLU and dropout after each hidden one."""
    x = layers.Flatten()(x)
    for layer, rate in enumerate(dropout_rates):
        x = layers.Dense(features[layer], activation="relu", name=f"Dense_{layer}")(x)
        x = layers.Dropout(rate)(x)
    return layers.Dense(features[-1], name=f"Dense_{len(dropout_rates)}")(x)


def conv_net(x: Any, dropout_rates: tuple[float, ...]) -> Any:
    """Returns the logits of two convolutions, max pooling and two dense layers."""
    x = layers.Reshape((28, 28, 1))(x)
    x = layers.Conv2D(32, 3, activation="relu", name="Conv_0")(x)
    x = layers.Conv2D(64, 3, activation="relu", name="Conv_1")(x)
    x = layers.Dropout(dropout_rates[0])(layers.MaxPooling2D(2)(x))
    x = layers.Dense(128, activation="relu", name="Dense_0")(layers.Flatten()(x))
    return layers.Dense(10, name="Dense_1")(layers.Dropout(dropout_rates[1])(x))


def _conv_norm(x: Any, filters: int, size: int, stride: int, index: int) -> Any:
    """Returns the features of a convolution with batch norm."""
    padding = "same"
    if stride > 1:  # Keras would pad the end only
        x, padding = layers.ZeroPadding2D(size // 2)(x), "valid"
    x = layers.Conv2D(filters, size, stride, padding, use_bias=False, name=f"Conv_{index}")(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"BatchNorm_{index}")(x)


def resnet(x: Any) -> Any:
    """Returns the logits of a stem and two residual blocks; the second halves the size."""
    x = layers.ReLU()(_conv_norm(layers.Reshape((28, 28, 1))(x), 16, 3, 1, 0))
    for block, (filters, stride) in enumerate(((16, 1), (32, 2))):
        y = layers.ReLU()(_conv_norm(x, filters, 3, stride, 2 * block + 1))
        y = _conv_norm(y, filters, 3, 1, 2 * block + 2)
        if stride > 1:
            x = _conv_norm(x, filters, 1, stride, 5)
        x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(10, name="Dense_0")(layers.GlobalAveragePooling2D()(x))


def row_lstm(x: Any) -> Any:
    """Returns the logits of an LSTM of 128 units that reads the 28 rows of an image."""
    return layers.Dense(10, name="Dense_0")(layers.LSTM(128, name="LSTM_0")(x))


class Embedding(layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the vectors."""
        self.position = self.add_weight(shape=input_shape[1:], name="position")

    def call(self, x: Any) -> Any:
        """Returns the sum."""
        return x + self.position


def _transformer_block(x: Any, block: int) -> Any:
    """Returns the output of attention with 4 heads, and of a feed-forward layer."""

    def dense(width: int, layer: int) -> layers.Dense:
        return layers.Dense(width, name=f"Dense_{4 * block + layer}")

    def norm(layer: int) -> layers.LayerNormalization:
        return layers.LayerNormalization(epsilon=1e-5, name=f"LayerNorm_{2 * block + layer}")

    qkv = ops.reshape(dense(192, 1)(norm(0)(x)), (-1, 49, 12, 16))
    y = ops.nn.dot_product_attention(*ops.split(qkv, 3, axis=2))
    x += dense(64, 2)(ops.reshape(y, (-1, 49, 64)))
    y = ops.gelu(dense(128, 3)(norm(1)(x)), approximate=False)
    return x + dense(64, 4)(y)


def vit(x: Any) -> Any:
    """Returns the logits of two transformer blocks on 49 patches of 4 × 4 pixels."""
    x = ops.transpose(ops.reshape(x, (-1, 7, 4, 7, 4)), (0, 1, 3, 2, 4))
    x = layers.Dense(64, name="Dense_0")(ops.reshape(x, (-1, 49, 16)))
    x = Embedding(name="Embedding_0")(x)
    for block in range(2):
        x = _transformer_block(x, block)
    x = layers.LayerNormalization(epsilon=1e-5, name="LayerNorm_4")(x)
    return layers.Dense(10, name="Dense_9")(layers.GlobalAveragePooling1D()(x))
