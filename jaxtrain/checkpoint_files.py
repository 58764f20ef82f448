"""One checkpoint on disk: arrays that Orbax writes, a record in JSON, and the sums of its files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain.errors import InputError
from jaxtrain.state import TrainState

_FORMAT = 1
_BLOCK_BYTES = 4096
_ARRAYS, _RECORD, _SUMS = "arrays", "record.json", "SHA256SUMS"
_SUM_LINE = re.compile(r"^([0-9a-f]{64})  (.+)$", re.MULTILINE)


class Checkpoint(NamedTuple):
    """A run between two epochs.

    Attributes:
      epoch: the epochs behind it.
      state: the state after them.
      history: their history, arrays by name.
      best_state: the state to return if early stopping ends the run here, or None.
    """

    epoch: int
    state: TrainState
    history: dict[str, np.ndarray]
    best_state: TrainState | None = None


class DamagedError(InputError):
    """A checkpoint is not what was written."""


def write_checkpoint(
    folder: Path, leaves: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Write what `flatten` gives to a new folder, and see that it outlives a power cut.

    Raises:
      Exception: of Orbax, TensorStore or the system; they share no class.
    """
    _check_room(folder.parent, leaves)
    folder.mkdir()
    _save_arrays(folder / _ARRAYS, leaves)
    (folder / _RECORD).write_text(json.dumps(record, indent=1))
    sums = _sums({name: _digest_file(folder / name) for name in _files(folder)})
    (folder / _SUMS).write_text(sums)
    for path in (*folder.rglob("*"), folder):
        synchronize(path)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of one checkpoint, after its sums were found right.

    Raises:
      DamagedError: they were not, or the files are none that `Checkpoints` writes.
      InputError: it cannot be read now, or is of another version's format.
    """
    check_sums(folder)
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        if record["format"] != _FORMAT:
            raise InputError(
                f"{folder} has the format {record['format']}, this jaxtrain has {_FORMAT}; "
                "expected a checkpoint of this version, or another checkpoint_dir"
            )
        _check_record(record)
        targets = {
            name: np.empty([int(length) for length in spec["shape"]], _dtype(spec["dtype"]))
            for name, spec in record["stored"].items()
        }
        leaves = _load_arrays(folder / _ARRAYS, targets)
        wrong = [name for name, target in targets.items() if not _alike(leaves[name], target)]
    except InputError:  # DamagedError among them
        raise
    except MemoryError as error:
        raise InputError(f"{folder} needs more memory than there is") from error
    except Exception as error:  # of JSON, NumPy, Orbax or TensorStore
        raise DamagedError(f"{folder} cannot be read: {first_line(error)}") from error
    if wrong:
        raise DamagedError(f"{folder} holds arrays unlike those of its record")
    return record, leaves


def _check_record(record: dict[str, Any]) -> None:
    """Raise something unless a record has what `flatten` and `save` write."""
    for name in ("configuration", "identity", "versions", "stored", "trees"):
        if not isinstance(record[name], dict):
            raise TypeError(f"{name} is no object")
    if not isinstance(record["epoch"], int):
        raise TypeError("epoch is no number")
    names = [f"history_{number}" for number, _ in enumerate(record["history"])]
    for tree_name in ("state", *record["trees"]):
        for number, spec in enumerate(record["trees"][tree_name]):
            names.append(f"{tree_name}_{number}")
            if set(spec) != {"path", "dtype", "shape", "key"}:
                raise TypeError(f"{names[-1]} is no leaf")
    if not all(isinstance(name, str) for name in record["history"]):
        raise TypeError("a column has no name")
    if not set(names) <= set(record["stored"]):
        raise KeyError("a leaf is not stored")
    bool(record["best_is_last"]), list(record["state_digests"])


def check_sums(folder: Path) -> None:
    """Raise DamagedError unless a folder holds just the files of its SHA256SUMS, unchanged.

    Raises:
      InputError: a file is there and cannot be read.
    """
    try:
        text = (folder / _SUMS).read_bytes().decode()
        listed = {name: found for found, name in _SUM_LINE.findall(text)}
        # As it was written, to the byte: lines that end otherwise, or twice, are damage, too.
        if not listed or text != _sums(listed):
            raise DamagedError(f"{folder / _SUMS} is no list of sums")
        found = {name for name in _files(folder) if name != _SUMS}
        for name in sorted({*listed, *found}):
            if name not in found:
                raise DamagedError(f"{folder / name} is missing")
            if name not in listed:
                raise DamagedError(f"{folder / name} is in no list of sums")
            if _digest_file(folder / name) != listed[name]:
                raise DamagedError(f"{folder / name} has changed")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{folder / _SUMS} is no list of sums") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"{error.filename or folder} is missing") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror or error})") from error


def _sums(sums: Mapping[str, str]) -> str:
    """As sha256sum writes them, in the order of the names."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def digest(tree: PyTree) -> str:
    """A short sum of the values, types and shapes of all leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = _to_host(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def flatten(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a checkpoint by number or name, and what is needed to put them back."""
    leaves: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {"format": _FORMAT, "epoch": checkpoint.epoch, "trees": {}}
    states = {"state": checkpoint.state, "best_state": checkpoint.best_state}
    record["best_is_last"] = checkpoint.best_state is checkpoint.state
    if record["best_is_last"]:
        del states["best_state"]
    for tree_name, state in states.items():
        if state is not None:
            paths = jax.tree_util.tree_leaves_with_path(state)
            record["trees"][tree_name] = [_spec(path, leaf) for path, leaf in paths]
            leaves |= {
                f"{tree_name}_{number}": _to_host(leaf) for number, (_, leaf) in enumerate(paths)
            }
    record["state_digests"] = [digest(state) for state in states.values() if state is not None]
    record["history"] = list(checkpoint.history)
    leaves |= {
        f"history_{number}": np.asarray(column)
        for number, column in enumerate(checkpoint.history.values())
    }
    record["stored"] = {
        name: {"dtype": leaf.dtype.name, "shape": leaf.shape} for name, leaf in leaves.items()
    }
    return leaves, record


def unflatten(
    epoch: int,
    record: dict[str, Any],
    leaves: dict[str, np.ndarray],
    like: TrainState,
    folder: Path,
) -> Checkpoint:
    paths = jax.tree_util.tree_leaves_with_path(like)
    treedef = jax.tree.structure(like)

    def tree(name: str) -> TrainState:
        stored, expected = record["trees"][name], [_spec(path, leaf) for path, leaf in paths]
        if len(stored) != len(expected):
            raise InputError(
                f"{folder} has a {name} of {len(stored)} arrays, the model and optimizer have "
                f"{len(expected)}; expected the same model and optimizer"
            )
        for ours, theirs in zip(expected, stored, strict=True):
            if ours != theirs:
                raise InputError(
                    f"{folder} has {_describe(theirs)}, the model and optimizer have "
                    f"{_describe(ours)}; expected the same model and optimizer"
                )
        values = [
            _to_device(leaves[f"{name}_{number}"], spec, leaf)
            for number, (spec, (_, leaf)) in enumerate(zip(stored, paths, strict=True))
        ]
        return jax.tree.unflatten(treedef, values)

    last = tree("state")
    best = tree("best_state") if "best_state" in record["trees"] else None
    return Checkpoint(
        epoch,
        last,
        {name: leaves[f"history_{number}"] for number, name in enumerate(record["history"])},
        last if record["best_is_last"] else best,
    )


def _spec(path: tuple[Any, ...], leaf: Any) -> dict[str, Any]:
    array = jnp.asarray(leaf)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return {
        "path": jax.tree_util.keystr(path),
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "key": str(jax.random.key_impl(array)) if is_key else None,
    }


def _describe(spec: dict[str, Any]) -> str:
    return f"{spec['path']} of {spec['dtype']}{spec['shape']}"


def _to_host(leaf: Any) -> np.ndarray:
    array = jnp.asarray(leaf) if not isinstance(leaf, np.ndarray) else leaf
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _to_device(array: np.ndarray, spec: dict[str, Any], like: Any) -> jax.Array:
    value = jnp.asarray(array)
    if spec["key"]:
        value = jax.random.wrap_key_data(value, impl=spec["key"])
    if isinstance(like, jax.Array) and like.committed:
        value = jax.device_put(value, like.sharding)
    return value


def _save_arrays(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    full = {name: leaf for name, leaf in leaves.items() if leaf.size}
    with _orbax() as (checkpointer, args):
        checkpointer.save(path, args=args.PyTreeSave(full))


def _load_arrays(path: Path, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Orbax has no arrays without elements.
    full = {name: target for name, target in targets.items() if target.size}
    with _orbax() as (checkpointer, args):
        return {**targets, **checkpointer.restore(path, args=args.PyTreeRestore(full))}


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    logger.addFilter(_is_not_of_orbax)
    try:
        # One file an array: with TensorStore's database of arrays (OCDBT) the process would grow by
        # some KiB at every save.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            yield checkpointer, ocp.args
    finally:
        logger.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs with a traceback what it also raises, and that it merges no OCDBT."""
    return "orbax" not in record.pathname


def _alike(array: np.ndarray, target: np.ndarray) -> bool:
    return array.dtype == target.dtype and array.shape == target.shape


def _dtype(name: str) -> np.dtype:
    # Through JAX, which knows bfloat16 and its like by name; np.dtype would also take "object".
    dtype = np.dtype(jnp.dtype(name))
    if dtype.hasobject:
        raise DamagedError(f"the element type {name} is none of numbers")
    return dtype


def _files(folder: Path) -> list[str]:
    """Every file below, as a relative path."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synchronize(path: Path) -> None:
    """See that a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Raise if the arrays will not fit: sooner, and in fewer words, than TensorStore would."""
    # Each array is two files and a folder, each of whole blocks.
    needed = sum(leaf.nbytes + 4 * _BLOCK_BYTES for leaf in leaves.values())
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {needed} bytes are needed, {free} are free")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
