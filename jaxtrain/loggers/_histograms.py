"""Histograms of the parameters of a state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.dataset import named_arrays
from jaxtrain.training.state import TrainState

_BINS = 30  # as many as TensorBoard shows


class Histogram(NamedTuple):
    """A histogram of one array.

    Attributes:
      name: the array's name, as in `save_params`.
      values: its elements, [elements].
      counts: elements per bin, [bins].
      edges: limits of the bins, [bins + 1].
    """

    name: str
    values: np.ndarray
    counts: np.ndarray
    edges: np.ndarray


def histograms(state: TrainState) -> Iterator[Histogram]:
    """Yields a histogram of each array of the parameters.

    Arrays without finite elements are left out, and so are those that are divided over several
    processes, of which process 0 has only a part.
    """
    for name, leaf in named_arrays(state.params, "params"):
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        values = np.asarray(leaf).astype(np.float64).ravel()
        values = values[np.isfinite(values)]
        if len(values):
            counts, edges = np.histogram(values, bins=_BINS)
            yield Histogram(name, values, counts, edges)
