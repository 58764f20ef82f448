"""Checkpoints that Orbax writes: a folder to which each process writes its part of the state.

The arrays on the devices are arrays of Orbax. The rest, which every process has, is the content of
a checkpoint's file, with its record and its checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain._placement import to_words
from jaxtrain._processes import are_joined, process_lost_errors
from jaxtrain._safetensors import place
from jaxtrain.checkpoint import _file
from jaxtrain.errors import InputError, StorageError, first_line

SUFFIX = ".orbax"
# What Orbax appends to the name of a folder that is incomplete.
PART = ".orbax-checkpoint-tmp"
# The name of the content of a file among the arrays.
_RUN = "run"


class OrbaxWriter:
    """Writes checkpoints in the background, in all processes that train together."""

    suffix = SUFFIX

    def __init__(self) -> None:
        ocp = _import_orbax()
        self._save_args = ocp.args.PyTreeSave
        self._checkpointer = _checkpointer(ocp)

    def begin(
        self, path: Path, leaves: dict[str, Any], record: dict[str, Any]
    ) -> Callable[[], None]:
        """Copies the arrays of this process to the host; returns a function that writes them."""
        divided = {name: leaf for name, leaf in leaves.items() if _is_stored(leaf)}
        rest = {name: leaf for name, leaf in leaves.items() if name not in divided}
        content = np.frombuffer(_file.encode(_file.to_host_all(rest), record), np.uint8)
        item = {name: to_words(leaf) for name, leaf in divided.items()} | {_RUN: content}
        try:
            with process_lost_errors():
                self._checkpointer.save(path, args=self._save_args(item=item), force=True)
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(path, first_line(error)) from error
        return self._checkpointer.wait_until_finished

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._checkpointer.close()


class OrbaxArrays(dict[str, np.ndarray]):
    """The arrays of a checkpoint: those of the file by name, and the others on request."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self._path = path

    def take(self, likes: Iterable[tuple[str, Any]]) -> list[Any]:
        """Returns arrays by name, each with the type and the devices of an array like it."""
        pairs = list(likes)
        stored = {name: leaf for name, leaf in pairs if name not in self}
        found = _restore(self._path, stored) if stored else {}
        return [
            place(found[name] if name in found else self[name].copy(), leaf) for name, leaf in pairs
        ]


def read_folder(path: Path) -> tuple[dict[str, Any], OrbaxArrays]:
    """Returns the record of a checkpoint, and its arrays; as `read_file` of a file.

    Raises:
      DamagedError: the record differs from what was written.
      InputError: Orbax cannot read the folder, or it is of another version.
    """
    content = _restore(path, {_RUN: np.zeros(0, np.uint8)})[_RUN]
    record, arrays = _file.parse(bytes(content), path)
    return record, OrbaxArrays(path, arrays)


def _restore(path: Path, likes: dict[str, Any]) -> dict[str, Any]:
    ocp = _import_orbax()

    def arguments(like: Any) -> Any:
        if isinstance(like, jax.Array) and like.committed:
            words = to_words(like)
            return ocp.ArrayRestoreArgs(sharding=words.sharding, dtype=words.dtype)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    request = ocp.args.PyTreeRestore(
        item=dict.fromkeys(likes, 0),
        restore_args={name: arguments(like) for name, like in likes.items()},
        partial_restore=True,
    )
    checkpointer = _checkpointer(ocp)
    try:
        return checkpointer.restore(path.absolute(), args=request)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read by Orbax ({first_line(error)}); delete it to resume from the "
            "previous checkpoint"
        ) from error
    finally:
        checkpointer.close()


def _is_stored(leaf: Any) -> bool:
    """Returns whether an array is one of Orbax, which has no empty ones."""
    return isinstance(leaf, jax.Array) and leaf.size > 0


def _checkpointer(ocp: Any) -> Any:
    options = ocp.options.MultiprocessingOptions()
    if not are_joined():  # each process trains a model of its own
        index = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
        )
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        multiprocessing_options=options,
    )


def _import_orbax() -> Any:
    with needs_extra("orbax"):
        import orbax.checkpoint
    return orbax.checkpoint
