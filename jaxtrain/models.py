"""Flax Linen modules: the models of the tutorials, started as PyTorch starts them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jaxtrain.errors import InputError


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in ±1/√fan_in: the start of weight and bias in `torch.nn.Linear`.

    (PyTorch writes it as `kaiming_uniform_` with a = √5; for weights it is the same bound.)
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class LinearRegression(nn.Module):
    """y = x · weight + bias, both started from a standard normal draw (tutorial T1).

    Attributes:
      features: outputs of each example.
      use_bias: whether there is a bias; without one the line runs through the origin (T3).
    """

    features: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "batch inputs"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Predict; `train` changes nothing here."""
        shape, dtype = (inputs.shape[-1], self.features), jnp.result_type(inputs, jnp.float32)
        weight = self.param("weight", nn.initializers.normal(1.0), shape, dtype)
        outputs = inputs @ weight
        if self.use_bias:
            outputs += self.param("bias", nn.initializers.normal(1.0), (self.features,), dtype)
        return outputs


class FeedForward(nn.Module):
    """Fully connected ReLU network with dropout; the defaults are tutorial T2's, for MNIST.

    Attributes:
      features: width of each layer; the last one holds the logits.
      dropout_rate: share of hidden units dropped in training, after each hidden layer.
      mean: subtracted from the inputs, which are then divided by `std`. Integer inputs are pixels:
        they are divided by 255 first. Floating inputs are taken as they are.
      std: see `mean`. The defaults are MNIST's.
    """

    features: Sequence[int] = (256, 128, 64, 10)
    dropout_rate: float = 0.2
    mean: float = 0.1307
    std: float = 0.3081

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch.

        Args:
          inputs: [batch, ...], flattened to [batch, fan_in]; uint8 pixels or floats in 0 … 1.
          train: whether to drop units; draws from the RNG stream "dropout".

        Raises:
          InputError: there are no layers, or the dropout rate is not in [0, 1).
        """
        if not self.features:
            raise InputError("features is empty; expected the width of at least one layer")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate is {self.dropout_rate}; expected a share in [0, 1)")
        x = inputs.reshape(inputs.shape[0], -1)
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255
        x = (x - self.mean) / self.std
        for width in self.features[:-1]:
            x = nn.relu(_linear(width, x.shape[-1])(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return _linear(self.features[-1], x.shape[-1])(x)


def _linear(features: int, fan_in: int) -> nn.Dense:
    init = uniform_fan_in(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init)
