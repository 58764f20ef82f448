"""Saves and loads a trained model as one safetensors file, which cannot contain code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain._arguments import check_arguments
from jaxtrain._files import output_path, read_input, write_atomically
from jaxtrain._placement import to_words
from jaxtrain._safetensors import DTYPES, MAX_HEADER_BYTES, place, to_host
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.training.state import TrainState, check_state_type


def save(path: str | os.PathLike[str], state: TrainState) -> None:
    """Writes the parameters and the model state (batch statistics, for example) to one file.

    The parameters are those that evaluation uses: the average, with `average_parameters`.

    Any library that supports safetensors can read the file. Names are paths, such as
    "params.Dense_0.kernel" and "batch_stats.BatchNorm_0.mean", and arrays are as the module has
    them: a kernel of `flax.linen.Dense` is [inputs, outputs], a weight of `jt.models.Linear`
    [outputs, inputs]. PRNG keys are stored as their words. The optimizer state is not included;
    checkpoints of `fit` have it.

    Args:
      path: the file, such as "model.safetensors"; it is written completely or not at all.
      state: the trained state.

    Raises:
      InputError: an array has a dtype that the format does not support, two have the same name,
        or `path` is not a new or regular file.
      StorageError: the file cannot be written.

    Example:
      >>> jt.save("model.safetensors", state)
    """
    import safetensors.numpy

    check_arguments(save, locals(), eager="call it outside")
    check_state_type(state)
    file = output_path(path)
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in _named(state):
        if name in arrays:
            raise InputError(f"two arrays have the path {name}; expected names without dots")
        arrays[name] = to_host(leaf, name)
    write_atomically(file, safetensors.numpy.save(arrays))


def load(path: str | os.PathLike[str], state: TrainState) -> TrainState:
    """Returns a state with the parameters and the model state of a file by `save`.

    Args:
      path: the file.
      state: a state of the same model, made by `init_state` with any optimizer, or with None if the
        state only predicts. Its optimizer state, step, epoch and key are kept, except that an
        average of the parameters starts anew.

    Returns:
      The state with the parameters and model state of the file, on the devices of `state`.

    Raises:
      InputError: the file cannot be read or is not a complete safetensors file, or its names,
        shapes or dtypes differ from those of the model; the first difference is named.

    Example:
      >>> jt.save("model.safetensors", state)
      >>> state = jt.init_state(model, None, train.inputs[:1], key=key)  # needs no optimizer
      >>> state = jt.load("model.safetensors", state)
    """
    check_arguments(load, locals(), eager="call it outside")
    check_state_type(state)
    expected = _named(state)
    found = _read(path, sum(to_words(leaf).nbytes for _, leaf in expected))
    if found and not found.keys() & {name for name, _ in expected}:
        raise InputError(
            f"{path} has none of the names of the model, such as {expected[0][0]}, but "
            f"{min(found)}; expected a file of jaxtrain.save: jaxtrain.export.load_torch loads "
            "weights of PyTorch"
        )
    # All names and shapes are checked before any array is created.
    for name, leaf in expected:
        like = to_words(leaf)
        wanted, got = _describe(like.dtype.name, like.shape), "nothing"
        if name in found:
            dtype = found[name]["dtype"]
            got = _describe(DTYPES.get(dtype, dtype), found[name]["shape"])
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
    params = jax.tree.unflatten(jax.tree.structure(state.params), values[:count])
    return state.replace(
        params=params,
        model_state=jax.tree.unflatten(jax.tree.structure(state.model_state), values[count:]),
    )


def _read(path: str | os.PathLike[str], array_bytes: int) -> dict[str, Any]:
    """Reads names, dtypes, shapes and bytes of a file for arrays of `array_bytes` in total."""
    import safetensors

    content = read_input(path, array_bytes + MAX_HEADER_BYTES)
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({error}); expected one written by "
            "jaxtrain.save"
        ) from error


def _restore(data: bytes | bytearray, like: Any) -> Any:
    """Returns an array of the file with the dtype, the kind and the placement of `like`."""
    words = to_words(like)
    dtype = jnp.dtype(words.dtype.name)  # in the byte order of the file
    return place(np.frombuffer(data, dtype).reshape(words.shape), like)


def _named(state: TrainState) -> list[tuple[str, Any]]:
    """Returns the arrays with their paths: params first, then the model state."""
    # Linen's collections have names of their own.
    name = "" if isinstance(state.model_state, Mapping) else "model_state"
    return [
        *named_arrays(state.evaluation_params, "params"),
        *named_arrays(state.model_state, name),
    ]


def _describe(dtype: str, shape: Any) -> str:
    return f"{dtype}{list(shape)}"
