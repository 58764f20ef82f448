"""Saves and loads a trained model as one safetensors file, which holds only numbers and names."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain._files import read_regular_file, write_atomically
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.training.state import TrainState

# The format's names of element types (https://github.com/huggingface/safetensors#format).
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
# The format's limit for the header, which has names, element types and shapes.
_MAX_HEADER_BYTES = 100_000_000


def save_params(path: str | os.PathLike[str], state: TrainState) -> None:
    """Writes the parameters and the model state (batch statistics, for example) to one file.

    Every library that reads safetensors reads it. Names are paths, such as
    "params.Dense_0.kernel" and "batch_stats.BatchNorm_0.mean"; kernels are [inputs, outputs] as in
    Flax; PRNG keys are stored as their words. The optimizer state is not included; checkpoints of
    `fit` have it.

    Args:
      path: the file, such as "model.safetensors"; it is written completely or not at all.
      state: the state whose `params` and `model_state` are written.

    Raises:
      InputError: an array has a dtype that the format does not support, or two have one name.
      StorageError: the file cannot be written.
    """
    import safetensors.numpy

    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _named(state):
        array = _data(leaf)
        if array.dtype.name not in _DTYPES.values():
            raise InputError(
                f"{name} has the dtype {array.dtype}, which safetensors does not support; expected "
                f"one of {', '.join(sorted(_DTYPES.values()))}"
            )
        if name in arrays:
            raise InputError(f"two arrays have the path {name}; expected names without dots")
        arrays[name] = np.asarray(array, order="C")
    write_atomically(Path(path), safetensors.numpy.save(arrays))


def load_params(path: str | os.PathLike[str], state: TrainState) -> TrainState:
    """Returns a state with the parameters and the model state of a file by `save_params`.

    Args:
      path: the file.
      state: a state of the same model, made by `init_state`; its optimizer state, step, epoch and
        key are kept.

    Raises:
      InputError: the file cannot be read or is not a complete safetensors file, or its names,
        shapes or dtypes differ from those of the model; the first difference is named.
    """
    expected = _named(state)
    path = Path(path)
    found = _read(path, sum(_data(leaf).nbytes for _, leaf in expected))
    # All names and shapes before any array is made.
    for name, leaf in expected:
        like = _data(leaf)
        wanted, got = _describe(like.dtype.name, like.shape), "nothing"
        if name in found:
            dtype = found[name]["dtype"]
            got = _describe(_DTYPES.get(dtype, dtype), found[name]["shape"])
        if got != wanted:
            raise InputError(
                f"{path} has {got} for {name}, where the model has {wanted}; expected a file of "
                "the same model"
            )
    unknown = sorted(found.keys() - {name for name, _ in expected})
    if unknown:
        raise InputError(
            f"{path} has {unknown[0]}, which the model does not have; expected a file of the same "
            "model"
        )
    values = [_restore(found[name]["data"], leaf) for name, leaf in expected]
    count = len(jax.tree.leaves(state.params))
    return state.replace(
        params=jax.tree.unflatten(jax.tree.structure(state.params), values[:count]),
        model_state=jax.tree.unflatten(jax.tree.structure(state.model_state), values[count:]),
    )


def _read(path: Path, array_bytes: int) -> dict[str, Any]:
    """Reads names, dtypes, shapes and bytes of a file for arrays of `array_bytes` in total."""
    import safetensors

    try:
        # A link to the file is fine; a device or a pipe, which would hang, is not.
        content = read_regular_file(path.resolve(strict=True), array_bytes + _MAX_HEADER_BYTES)
        return dict(safetensors.deserialize(content))
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise InputError(
                f"{path} is larger than a file of this model, whose arrays have {array_bytes} "
                "bytes; expected a file of the same model"
            ) from error
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:  # a null character in the path, or a loop of links
        raise InputError(f"{path} cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({error}); expected one written by "
            "save_params"
        ) from error


def _restore(data: bytes | bytearray, like: Any) -> jax.Array:
    """Returns an array of the file with the kind, the dtype and the placement of `like`."""
    words = _data(like)
    value = jnp.asarray(np.frombuffer(data, words.dtype).reshape(words.shape))
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array) and like.committed:
        value = jax.device_put(value, like.sharding)
    return value


def _named(state: TrainState) -> list[tuple[str, Any]]:
    """Returns the arrays with their paths: params first, then the model state."""
    if not isinstance(state, TrainState):
        raise InputError(
            f"state is a {type(state).__name__}; expected a TrainState, made by init_state or fit"
        )
    # Linen's collections have names of their own.
    name = "" if isinstance(state.model_state, Mapping) else "model_state"
    return [*named_arrays(state.params, "params"), *named_arrays(state.model_state, name)]


def _data(leaf: Any) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(dtype: str, shape: Any) -> str:
    return f"{dtype}{list(shape)}"
