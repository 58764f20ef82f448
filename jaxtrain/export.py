"""A trained model in one file for others to use: safetensors, which holds numbers and names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import InputError
from jaxtrain.folders import write_whole
from jaxtrain.state import TrainState

# The format's names of element types (https://github.com/huggingface/safetensors#format).
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def save_params(path: str | os.PathLike[str], state: TrainState) -> None:
    """Write a model's parameters and other variables (`batch_stats`, say) to one file.

    Any library that reads safetensors reads it: names are paths, "params.Dense_0.kernel" for
    instance, kernels [inputs, outputs] as in Flax. The optimizer's state is left out; checkpoints
    of `fit` have it.

    Args:
      path: the file, model.safetensors for instance; written whole or not at all.
      state: whose params and model_state to write.

    Raises:
      InputError: a variable has an element type that the format lacks.
      StorageError: the file cannot be written.
    """
    import safetensors.numpy

    arrays = {}
    for name, leaf in _named(state):
        if jnp.asarray(leaf).dtype.name not in _DTYPES.values():
            raise InputError(
                f"{name} has the element type {jnp.asarray(leaf).dtype}, which safetensors has "
                f"not; expected one of {', '.join(sorted(_DTYPES.values()))}"
            )
        if name in arrays:
            raise InputError(f"two variables have the path {name}; expected names without dots")
        arrays[name] = np.asarray(leaf, order="C")
    write_whole(Path(path), safetensors.numpy.save(arrays))


def load_params(path: str | os.PathLike[str], state: TrainState) -> TrainState:
    """A state with the parameters and other variables of a file that `save_params` wrote.

    Args:
      path: the file.
      state: of the same model, as `init_state` makes it; its optimizer state, step and key stay.

    Returns:
      The state with the file's variables.

    Raises:
      InputError: the file cannot be read or is no whole safetensors file, or its names, shapes or
        element types are not the model's; the first that differs is named.
    """
    import safetensors

    expected = _named(state)
    path = Path(path)
    try:
        found: dict[str, Any] = dict(safetensors.deserialize(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is no whole safetensors file ({error}); expected one that save_params wrote"
        ) from error
    values = []
    for name, leaf in expected:
        wanted = _describe(jnp.asarray(leaf).dtype.name, jnp.shape(leaf))
        held = found.get(name)
        got = "nothing"
        if held is not None:
            got = _describe(_DTYPES.get(held["dtype"], held["dtype"]), held["shape"])
        if held is None or got != wanted:
            raise InputError(
                f"{path} has {got} for {name}, of which the model has {wanted}; expected a file of "
                "the same model"
            )
        dtype = jnp.dtype(_DTYPES[held["dtype"]])
        value = jnp.asarray(np.frombuffer(held["data"], dtype).reshape(held["shape"]))
        if isinstance(leaf, jax.Array) and leaf.committed:
            value = jax.device_put(value, leaf.sharding)
        values.append(value)
    names = {name for name, _ in expected}
    more = next((name for name in sorted(found) if name not in names), None)
    if more is not None:
        raise InputError(
            f"{path} has {more}, which the model has not; expected a file of the same model"
        )
    variables = jax.tree.unflatten(jax.tree.structure(_variables(state)), values)
    params = variables.pop("params")
    return state.replace(params=params, model_state=variables)


def _variables(state: TrainState) -> dict[str, Any]:
    if not isinstance(state, TrainState):
        raise InputError(
            f"state is a {type(state).__name__}; expected a TrainState: init_state makes one, fit "
            "returns one"
        )
    return {"params": state.params, **state.model_state}


def _named(state: TrainState) -> list[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(_variables(state))
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def _describe(dtype: str, shape: Any) -> str:
    return f"{dtype}{list(shape)}"
