"""Checkpoints: a run between two of its epochs, on disk, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain.errors import (
    NO_SPACE,
    InputError,
    NonFiniteLossError,
    StorageError,
    note_what_is_kept,
)
from jaxtrain.folders import lock_folder, make_folder
from jaxtrain.state import TrainState

Resume = Literal["auto", "never", "must"]

_FORMAT = 1
_BLOCK_BYTES = 4096
_ARRAYS, _RECORD, _SUMS = "arrays", "record.json", "SHA256SUMS"
_SUM_LINE = re.compile(r"^([0-9a-f]{64})  (.+)$", re.MULTILINE)
# What the folder is to the user, and the argument that names another.
_NAMES = ("checkpoint folder", "checkpoint_dir")
_UNFINISHED, _DAMAGED = ".unfinished", ".damaged"


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


class Checkpoints:
    """A folder of checkpoints, one subfolder an epoch (epoch-5); a context manager.

    A subfolder holds `arrays`, which Orbax writes and reads, `record.json` (which leaf of the run
    each of them is, configuration, versions) and `SHA256SUMS` of all its files, as sha256sum
    writes it and checks it with -c. It is made under another name and renamed when it is whole.
    Nothing in it is executed: there are numbers and JSON.

    Writing happens in a thread of its own; leaving the context waits for it, also by Ctrl-C.

    (Orbax's CheckpointManager renames by itself, after which it adds files of its own; the sums
    could not cover these, nor be there at the same moment as the rest.)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: int = 3,
        configuration: Mapping[str, Any],
        identity: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> None:
        """Make the folder; entering the context locks it.

        Args:
          path: the folder, made with its parents if it is missing.
          keep: how many checkpoints to keep, the newest.
          configuration: what makes the run what it is, in the user's words: values of JSON, or
            paths. Another one cannot go on from these checkpoints.
          identity: the same, found out; its differences are told where the configuration has none.
          versions: of the packages and the device, which may change.

        Raises:
          InputError: the folder cannot be made or written, or a value is none of JSON. (Entering
            the context raises it if another run writes there.)
        """
        self.path = Path(path)
        if self.path == Path():
            raise InputError(
                f"checkpoint_dir is {path!r}, the current folder; expected one of its own, "
                "checkpoints for instance"
            )
        self.keep = keep
        self.configuration = _as_json(configuration)
        self.identity = _as_json(identity)
        self.versions = dict(versions)
        self._pending: Future[None] | None = None
        make_folder(self.path, *_NAMES)

    def __enter__(self) -> Checkpoints:
        self._lock = lock_folder(self.path, *_NAMES)
        for left in self.path.glob(f"*{_UNFINISHED}"):  # by a run that was killed
            _remove(left)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        try:
            # What went wrong while writing is told, unless something else went wrong before.
            with contextlib.suppress(StorageError) if error else contextlib.nullcontext():
                self.wait()
        except StorageError as failure:
            self._note(failure)
            raise
        finally:
            self._thread.shutdown()
            os.close(self._lock)
            if error is not None:
                self._note(error)

    def _note(self, error: BaseException) -> None:
        if not self.epochs or isinstance(error, InputError):
            return
        last = self.epochs[-1]
        note = f"the same command goes on after epoch {last}, whose checkpoint is in {self.path}"
        if isinstance(error, NonFiniteLossError):  # the same would end the same
            note = (
                f"the checkpoint of epoch {last} is in {self.path}; a run with other flags takes "
                "another checkpoint_dir"
            )
        note_what_is_kept(error, note)

    @property
    def epochs(self) -> list[int]:
        """The epochs after which there is a checkpoint, ascending."""
        return list_epochs(self.path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, in the background.

        Raises:
          StorageError: the one before could not be written.
        """
        self.wait()
        # Copied off the device here, written there.
        leaves, record = _flatten(checkpoint)
        record |= {
            "configuration": self.configuration,
            "identity": self.identity,
            "versions": self.versions,
        }
        self._pending = self._thread.submit(self._write, checkpoint.epoch, leaves, record)

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
          StorageError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, like: TrainState, resume: Resume) -> Checkpoint | None:
        """The newest whole checkpoint, if the run is to go on from one.

        One that is damaged is set aside, with a warning, and the one before is taken.

        Args:
          like: the state at the run's start, whose structure the checkpoint must have.
          resume: "auto" takes one if there is one, "must" insists, "never" insists on none.

        Raises:
          InputError: there is none and there must be one, or the reverse; none is whole; it is of
            another run, or cannot be read although it may be whole.
        """
        if resume not in ("auto", "never", "must"):
            raise InputError(f"resume is {resume!r}; expected 'auto', 'never' or 'must'")
        epochs = self.epochs
        if resume == "never" and epochs:
            raise InputError(
                f"resume is 'never', but {self.path} holds checkpoints, the last of epoch "
                f"{epochs[-1]}; expected an empty folder: delete it, name another by "
                "checkpoint_dir, or let the run go on by resume 'auto'"
            )
        if resume == "must" and not epochs:
            raise InputError(
                f"resume is 'must', but {self.path} holds no checkpoint; expected one: check "
                "checkpoint_dir, or start by resume 'auto'"
            )
        damaged: dict[int, str] = {}
        for epoch in reversed(epochs):
            try:
                record, leaves = read_checkpoint(self._folder(epoch))
            except DamagedError as error:
                damaged[epoch] = str(error)
                continue
            try:
                self._check_same_run(record, epoch)
                checkpoint = _unflatten(epoch, record, leaves, like, self._folder(epoch))
            except InputError as error:
                newer = "; newer ones are damaged: " if damaged else ""
                raise InputError(f"{error}{newer}{'; '.join(damaged.values())}") from error
            for number, reason in damaged.items():
                aside = self.path / f"{self._folder(number).name}{_DAMAGED}"
                _remove(aside)
                os.replace(self._folder(number), aside)
                warnings.warn(
                    f"the checkpoint of epoch {number} is damaged ({reason}) and was set aside as "
                    f"{aside}; going on from epoch {epoch}",
                    stacklevel=3,
                )
            return checkpoint
        if damaged:
            raise InputError(
                f"{self.path} holds no whole checkpoint ({'; '.join(damaged.values())}); delete "
                "the folder to start anew, or name another by checkpoint_dir"
            )
        return None

    def _folder(self, epoch: int) -> Path:
        return checkpoint_folder(self.path, epoch)

    def _check_same_run(self, record: dict[str, Any], epoch: int) -> None:
        differences = {
            kind: {
                name: (record[kind].get(name), now.get(name))
                for name in {**record[kind], **now}
                if record[kind].get(name) != now.get(name)
            }
            for kind, now in (
                ("configuration", self.configuration),
                ("identity", self.identity),
                ("versions", self.versions),
            )
        }
        moved, sums = differences["versions"], {START, COMPILED_STEP}
        # Another version or device may change what both are sums of in its last digit.
        forgiven = set(sums) if moved else set()
        if self.identity[START] in record["state_digests"]:
            # The run goes on in the process that wrote it, from the state that it returned.
            forgiven.add(START)
            self.identity[START] = record["identity"][START]
        found = {
            name: pair for name, pair in differences["identity"].items() if name not in forgiven
        }
        # Sums are told only where nothing readable is.
        readable = {name: pair for name, pair in found.items() if name not in sums}
        different = differences["configuration"] or readable or found
        if different:
            raise InputError(
                f"the checkpoint of epoch {epoch} in {self.path} is of another run: "
                f"{_in_words(different)}; expected the same, or another checkpoint_dir"
            )
        if moved:
            warnings.warn(
                f"the checkpoint of epoch {epoch} was written elsewhere ({_in_words(moved)}): the "
                "last digits may differ from here on, and whether start and compiled step are the "
                "same cannot be told",
                stacklevel=4,
            )

    def _write(self, epoch: int, leaves: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        final = self._folder(epoch)
        scratch = self.path / f"{final.name}{_UNFINISHED}"
        try:
            _check_room(self.path, leaves)
            _remove(scratch)
            scratch.mkdir()
            _save_arrays(scratch / _ARRAYS, leaves)
            (scratch / _RECORD).write_text(json.dumps(record, indent=1))
            sums = _sums({name: _digest_file(scratch / name) for name in _files(scratch)})
            (scratch / _SUMS).write_text(sums)
            for path in (*scratch.rglob("*"), scratch):
                _synchronize(path)
            self._delete(epoch)
            os.rename(scratch, final)
            _synchronize(self.path)
        except Exception as error:  # Orbax's and TensorStore's share no base class
            _remove(scratch)
            # TensorStore has no class of its own for it.
            full = "No space left" in str(error)
            reason = NO_SPACE if full else _first_line(error)
            raise StorageError(final, reason) from error
        for old in self.epochs[: -self.keep]:
            self._delete(old)

    def _delete(self, epoch: int) -> None:
        """Under another name first: cut short, it leaves no half of a checkpoint behind."""
        folder = self._folder(epoch)
        doomed = self.path / f"{folder.name}.old{_UNFINISHED}"
        _remove(doomed)
        with contextlib.suppress(OSError):  # an old one too many is no reason to stop
            os.rename(folder, doomed)
            _remove(doomed)


# The entries of an identity that are sums of what other versions and devices change by themselves.
COMPILED_STEP = "compiled step (of model, loss and optimizer)"
START = "start (by seed, optimizer and learning rate)"


def checkpoint_folder(path: Path, epoch: int) -> Path:
    """Where the checkpoint of an epoch lies."""
    return path / f"epoch-{epoch}"


def list_epochs(path: Path) -> list[int]:
    """The epochs of the checkpoints in a folder, ascending; none where there is no folder."""
    if not path.is_dir():
        return []
    matches = (re.fullmatch("epoch-(0|[1-9][0-9]*)", entry.name) for entry in path.iterdir())
    return sorted(int(match[1]) for match in matches if match)


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
        raise DamagedError(f"{folder} cannot be read: {_first_line(error)}") from error
    if wrong:
        raise DamagedError(f"{folder} holds arrays unlike those of its record")
    return record, leaves


def _check_record(record: dict[str, Any]) -> None:
    """Raise something unless a record has what `_flatten` and `save` write."""
    for name in ("configuration", "identity", "versions", "stored", "trees"):
        if not isinstance(record[name], dict):
            raise TypeError(f"{name} is no object")
    if START not in record["identity"]:
        raise KeyError(START)
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


def _flatten(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
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


def _unflatten(
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


def _save_arrays(path: Path, leaves: dict[str, np.ndarray]) -> None:
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


def _synchronize(path: Path) -> None:
    """See that a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(path: Path, leaves: dict[str, np.ndarray]) -> None:
    """Raise if the arrays will not fit: sooner, and in fewer words, than TensorStore would."""
    # Each array is two files and a folder, each of whole blocks.
    needed = sum(leaf.nbytes + 4 * _BLOCK_BYTES for leaf in leaves.values())
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {needed} bytes are needed, {free} are free")


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if not isinstance(value, (str, int, float, bool, list, tuple, dict, Path, type(None))):
            raise InputError(
                f"configuration has {name} = {value!r}; expected what JSON can say, a number or a "
                "text for instance"
            )
    try:
        return json.loads(json.dumps(dict(values), default=_path))
    except TypeError as error:
        raise InputError(f"configuration holds what JSON cannot say: {error}") from error


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(repr(value))


def _in_words(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{name} was {then} and is now {now}" for name, (then, now) in sorted(pairs.items())
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
