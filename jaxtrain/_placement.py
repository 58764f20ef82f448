"""Arrays and PRNG keys between the host and the devices of one or several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# The largest block of a divided array that is gathered at once.
_BLOCK_BYTES = 2**22


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def has_values(array: Any) -> bool:
    """Returns whether an array has values here: it is not traced, empty, or on other hosts."""
    if isinstance(array, jax.core.Tracer):  # under jax.jit, `is_fully_addressable` raises
        return False
    return getattr(array, "is_fully_addressable", True) and array.size > 0


def to_words(leaf: Any) -> Any:
    """Returns an array of numbers: the array itself, or the key data of PRNG keys."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


def to_numpy(leaf: Any) -> np.ndarray:
    """Returns the complete array on the host, also if it is spread over several processes."""
    words = to_words(leaf)
    if is_divided(words):
        return multihost_utils.process_allgather(words, tiled=True)
    return np.asarray(words)


def is_divided(leaf: Any) -> bool:
    """Returns whether no process has all values of an array."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def blocks(leaf: Any) -> Iterator[np.ndarray]:
    """Yields the values of an array in C order on the host, those of a divided one by rows.

    So no process has a complete array that is divided over several processes, which all call this.
    """
    words = to_words(leaf)
    if not is_divided(words):
        yield np.asarray(words)
        return
    length, *shape = words.shape
    rows = max(1, _BLOCK_BYTES * length // max(1, words.nbytes))
    parts = [(x.index, np.asarray(x.data)) for x in words.addressable_shards if not x.replica_id]
    for start in range(0, length, rows):
        block = np.zeros((min(rows, length - start), *shape), words.dtype)
        for (along, *others), part in parts:
            first, last, _ = along.indices(length)
            low, high = max(first, start), min(last, start + rows)
            if low < high:
                block[(slice(low - start, high - start), *others)] = part[
                    low - first : high - first
                ]
        # Each value is in one process, and 0 in the others.
        content = block.reshape(-1).view(np.uint8)
        found = multihost_utils.process_allgather(content).sum(axis=0, dtype=np.uint8)
        yield found.view(block.dtype).reshape(block.shape)


def describe_values(leaf: Any) -> str:
    """Describes an array: a number by its value, others by dtype, shape and a digest of the values.

    Two arrays have the same description if their values are the same. Of an array that is divided
    over several processes, the values do not count.
    """
    words = to_words(leaf)
    kind = f"{words.dtype}{list(words.shape)}"
    if is_divided(words):
        return f"{kind} divided by {getattr(words.sharding, 'spec', words.sharding)}"
    if not words.shape:
        return str(np.asarray(words))
    content = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    return f"{kind} with the digest {hashlib.sha256(content.data).hexdigest()[:16]}"


def put(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
    """Returns an array with a sharding; with several processes, all of them pass the same array."""
    if isinstance(leaf, jax.Array):
        if leaf.sharding == sharding:
            return leaf
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    words = np.asarray(to_words(leaf))
    words = words.astype(jax.dtypes.canonicalize_dtype(words.dtype), copy=False)
    array = jax.make_array_from_callback(words.shape, sharding, lambda index: words[index])
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return array


def read_only(tree: Any) -> Any:
    """Returns the arrays of a pytree so that a callback that writes into them gets an error."""

    def view(array: Any) -> np.ndarray:
        found = np.asarray(array).view()
        found.flags.writeable = False
        return found

    return jax.tree.map(view, tree)
