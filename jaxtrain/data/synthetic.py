"""Data sets that are a formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxtrain.data.dataset import Dataset


def line(weight: float = 0.7, bias: float = 0.3) -> tuple[Dataset, Dataset]:
    """Points on y = weight · x + bias for x = 0, 0.02, … 0.98 (tutorial T1).

    Returns:
      The first 40 points for training and the last 10 for testing; inputs and targets are
      float32 [examples, 1].
    """
    x = np.arange(0, 1, 0.02, dtype=np.float64).astype(np.float32)[:, None]
    y = np.float32(weight) * x + np.float32(bias)
    inputs, targets = jnp.asarray(x), jnp.asarray(y)
    return Dataset(inputs[:40], targets[:40]), Dataset(inputs[40:], targets[40:])
