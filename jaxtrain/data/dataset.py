"""Dataset: inputs beside their targets, as one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, Shaped

from jaxtrain.errors import InputError

# (images uint8 [examples, 28, 28], labels int32 [examples]), as they are read from files.
Images = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """Examples along the first axis of both arrays; a batch is a small Dataset.

    Being a pytree, it slices, shards, maps and vmaps like any other.

    Attributes:
      inputs: [examples, ...].
      targets: [examples, ...].
    """

    inputs: Shaped[Array, "examples ..."]
    targets: Shaped[Array, "examples ..."]

    @property
    def num_examples(self) -> int:
        """The length of the first axis (`len` of a NamedTuple counts its fields)."""
        return self.inputs.shape[0]

    def take(self, indices: Int[Array, "chosen"]) -> Dataset:
        """The examples at these indices, in their order; indices are not checked."""
        return jax.tree.map(lambda array: jnp.asarray(array)[indices], self)

    def split(self, fraction: float, key: Key[Array, ""]) -> tuple[Dataset, Dataset]:
        """Two disjoint parts that together hold every example once, drawn at random.

        Args:
          fraction: share of the second part, between 0 and 1; rounded to whole examples.
          key: PRNG key of the draw.

        Returns:
          The rest and the held-out part (for validation), each in stored order.

        Raises:
          InputError: the fraction leaves either part without an example, or there are not as many
            inputs as targets.
        """
        check_dataset(self, "dataset")
        examples = self.num_examples
        held_out = round(examples * fraction) if 0 < fraction < 1 else 0
        if not 0 < held_out < examples:
            raise InputError(
                f"fraction is {fraction} of {examples} examples; expected a value between 0 and 1 "
                "that leaves at least one example in each part"
            )
        if not isinstance(key, jax.Array):
            raise InputError(f"key is {key!r}; expected a PRNG key, jax.random.key(0) for instance")
        order = jax.random.permutation(key, examples)
        return (
            self.take(jnp.sort(order[: examples - held_out])),
            self.take(jnp.sort(order[examples - held_out :])),
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Raise unless `dataset` holds as many inputs as targets, and at least one."""
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"{name} is a {type(dataset).__name__}; expected a jaxtrain.Dataset(inputs, targets)"
        )
    for field, array in zip(dataset._fields, dataset, strict=True):
        if not hasattr(array, "shape") or not array.shape:
            raise InputError(
                f"{name}.{field} is {_describe(array)}; expected an array with one entry an "
                "example along its first axis"
            )
    lengths = [array.shape[0] for array in dataset]
    if lengths[0] != lengths[1]:
        raise InputError(
            f"{name} has inputs of shape {dataset.inputs.shape} and targets of shape "
            f"{dataset.targets.shape}; expected first axes of the same length, one entry an example"
        )
    if lengths[0] == 0:
        raise InputError(f"{name} is empty; expected at least one example")


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"of shape {shape}"
