"""Saves and loads a trained model as a StableHLO program that contains its parameters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxtrain import parallel
from jaxtrain._arguments import check_arguments
from jaxtrain._files import output_path, read_input, write_atomically
from jaxtrain._versions import current_device
from jaxtrain.dataset import check_inputs, describe_array, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._prediction import (
    prediction_function,
    symbolic_inputs,
    trace_any_number,
)
from jaxtrain.training.state import TrainState

# A SHA-256 at the end of the file, which `jax.export.deserialize` does not read. Without it, most
# files with a changed byte would load, and predict something else.
DIGEST_BYTES = 32


def stablehlo(
    state: TrainState,
    path: str | os.PathLike[str],
    inputs: PyTree,
    *,
    preprocess: Callable[[PyTree], PyTree] | None = None,
    postprocess: Callable[[Any], Any] | None = None,
    platforms: str | Sequence[str] = ("cpu", "cuda"),
) -> None:
    """Writes a model to one file that runs with JAX alone, on any number of examples.

    The file contains the program of `predict` with the parameters as constants. `load_stablehlo`
    reads it, and so does `jax.export` in a process without jaxtrain, Flax and the model's code.

    Args:
      state: the trained state.
      path: the file, such as "model.stablehlo"; it is written completely or not at all.
      inputs: array or pytree of arrays with the shapes and dtypes of what the file will be given,
        [examples, ...]; one example is enough, and the values are not used.
      preprocess: function in JAX from these inputs to those of the model, such as a normalization.
      postprocess: function in JAX of the outputs, such as `jax.nn.softmax`.
      platforms: where the file can run, of "cpu", "cuda", "rocm" and "tpu".

    Raises:
      InputError: the model does not take the inputs or only a fixed number of examples, a platform
        is unknown, or `path` is not a new or regular file.
      StorageError: the file cannot be written.

    Example:
      >>> jt.export.stablehlo(state, "model.stablehlo", test.inputs[:1], postprocess=jax.nn.softmax)

      In another process, without jaxtrain:

      >>> from jax import export
      >>> with open("model.stablehlo", "rb") as file:
      ...     exported = export.deserialize(bytearray(file.read()))
      >>> exported.call(test.inputs).shape
      (16, 10)
    """
    from jax import export

    known = ("cpu", "cuda", "rocm", "tpu")
    check_arguments(stablehlo, locals(), eager="call it outside")
    platforms = (platforms,) if isinstance(platforms, str) else platforms
    if not platforms or not all(each in known for each in platforms):
        raise InputError(
            f"platforms is {platforms!r}; expected some of {', '.join(known)}",
            argument="platforms",
        )
    file = output_path(path)
    predict = prediction_function(state, preprocess, postprocess)
    specs = symbolic_inputs(inputs, "batch")

    def trace(function: Callable[[PyTree], Any]) -> tuple[export.Exported, bytes]:
        exported = export.export(jax.jit(function), platforms=platforms)(specs)
        return exported, bytes(exported.serialize())

    with parallel.without_mesh():
        exported, content = trace_any_number(trace, predict, specs, inputs)
    examples = exported.in_avals[0].shape[0]
    for aval in exported.out_avals:
        if aval.shape[:1] != (examples,):
            raise InputError(
                f"the model returns {describe_array(aval)} for "
                f"{describe_array(exported.in_avals[0])}; expected one output per example, for any "
                "number of examples"
            )
    write_atomically(file, content + hashlib.sha256(content).digest())


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[[PyTree], Any]:
    """Returns the function that a file by `stablehlo` contains.

    Nothing but XLA programs can be in the file, and no Python code.

    Args:
      path: the file.

    Returns:
      `predict(inputs) -> outputs`, of arrays [examples, ...]. It compiles once per number of
      examples, and raises InputError for inputs of another structure, shape or dtype than those
      that the file was exported with.

    Raises:
      InputError: the file cannot be read, is incomplete or damaged, or is not for this platform.

    Example:
      >>> jt.export.stablehlo(state, "model.stablehlo", test.inputs[:1])
      >>> predict = jt.export.load_stablehlo("model.stablehlo")
      >>> predict(test.inputs[:7]).shape
      (7, 10)
    """
    from jax import export

    check_arguments(load_stablehlo, locals(), eager="call it outside")
    content = _read(path)
    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:  # of a later version of JAX
        raise InputError(
            f"JAX {jax.__version__} cannot load {path}: {error}; expected a file of an earlier "
            "version: update JAX, or export the model again"
        ) from error
    here = current_device().platform
    if not {here, *(("cuda", "rocm") if here == "gpu" else ())} & set(exported.platforms):
        raise InputError(
            f"{path} is for {' and '.join(exported.platforms)}, and JAX runs on {here} here; "
            "expected a file for this platform: export it with platforms=..."
        )
    (expected,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    call = jax.jit(exported.call)

    def predict(inputs: PyTree) -> Any:
        check_inputs(inputs)
        _check_like(inputs, expected, path)
        return call(inputs)

    return predict


def _read(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file without its digest, which is checked."""
    content = read_input(path)
    content, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise InputError(
            f"{path} is cut short, damaged or another kind of file (its checksum does not match); "
            "expected a complete file by jaxtrain.export.stablehlo: copy or export it again"
        )
    return content


def _check_like(inputs: PyTree, expected: PyTree, path: str | os.PathLike[str]) -> None:
    """Raises InputError unless inputs have the structure, shapes and dtypes that a file expects."""
    ours: Any = jax.tree.structure(inputs)
    theirs: Any = jax.tree.structure(expected)
    if ours != theirs:
        raise InputError(
            f"inputs has the structure {ours}; expected that of {path}, {theirs}", argument="inputs"
        )
    pairs = zip(named_arrays(inputs, "inputs"), jax.tree.leaves(expected), strict=True)
    for (name, leaf), aval in pairs:
        if leaf.shape[1:] != aval.shape[1:] or jnp.result_type(leaf) != aval.dtype:
            raise InputError(
                f"{name} has {describe_array(leaf)}, where {path} takes {describe_array(aval)}; "
                "expected the shape and dtype that the model was exported with",
                argument="inputs",
            )
