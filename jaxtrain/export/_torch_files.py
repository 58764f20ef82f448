"""Reads a state dict of PyTorch, from memory or from a file that cannot run code."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain._files import read_input
from jaxtrain._safetensors import DTYPES, MAX_HEADER_BYTES
from jaxtrain.errors import InputError, first_line

# The first bytes of the two formats of torch.save: an archive, and a pickle.
_TORCH = (b"PK\x03\x04", b"\x80")


class StateDict(NamedTuple):
    """The tensors of a state dict.

    Attributes:
      tensors: by name.
      tied: names of those that share the memory of another, with the name of that one.
    """

    tensors: dict[str, np.ndarray]
    tied: dict[str, str]


def read_state_dict(source: Any) -> StateDict:
    """Returns the tensors of a state dict by name.

    Args:
      source: a state dict, a module of PyTorch, or a file.

    Raises:
      InputError: it is something else, or a file that cannot be read.
      MissingExtraError: a file of torch.save is given, and PyTorch is not installed.
    """
    if isinstance(source, str | os.PathLike):
        found = _read_file(source)
        name = os.fspath(source)
    else:
        is_module = hasattr(source, "state_dict") and not isinstance(source, type)
        found = source.state_dict() if is_module else source
        name = "state_dict"
    if isinstance(found, Mapping) and any(str(key).startswith("params.") for key in found):
        raise InputError(
            f"{name} has the names of a model of jaxtrain; expected a state dict of PyTorch: load "
            "a file of save by jaxtrain.load"
        )
    if not isinstance(found, Mapping):
        raise InputError(
            f"{name} is a {type(found).__name__}; expected a state dict of PyTorch, as "
            "module.state_dict() returns, or a file of one"
        )
    tensors: dict[str, np.ndarray] = {}
    tied: dict[str, str] = {}
    memory: dict[Any, str] = {}
    for key, value in found.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise InputError(
                f"{name} has a value of type {type(value).__name__} for {key!r}; expected a tensor "
                "for each name: pass the entry that is the model's state dict"
            )
        address = _address(value)
        first = memory.setdefault(address, str(key)) if address else str(key)
        if first != str(key):
            tied[str(key)] = first
        try:
            tensors[str(key)] = to_array(value)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{key} of {name} cannot be read ({first_line(error)}); expected a dense tensor "
                "of a dtype of NumPy, or bfloat16"
            ) from error
    return StateDict(tensors, tied)


def _address(tensor: Any) -> Any:
    """Returns what two tensors of PyTorch with the same memory have in common, else None."""
    try:
        pointer = tensor.data_ptr()
    except (AttributeError, RuntimeError, NotImplementedError):  # an array; no dense tensor
        return None
    return (pointer, tensor.shape, tensor.stride(), tensor.dtype) if pointer else None


def to_array(tensor: Any) -> np.ndarray:
    """Returns a tensor of PyTorch, or an array, as an array of NumPy."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import ml_dtypes
        import torch

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _read_file(path: str | os.PathLike[str]) -> Any:
    """Returns the tensors of a file, whose format its content tells, whatever its name."""
    import safetensors

    content = read_input(path)
    header_bytes, is_torch = int.from_bytes(content[:8], "little"), content.startswith(_TORCH)
    is_safetensors = header_bytes <= MAX_HEADER_BYTES and content[8:9] == b"{"
    if not is_safetensors and not is_torch:
        raise InputError(
            f"{path} is not a file of PyTorch weights (it starts with {content[:20]!r}); expected "
            "one written by torch.save or safetensors: copy or download it again"
        )
    if not is_safetensors:
        with needs_extra("torch"):
            import torch
    try:
        if not is_safetensors:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecated storage types in old files
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        entries = dict(safetensors.deserialize(content))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} contains objects other than tensors, which could run code, or is damaged; "
            "expected a file written by torch.save(module.state_dict(), path)"
        ) from error
    except Exception as error:  # PyTorch and safetensors raise different types
        raise InputError(
            f"{path} is not a complete file of weights ({first_line(error)}); expected one written "
            "by torch.save or safetensors: copy or download it again"
        ) from error
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{name} of {path} has the dtype {entry['dtype']}, which is not supported; "
                f"expected one of {', '.join(DTYPES)}: convert it in PyTorch"
            )
    # Sorted, since the file does not preserve the order of the state dict.
    return {
        name: np.frombuffer(entry["data"], jnp.dtype(DTYPES[entry["dtype"]])).reshape(
            entry["shape"]
        )
        for name, entry in sorted(entries.items())
    }
