"""Checks of scalar arguments, paths and PRNG keys, on the host, before anything compiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import InputError


def check_integer(value: Any, name: str, *, minimum: int, maximum: int | None = None) -> None:
    """Raises InputError unless `value` is an integer from `minimum` to `maximum`."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise InputError(
            f"{name} is {value!r}; expected an integer of at least {minimum}{upper}", argument=name
        )


def check_key(key: Any, name: str = "key") -> None:
    """Raises InputError unless `key` is a single PRNG key."""
    is_key = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or (key.dtype == jnp.uint32 and key.ndim == 1)  # jax.random.PRNGKey
    )
    if not is_key:
        found = f"an array of {key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise InputError(f"{name} is {found}; expected a PRNG key, such as jax.random.key(0)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape:
        raise InputError(
            f"{name} is a batch of keys of shape {key.shape}; expected a single PRNG key: "
            "use one of them, or apply jax.vmap to the function"
        )


def axis_hint(predictions: tuple[int, ...], targets: tuple[int, ...]) -> str:
    """Returns a hint if two shapes differ by a last axis of length 1 only, else ""."""
    axes = ":" if min(len(predictions), len(targets)) == 1 else "..."
    if predictions == (*targets, 1) and targets:
        return f": give targets[{axes}, None]"
    if targets == (*predictions, 1) and predictions:
        return f": give targets[{axes}, 0]"
    return ""


def checked_path(path: Any, name: str) -> Path:
    """Returns the path of a file or a folder.

    Raises:
      InputError: it is not a path, or contains a null character.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fsdecode(path):
        raise InputError(f"{name} is {path!r}; expected a path", argument=name)
    return Path(os.fsdecode(path))


def check_shard(shard: Any) -> tuple[int, int]:
    """Returns the number of a process and the number of processes.

    Raises:
      InputError: they are not such a pair.
    """
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise InputError(f"shard is {shard!r}; expected a pair (index, count)", argument="shard")
    index, count = shard
    check_integer(count, "shard[1]", minimum=1)
    check_integer(index, "shard[0]", minimum=0, maximum=count - 1)
    return index, count
