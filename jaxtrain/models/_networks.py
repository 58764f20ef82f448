"""Flax Linen modules of the tutorials, initialized as PyTorch initializes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxtrain._arguments import check_arrays, check_integer, describe
from jaxtrain.errors import InputError
from jaxtrain.models._dropout import Dropout, checked_rate
from jaxtrain.models._linear import Linear


class LinearRegression(nn.Module):
    """y = x · weight + bias, both initialized from a standard normal distribution (tutorial T1).

    Attributes:
      features: outputs per example.
      use_bias: whether to add a bias; without it, the line passes through the origin (T3).

    Example:
      >>> train, test = jt.data.line()
      >>> state = jt.init_state(jt.models.LinearRegression(), optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, jt.losses.mean_squared_error)
    """

    features: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "batch inputs"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Returns the predictions; `train` has no effect."""
        check_integer(self.features, "features", minimum=1, maximum=2**31 - 1)
        if not isinstance(self.use_bias, bool):
            raise InputError(f"use_bias is {describe(self.use_bias)}; expected True or False")
        shape, dtype = (inputs.shape[-1], self.features), jnp.result_type(inputs, jnp.float32)
        weight = self.param("weight", nn.initializers.normal(1.0), shape, dtype)
        # For one input and one output, vectors: XLA:CPU takes 5 times as long for columns.
        outputs = inputs[:, 0] * weight[0, 0] if shape == (1, 1) else inputs @ weight
        if self.use_bias:
            bias = self.param("bias", nn.initializers.normal(1.0), (self.features,), dtype)
            outputs += jnp.broadcast_to(bias[0] if outputs.ndim == 1 else bias, outputs.shape)
        return outputs.reshape(-1, self.features)


class FeedForward(nn.Module):
    """Fully connected ReLU network with dropout; the defaults are those of tutorial T2 on MNIST.

    Attributes:
      features: width of each layer; the last is the number of logits.
      dropout_rate: fraction of hidden units dropped in training, after each hidden layer.
      mean: subtracted from the inputs, which are then divided by `std`: a number, or an array with
        one per input. Integer inputs are pixels and divided by 255 first; floating inputs are not.
        The default is the mean of MNIST. Both belong to the code of the model: an exported program
        has them, and a file of `jt.save` does not.
      std: see `mean`.

    Example:
      >>> model = jt.models.FeedForward((32, 10), dropout_rate=0.1, mean=0.5, std=0.3)
      >>> state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      >>> jt.predict(state, test.inputs).shape
      (16, 10)
    """

    features: Sequence[int] = (256, 128, 64, 10)
    dropout_rate: float = 0.2
    mean: float | Float[Array, "inputs"] = 0.1307
    std: float | Float[Array, "inputs"] = 0.3081

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the logits of a batch.

        Args:
          inputs: [batch, ...], flattened to [batch, fan_in]; uint8 pixels or floats in 0 … 1.
          train: whether to drop units; draws from the RNG stream "dropout".

        Raises:
          InputError: `features` is empty, the dropout rate is not in [0, 1), or `mean` or `std` is
            an array of another size than the inputs of an example.
        """
        if not isinstance(self.features, (tuple, list)) or not self.features:
            raise InputError(
                f"features is {describe(self.features)}; expected the width of at least one layer"
            )
        rate = checked_rate(self.dropout_rate, "dropout_rate")
        x = inputs.reshape(inputs.shape[0], -1)
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255
        mean, std = (_per_input(name, getattr(self, name), x.shape[1]) for name in ("mean", "std"))
        x = (x - mean) / std
        # Flax derives the initial parameters from the key and the names of the layers.
        for layer, width in enumerate(self.features[:-1]):
            x = nn.relu(Linear(width, name=f"Dense_{layer}")(x))
            x = Dropout(rate)(x, train)
        return Linear(self.features[-1], name=f"Dense_{len(self.features) - 1}")(x)


def _per_input(name: str, value: Any, inputs: int) -> Any:
    """Returns a number as it is, and an array as a row of as many numbers as an example has."""
    if isinstance(value, (int, float)):
        return value
    check_arrays(**{name: value})
    if not np.ndim(value):
        return value
    if np.size(value) != inputs:
        raise InputError(
            f"{name} has {np.size(value)} numbers, and an example {inputs} inputs; expected one "
            "number per input, or one for all",
            argument=name,
        )
    return jnp.asarray(value).reshape(1, -1)
