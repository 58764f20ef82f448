"""The file of one checkpoint: safetensors with arrays, a JSON record and a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jaxtyping import PyTree

from jaxtrain._files import read_input
from jaxtrain._placement import is_key, to_words
from jaxtrain._safetensors import DTYPES, MAX_HEADER_BYTES, place, to_host
from jaxtrain.errors import InputError, printable

_FORMAT = 4
_MAX_HISTORY_BYTES = 2**30
_CHECKSUM, _ZEROS = re.compile(rb'"sha256":"([0-9a-f]{64})"'), b"0" * 64


class PartOfEpoch(NamedTuple):
    """What a run that is interrupted within an epoch needs to complete it.

    Attributes:
      step: steps taken in the epoch.
      examples: examples used in the epoch.
      loss: the loss of each step.
      weight: the total weight of the examples of each step.
      sums: the sums of the metrics of the steps' own predictions, a pytree.
      counts: counters of the optimizer, such as skipped steps, at the start of the epoch.
      seconds: time spent in the epoch.
      positions: where each process is in its stream, as JSON; None for data in memory.
    """

    step: int
    examples: int
    loss: np.ndarray
    weight: np.ndarray
    sums: PyTree
    counts: dict[str, int]
    seconds: float
    positions: list[str] | None


class Snapshot(NamedTuple):
    """The content of a checkpoint: a run after some epochs, or within one.

    Attributes:
      epoch: the last completed epoch.
      state: the state after it, or after `part.step` steps of the next epoch.
      history: the columns of the history up to the last completed epoch, [epochs, ...].
      step_losses: the losses of the steps of the completed epochs.
      best: the best state so far, or None.
      monitor: the column by which it is the best, or None.
      part: the steps of the next epoch that are done, or None.
    """

    epoch: int
    state: PyTree
    history: dict[str, np.ndarray]
    step_losses: np.ndarray
    best: PyTree | None = None
    monitor: str | None = None
    part: PartOfEpoch | None = None


class DamagedError(InputError):
    """A file differs from the checkpoint that was written."""


class Arrays(dict[str, np.ndarray]):
    """The arrays of a file by name."""

    def take(self, likes: Iterable[tuple[str, Any]]) -> list[Any]:
        """Returns arrays by name, each with the type and the devices of an array like it."""
        return [place(self[name].copy(), leaf) for name, leaf in likes]


def flatten(
    snapshot: Snapshot, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a snapshot by name and a record of the rest."""
    epoch, state, history, step_losses, best, monitor, part = snapshot
    kind = "none" if best is None else "last" if best is state else "stored"
    trees = {
        "state": state,
        "best": best if kind == "stored" else None,
        "history": [{name: column} for name, column in history.items()],
        "step_losses": step_losses,
    }
    record: dict[str, Any] = {"format": _FORMAT, "epoch": epoch, "columns": list(history)}
    record |= {"best": kind, "monitor": monitor}
    if part is not None:
        record["part"] = part._asdict()
        trees |= {name: record["part"].pop(name) for name in ("loss", "weight", "sums")}
    leaves = {
        name: each for root in trees for name, each in describe_leaves(root, trees[root]).items()
    }
    specs = {name: spec for name, (spec, _) in leaves.items()}
    arrays = {name: leaf for name, (_, leaf) in leaves.items()}
    return arrays, record | {"leaves": specs, "metadata": dict(metadata)}


def to_host_all(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies arrays to the host, also those that are divided over several processes."""
    return {name: to_host(array, name) for name, array in arrays.items()}


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
    return encode(to_host_all(arrays), record)


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the metadata of a file of `encode_arrays`.

    Raises:
      DamagedError, InputError: as in `read_file`.
    """
    record, arrays = read_file(path)
    with malformed_is_damaged(path):
        return {name: array.copy() for name, array in arrays.items()}, record["metadata"]


def read_file(
    path: str | os.PathLike[str], maximum: int | None = None
) -> tuple[dict[str, Any], Arrays]:
    """Returns the record of a checkpoint, and its arrays as views of the file.

    Args:
      path: the file.
      maximum: the largest size to read, in bytes.

    Raises:
      DamagedError: the file differs from what was written.
      InputError: it cannot be read at the moment, or has the format of another version.
    """
    return parse(read_input(path, maximum), path)


def parse(content: bytes, path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """Returns the record and the arrays in the content of a file; see `read_file`."""
    start = 8 + int.from_bytes(content[:8], "little")
    small = start <= min(len(content), MAX_HEADER_BYTES)
    match = _CHECKSUM.search(content, 8, start) if small else None
    if match is None or match[1] != _checksum(content, match.start(1)):
        raise DamagedError(f"{path} has the wrong checksum")
    with malformed_is_damaged(path):
        header = json.loads(content[8:start].decode())
        record = json.loads(header.pop("__metadata__")["record"])
        if record["format"] != _FORMAT:
            raise InputError(
                f"{path} has format {record['format']}, but this version of jaxtrain "
                f"reads {_FORMAT}; use the version that wrote it, or another directory"
            )
        return record, Arrays({n: _view(content, start, entry) for n, entry in header.items()})


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
    read_file(path)


def largest_size(like: PyTree) -> int:
    """Returns the maximum size in bytes of a checkpoint with two states like this one."""
    arrays = sum(to_words(leaf).nbytes for leaf in jax.tree.leaves(like))
    return 2 * arrays + MAX_HEADER_BYTES + _MAX_HISTORY_BYTES


def unflatten(
    record: dict[str, Any],
    arrays: Any,
    like: PyTree,
    sums: PyTree,
    columns: list[str],
    path: Path,
) -> Snapshot:
    """Returns the snapshot in a file.

    All paths, shapes and dtypes are compared before anything is copied. The checksum vouches for
    the rest.

    Args:
      record: what `read_file` has returned.
      arrays: the same.
      like: a state with the structure, shapes, dtypes and placement to restore.
      sums: the same for the sums of an epoch in progress.
      columns: the names of the history's columns.
      path: the file.

    Raises:
      DamagedError: the file lacks something that it records.
      InputError: the state has another structure than `like`, or the sums than `sums`; or the
        history has other columns.
    """
    with malformed_is_damaged(path):
        epoch, specs, step = record["epoch"], record["leaves"], step_of(record)
        likes = {"state": like}
        likes |= {"best": like} if record["best"] == "stored" else {}
        likes |= {"sums": sums} if step else {}
        trees = {root: describe_leaves(root, tree) for root, tree in likes.items()}
        expected = {name: pair for tree in trees.values() for name, pair in tree.items()}
        found = [s for name, s in specs.items() if name.split(".")[0] in ("state", "best", "sums")]
        for theirs, ours in zip_longest(found, [spec for spec, _ in expected.values()]):
            if theirs != ours:
                raise InputError(
                    f"{path} has {theirs or 'nothing more'} where this run has "
                    f"{ours or 'nothing more'}; expected the same model, optimizer and metrics"
                )
        if record["columns"] != columns:
            raise InputError(
                f"{path} belongs to another run: its history has the columns "
                f"{', '.join(record['columns'])}, and that of this run {', '.join(columns)}; use "
                "the same metrics and optimizer, or another checkpoint directory"
            )
        names = describe_leaves("history", [{column: 0} for column in columns])
        history = {column: arrays[name].copy() for column, name in zip(columns, names, strict=True)}
        part = None
        if step:
            loss, weight = (arrays[name].copy() for name in ("loss", "weight"))
            part = PartOfEpoch(**record["part"], loss=loss, weight=weight, sums=None)
        values = {
            root: jax.tree.unflatten(
                jax.tree.structure(likes[root]),
                arrays.take((name, leaf) for name, (_, leaf) in tree.items()),
            )
            for root, tree in trees.items()
        }
        return Snapshot(
            epoch,
            values["state"],
            history,
            arrays["step_losses"].copy(),
            values["state"] if record["best"] == "last" else values.get("best"),
            record["monitor"],
            None if part is None else part._replace(sums=values["sums"]),
        )


@contextlib.contextmanager
def malformed_is_damaged(path: str | os.PathLike[str]) -> Iterator[None]:
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


def describe_leaves(root: str, tree: PyTree) -> dict[str, tuple[str, Any]]:
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
