"""The file of one checkpoint: safetensors with arrays, a JSON record and a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jaxtyping import PyTree

from jaxtrain._files import read_regular_file
from jaxtrain._placement import is_key, to_words
from jaxtrain._safetensors import DTYPES, MAX_HEADER_BYTES, place, to_host
from jaxtrain.checkpoint._digests import digest
from jaxtrain.errors import InputError, printable

_FORMAT = 2
_ROOTS = ("state", "best_state")
_MAX_HISTORY_BYTES = 2**30
_CHECKSUM, _ZEROS = re.compile(rb'"sha256":"([0-9a-f]{64})"'), b"0" * 64


class PartOfEpoch(NamedTuple):
    """What a run that is interrupted within an epoch needs to complete it.

    Attributes:
      step: steps taken in the epoch.
      examples: examples used in the epoch.
      weights: the total weight of the examples of each step; empty for data in memory.
      skipped: steps that were skipped before the epoch.
      seconds: time spent in the epoch.
      positions: where each process is in its stream, JSON-serializable; None for data in memory.
    """

    step: int
    examples: int
    weights: np.ndarray
    skipped: int
    seconds: float
    positions: list[Any] | None


class Checkpoint(NamedTuple):
    """A run after some epochs, or within one.

    Attributes:
      epoch: the last completed epoch.
      state: the state after it, or after `part.step` steps of the next epoch.
      history: the columns of the history up to the last completed epoch.
      step_losses: the loss of every step up to the state.
      best_state: the state that early stopping would return, or None.
      part: the steps of the next epoch that are done, or None.
    """

    epoch: int
    state: PyTree
    history: dict[str, np.ndarray]
    step_losses: np.ndarray
    best_state: PyTree | None = None
    part: PartOfEpoch | None = None


class DamagedError(InputError):
    """A file differs from the checkpoint that was written."""


def flatten(
    checkpoint: Checkpoint, metadata: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Copies a checkpoint to the host; returns its arrays by name and a record of the rest."""
    epoch, state, history, step_losses, best_state, part = checkpoint
    best = "none" if best_state is None else "last" if best_state is state else "stored"
    leaves = _leaves("state", state) | _leaves("history", [{k: history[k]} for k in history])
    leaves |= _leaves("step_losses", step_losses)
    leaves |= _leaves("best_state", best_state if best == "stored" else None)
    leaves |= _leaves("step_weights", None if part is None else part.weights)
    arrays = {name: to_host(leaf, name) for name, (_, leaf) in leaves.items()}
    record = {"format": _FORMAT, "epoch": epoch, "columns": list(history), "best": best}
    if part is not None:
        record["part"] = {k: v for k, v in part._asdict().items() if k != "weights"}
    specs = {name: spec for name, (spec, _) in leaves.items()}
    return arrays, record | {"leaves": specs, "metadata": dict(metadata)}


def encode(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> bytes:
    """Returns the content of the file for the result of `flatten`."""
    import safetensors.numpy

    texts = {"record": json.dumps(record, allow_nan=False), "sha256": _ZEROS.decode()}
    content = safetensors.numpy.save(arrays, texts)
    # Quotes are escaped in all other texts, so the first match is the entry itself.
    start = content.index(b'"sha256":"' + _ZEROS) + len(b'"sha256":"')
    view = memoryview(content)
    return b"".join([view[:start], _checksum(content, start), view[start + len(_ZEROS) :]])


def encode_arrays(arrays: dict[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """Returns the content of a file of arrays that are not a state, for `read_arrays`."""
    record = {"format": _FORMAT, "leaves": {}, "metadata": dict(metadata)}
    return encode({name: to_host(array, name) for name, array in arrays.items()}, record)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the metadata of a file of `encode_arrays`.

    Raises:
      DamagedError, InputError: as in `read_file`.
    """
    record, arrays = read_file(path)
    return {name: array.copy() for name, array in arrays.items()}, record["metadata"]


def read_file(
    path: Path, maximum: int | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the record of a checkpoint, with state digests, and its arrays as views of the file.

    Args:
      path: the file.
      maximum: the largest size to read, in bytes.

    Raises:
      DamagedError: the file differs from what was written.
      InputError: it cannot be read at the moment, or has the format of another version.
    """
    try:
        content = read_regular_file(path, maximum)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.EFBIG):
            raise DamagedError(f"{path} is not a checkpoint of this run: {reason}") from error
        raise InputError(f"{path} cannot be read ({reason}); fix that and try again") from error
    except (ValueError, MemoryError) as error:  # ValueError: a null character in the path
        raise InputError(f"{path} cannot be read: {error or 'it is too large'}") from error
    start = 8 + int.from_bytes(content[:8], "little")
    small = start <= min(len(content), MAX_HEADER_BYTES)
    match = _CHECKSUM.search(content, 8, start) if small else None
    if match is None or match[1] != _checksum(content, match.start(1)):
        raise DamagedError(f"{path} has the wrong checksum")
    with malformed_is_damaged(path):
        header = json.loads(content[8:start].decode())
        record = json.loads(header.pop("__metadata__")["record"])
        if not (isinstance(record["format"], int) and isinstance(record["metadata"], dict)):
            raise TypeError("its record has entries of the wrong type")
        if record["format"] != _FORMAT:
            raise InputError(
                f"{path} has format {record['format']}, but this version of jaxtrain "
                f"reads {_FORMAT}; use the version that wrote it, or another directory"
            )
        arrays = {name: _view(content, start, entry) for name, entry in header.items()}
        names = [[n for n in record["leaves"] if n.split(".")[0] == root] for root in _ROOTS]
        digests = [digest([arrays[name] for name in tree]) for tree in names if tree]
        return record | {"state_digests": digests}, arrays


def checkpoint_path(directory: str | os.PathLike[str], epoch: int, step: int = 0) -> Path:
    """Returns the path of the checkpoint after an epoch, and some steps of the next one."""
    return Path(directory) / f"epoch-{epoch}{f'-step-{step}' if step else ''}.safetensors"


def step_of(record: Mapping[str, Any]) -> int:
    """Returns how many steps of an incomplete epoch a checkpoint contains."""
    part = record.get("part")
    return 0 if part is None else part["step"]


def verify(path: str | os.PathLike[str]) -> None:
    """Verifies the checksum of a checkpoint, which covers every byte of the file.

    Raises:
      DamagedError: as in `read_file`.
      InputError: the file cannot be read, or has the format of another version.
    """
    read_file(Path(path))


def largest_size(like: PyTree) -> int:
    """Returns the maximum size in bytes of a checkpoint with two states like this one."""
    arrays = sum(to_words(leaf).nbytes for leaf in jax.tree.leaves(like))
    return 2 * arrays + MAX_HEADER_BYTES + _MAX_HISTORY_BYTES


def unflatten(
    record: dict[str, Any],
    arrays: dict[str, np.ndarray],
    like: PyTree,
    columns: list[str],
    path: Path,
) -> Checkpoint:
    """Returns the checkpoint of a file, with the structure and the placement of `like`.

    All paths, shapes and dtypes are compared before anything is copied.

    Raises:
      DamagedError: the file contradicts itself, or its history has other columns.
      InputError: the state has another structure than `like`.
    """
    with malformed_is_damaged(path):
        epoch, best, specs = record["epoch"], record["best"], record["leaves"]
        trees = [_leaves(root, like) for root in _ROOTS[: 1 + (best == "stored")]]
        expected = {name: pair for tree in trees for name, pair in tree.items()}
        found = [spec for name, spec in specs.items() if name.split(".")[0] in _ROOTS]
        for theirs, ours in zip_longest(found, [spec for spec, _ in expected.values()]):
            if theirs != ours:
                raise InputError(
                    f"{path} has {theirs or 'nothing more'} where the model and optimizer have "
                    f"{ours or 'nothing more'}; expected the same model and optimizer"
                )
        for name, words in ((name, to_words(leaf)) for name, (_, leaf) in expected.items()):
            if (arrays[name].dtype.name, arrays[name].shape) != (words.dtype.name, words.shape):
                raise ValueError(f"{name} is not as recorded")
        names = _leaves("history", [{column: 0} for column in columns])
        history = {column: arrays[name] for column, name in zip(columns, names, strict=True)}
        losses = arrays["step_losses"]
        if record["columns"] != columns:
            raise ValueError(f"its history has the columns {record['columns']}")
        vectors = [losses, *history.values()]
        if any(x.ndim != 1 for x in vectors) or len({len(x) for x in vectors[1:]}) > 1:
            raise ValueError("the columns of its history differ in length")
        part = None
        if step_of(record):
            part = PartOfEpoch(**record["part"], weights=arrays["step_weights"].copy())
            if part.step > len(losses) or part.weights.size not in (0, part.step):
                raise ValueError("its incomplete epoch has another number of steps")
        ends = history["epoch"][-1:].tolist() if "epoch" in history else [epoch]
        # A part of the first epoch has no history yet.
        if ends != [epoch] and (ends or part is None):
            raise ValueError("its history ends with another epoch")
    values = [[place(arrays[name].copy(), x) for name, (_, x) in tree.items()] for tree in trees]
    states = [jax.tree.unflatten(jax.tree.structure(like), leaves) for leaves in values]
    best_state = None if best == "none" else states[-1]
    history = {name: column.copy() for name, column in history.items()}
    return Checkpoint(epoch, states[0], history, losses.copy(), best_state, part)


@contextlib.contextmanager
def malformed_is_damaged(path: Path) -> Iterator[None]:
    """Turns the errors that malformed data cause into DamagedError."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise DamagedError(f"{path} is malformed: {reason}") from error


def _checksum(content: bytes, start: int) -> bytes:
    """Returns the SHA-256 of a file, computed with zeros in place of the digest at `start`."""
    view = memoryview(content)
    found = hashlib.sha256(view[:start])
    found.update(_ZEROS)
    found.update(view[start + len(_ZEROS) :])
    return found.hexdigest().encode()


def _view(content: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, (begin, end) = np.dtype(jnp.dtype(DTYPES[entry["dtype"]])), entry["data_offsets"]
    array = np.frombuffer(content, dtype, math.prod(entry["shape"]), start + begin)
    if array.nbytes != end - begin:
        raise ValueError(f"an array has {end - begin} bytes, not {array.nbytes}")
    return array.reshape(entry["shape"])


def _leaves(root: str, tree: PyTree) -> dict[str, tuple[str, Any]]:
    """Returns each leaf and its description by name, such as "state.params.Dense_0.kernel"."""
    found: dict[str, tuple[str, Any]] = {}
    for path, leaf in tree_util.tree_leaves_with_path(tree):
        steps = (tree_util.GetAttrKey(root), *path)
        name = printable(tree_util.keystr(steps, simple=True, separator="."))
        while name in found:
            name += "#"
        dtype = f"key<{jax.random.key_impl(leaf)}>" if is_key(leaf) else to_words(leaf).dtype.name
        found[name] = (f"{tree_util.keystr(path)} of {dtype}{list(np.shape(leaf))}", leaf)
    return found
