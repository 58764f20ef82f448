"""Data sets computed from a formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxtrain._arguments import check_finite, check_integer
from jaxtrain.dataset import Dataset


def line(weight: float = 0.7, bias: float = 0.3) -> tuple[Dataset, Dataset]:
    """Returns points on y = weight · x + bias for x = 0, 0.02, … 0.98 (tutorial T1).

    Args:
      weight: slope of the line.
      bias: y at x = 0.

    Returns:
      The first 40 points for training and the last 10 for testing; inputs and targets are
      float32 [examples, 1].

    Example:
      >>> train, test = jt.data.line()
      >>> train, test
      (Dataset(inputs=float32[40,1], targets=float32[40,1]),
       Dataset(inputs=float32[10,1], targets=float32[10,1]))
    """
    check_finite(weight=weight, bias=bias)
    x = np.arange(0, 1, 0.02, dtype=np.float64).astype(np.float32)[:, None]
    y = np.float32(weight) * x + np.float32(bias)
    inputs, targets = jnp.asarray(x), jnp.asarray(y)
    return Dataset(inputs[:40], targets[:40]), Dataset(inputs[40:], targets[40:])


def points_on_line(weight: float = 2.0, bias: float = 0.0) -> Dataset:
    """Returns the three points x = 1, 2, 3 of y = weight · x + bias (tutorial T3).

    Args:
      weight: slope of the line.
      bias: y at x = 0.

    Returns:
      Inputs and targets [3, 1], float64 where JAX has it enabled, else float32.

    Example:
      >>> jt.data.points_on_line().targets.ravel()
      Array([2., 4., 6.], dtype=float32)
    """
    check_finite(weight=weight, bias=bias)
    x = jnp.arange(1.0, 4.0)[:, None]
    return Dataset(x, float(weight) * x + float(bias))


def noisy_line(
    examples: int, weight: float, bias: float, noise: float, *, seed: int, width: float
) -> Dataset:
    """Returns points y = weight · x + bias + noise · n: x uniform in 0 … width, n standard normal.

    Same numbers as `numpy.random.seed(seed)` followed by `rand` and `randn`, as in tutorial T5.

    Args:
      examples: number of points.
      weight: slope of the line.
      bias: y at x = 0.
      noise: standard deviation of the noise.
      seed: seed of NumPy's generator.
      width: the largest x.

    Returns:
      Inputs and targets, float32 [examples, 1].

    Example:
      >>> jt.data.noisy_line(100, weight=3.0, bias=2.0, noise=0.5, seed=0, width=2.0)
      Dataset(inputs=float32[100,1], targets=float32[100,1])
    """
    check_integer(examples, "examples", minimum=1)
    check_integer(seed, "seed", minimum=0, maximum=2**32 - 1)
    check_finite(weight=weight, bias=bias, noise=noise, width=width)
    random = np.random.RandomState(seed)
    x = width * random.rand(examples, 1)
    y = weight * x + bias + noise * random.randn(examples, 1)
    return Dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
