"""Arrays and PRNG keys in the safetensors format, for checkpoints and exported models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain._placement import is_key, put, to_numpy
from jaxtrain.errors import InputError

# The format's limit for the header, which has names, element types and shapes.
MAX_HEADER_BYTES = 100_000_000
# The format's names of element types (https://github.com/huggingface/safetensors#format).
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def to_host(leaf: Any, name: str) -> np.ndarray:
    """Returns a copy on the host that the format can store.

    Raises:
      InputError: the format does not support the dtype.
    """
    array = np.array(to_numpy(leaf), order="C")
    if array.dtype.name not in DTYPES.values():
        raise InputError(
            f"{name} has the dtype {array.dtype}, which safetensors does not support; expected one "
            f"of {', '.join(sorted(DTYPES.values()))}"
        )
    return array


def place(array: np.ndarray, like: Any) -> Any:
    """Converts an array that was read to the type of `like`, on the devices of `like`."""
    if isinstance(like, (np.ndarray, np.generic)):
        return array
    value: Any = array
    if is_key(like):
        value = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array) and like.committed:
        return put(value, like.sharding)
    return jax.device_put(value)  # `jnp.asarray` would compile a program for each shape
