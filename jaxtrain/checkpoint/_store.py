"""The folder of a run's checkpoints, written in the background by one process at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxtrain._files import PART, lock_folder, make_folder, write_atomically
from jaxtrain._processes import check_same, process_lost_errors, writes_files
from jaxtrain.checkpoint import _file, _orbax
from jaxtrain.checkpoint._file import DamagedError, Snapshot, checkpoint_path
from jaxtrain.errors import (
    InputError,
    NonFiniteError,
    ProcessLostError,
    StorageError,
    add_recovery_note,
)

_NAME = r"epoch-(0|[1-9][0-9]*)(?:-step-([1-9][0-9]*))?\.(?:safetensors|orbax)"
# The number of calls from `restore` to the caller of `fit`, whose line a warning shows.
_FIT = 4
_LEFT_OVER = rf"\.{_NAME}\.[a-z0-9_]+{re.escape(PART)}|{_NAME}{re.escape(_orbax.PART)}.*"


class CheckpointStore:
    """The checkpoints of one run, such as `epoch-5.safetensors` or the folder `epoch-5.orbax`.

    Each appears complete or not at all. Nothing in it is executed: it contains only arrays and
    JSON. A thread writes it in the background.

    Attributes:
      path: the folder.
      metadata: the identity of the run, stored in each checkpoint; JSON-serializable.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], keep: int = 3, *, orbax: bool = False
    ) -> None:
        """Creates the folder and locks it, until `close`.

        Args:
          path: the folder.
          metadata: the identity of the run.
          keep: number of checkpoints to keep, the newest ones.
          orbax: whether Orbax writes them, in all processes.

        Raises:
          InputError: the folder cannot be written, or another run uses it.
          MissingExtraError: Orbax is not installed.
        """
        self.path, self.metadata, self._keep = path, metadata, keep
        self._writes = writes_files()
        self._pending: concurrent.futures.Future[None] | None = None
        make_folder(path, "checkpoint folder")
        # Several processes that train together restore the same checkpoints; process 0 writes.
        self._lock = lock_folder(path, "checkpoint folder") if self._writes else None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        for name in filter(re.compile(_LEFT_OVER).fullmatch, _list(path)):
            self._remove(path / name)  # of a process that was killed
        # Last, since it starts threads, which only `close` ends.
        self._writer: Any = _orbax.OrbaxWriter() if orbax else _FileWriter()

    def close(self, error: BaseException | None = None) -> None:
        """Waits for the checkpoint that is being written, also on Ctrl-C, and releases the folder.

        Args:
          error: what ended the run, or None; receives a note that says how to resume.

        Raises:
          StorageError: the last checkpoint could not be written, and no other error ended the run.
        """
        try:
            self.wait()
        except BaseException as failure:
            if error is None or not isinstance(failure, StorageError):
                error = failure
                raise  # a StorageError would hide the error that ended the run
        finally:
            self._thread.shutdown()
            self._writer.close()
            if self._lock is not None:
                self._lock.release()
            if error is not None:
                self._add_note(error)

    @property
    def found(self) -> list[tuple[int, int]]:
        """The checkpoints in the folder, ascending: epochs, and steps of the next epoch."""
        return list_checkpoints(self.path)

    def save(self, snapshot: Snapshot) -> None:
        """Copies a snapshot to the host, and writes it in the background; all processes call it.

        Raises:
          InputError: safetensors lacks the dtype of an array.
          StorageError: the previous checkpoint could not be written.
        """
        self.wait()
        leaves, record = _file.flatten(snapshot, self.metadata)
        at = record["epoch"], _file.step_of(record)
        path = _file.checkpoint_path(self.path, *at).with_suffix(self._writer.suffix)
        write = self._writer.begin(path, leaves, record)
        if write is not None:
            self._pending = self._thread.submit(self._write, path, write)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk; raises StorageError if writing it failed."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending])
            # Not before the wait: if Ctrl-C interrupts it, `close` waits again.
            pending, self._pending = self._pending, None
            pending.result()

    def restore(
        self,
        like: PyTree,
        columns: Sequence[str],
        check: Callable[[dict[str, Any], str], str | None],
        *,
        sums: PyTree = (),
        resume: str = "auto",
    ) -> Snapshot | None:
        """Returns the newest intact checkpoint, if any, and renames newer damaged ones.

        Args:
          like: a state of the structure, shapes, dtypes and placement to restore.
          columns: the names of the history's columns, in order.
          check: called with the recorded metadata and a description of the checkpoint; returns a
            warning or None, and raises InputError if it belongs to another run.
          sums: as `like`, for the sums of the metrics in a checkpoint within an epoch.
          resume: "auto", "required" or "never".

        Raises:
          InputError: `resume` is "never" and there are checkpoints, or "required" and there are
            none; all checkpoints are damaged; or one belongs to another run or model, or cannot be
            read.
        """
        found = self.found
        check_same(  # and no process renames a checkpoint before the others have seen it
            lambda: {f"the list of checkpoints in {self.path}": [_name(*at) for at in found]},
            "one folder, on a file system that all processes share",
        )
        if resume == "never" and found:
            raise InputError(
                f"resume is 'never', but {self.path} has checkpoints up to {_name(*found[-1])}; "
                "delete them, use another directory, or set resume to 'auto'",
                argument="resume",
            )
        if resume == "required" and not found:
            raise InputError(
                f"resume is 'required', but {self.path} has no checkpoint; check the directory, or "
                "set resume to 'auto' to start a new run",
                argument="resume",
            )
        damaged: dict[Path, str] = {}
        for path in (find_checkpoint(self.path, *at) for at in reversed(found)):
            if not self._writes and not path.exists():
                continue  # process 0 has renamed it
            try:
                record, arrays = read_checkpoint(path, _file.largest_size(like))
                with _file.malformed_is_damaged(path):
                    message = check(record["metadata"], f"the checkpoint {path}")
                snapshot = _file.unflatten(record, arrays, like, sums, list(columns), path)
            except DamagedError as error:
                damaged[path] = str(error)
                continue
            last = _name(record["epoch"], _file.step_of(record))
            for bad, reason in damaged.items() if self._writes else ():
                self._set_aside(bad)
                warnings.warn(
                    f"a damaged checkpoint was renamed to {bad.name}.damaged ({reason}); "
                    f"resuming after {last}",
                    stacklevel=_FIT,
                )
            if message is not None:
                warnings.warn(message, stacklevel=_FIT)
            return snapshot
        if damaged:
            raise InputError(
                f"{self.path} has no intact checkpoint ({'; '.join(damaged.values())}); delete the "
                "folder to start again, or use another directory",
                argument="directory",
            )
        return None

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            os.replace(path, aside)
        except OSError as error:
            raise StorageError(aside, error.strerror or str(error)) from error

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        try:
            with process_lost_errors():
                write()
        except (StorageError, ProcessLostError):
            raise
        except Exception as error:  # out of memory, or more names than safetensors permits
            raise StorageError(path, str(error) or type(error).__name__) from error
        found = self.found
        epochs = [at for at in found if not at[1]]
        for old in set(found[: -self._keep]) - set(epochs[-1:]):
            self._remove(find_checkpoint(self.path, *old))

    def _remove(self, path: Path) -> None:
        if self._writes:
            with contextlib.suppress(StorageError):  # an extra file does no harm
                remove_checkpoint(path)

    def _add_note(self, error: BaseException) -> None:
        if self.found and not isinstance(error, InputError):
            at = self.found[-1]
            path, last = find_checkpoint(self.path, *at), _name(*at)
            note = f"rerun the same command to resume after {last}; its checkpoint is {path}"
            if isinstance(error, NonFiniteError):  # the same run would end the same way
                note = f"the checkpoint of {last} is {path}; other settings need another folder"
            add_recovery_note(error, note)


class _FileWriter:
    """Writes checkpoints as files, in process 0."""

    suffix = ".safetensors"

    def begin(
        self, path: Path, leaves: dict[str, Any], record: dict[str, Any]
    ) -> Callable[[], None] | None:
        """Copies the arrays to the host; returns a function that writes them, in process 0."""
        arrays = _file.to_host_all(leaves)

        def write() -> None:
            write_atomically(path, _file.encode(arrays, record), sync_folder=True)

        return write if writes_files() else None

    def close(self) -> None:
        """Does nothing."""


def read_checkpoint(path: Path, maximum: int | None = None) -> tuple[dict[str, Any], Any]:
    """Returns the record of a checkpoint, and its arrays; see `read_file` and `read_folder`."""
    if path.name.endswith(_orbax.SUFFIX):
        return _orbax.read_folder(path)
    return _file.read_file(path, maximum)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, a file or a folder of Orbax; raises StorageError if it cannot."""
    try:
        if path.is_dir():
            # First the name, so that no part of a checkpoint has it.
            shutil.rmtree(path.rename(path.with_name(path.name + _orbax.PART)))
        else:
            os.unlink(path)
    except OSError as error:
        raise StorageError(path, error.strerror or str(error)) from error


def find_checkpoint(directory: str | os.PathLike[str], epoch: int, step: int = 0) -> Path:
    """Returns the path of a checkpoint in a folder: a file, or a folder of Orbax."""
    file = checkpoint_path(directory, epoch, step)
    folder = file.with_suffix(_orbax.SUFFIX)
    return folder if folder.is_dir() else file


def list_checkpoints(directory: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Returns the checkpoints in a folder, ascending: epochs, and steps of the next epoch."""
    matches = (re.fullmatch(_NAME, name) for name in _list(directory))
    return sorted({(int(match[1]), int(match[2] or 0)) for match in matches if match})


def list_epochs(directory: str | os.PathLike[str]) -> list[int]:
    """Returns the epochs after which there are checkpoints, ascending; [] without a folder."""
    return [epoch for epoch, step in list_checkpoints(directory) if not step]


def _name(epoch: int, step: int) -> str:
    return f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"


def _list(directory: str | os.PathLike[str]) -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # ValueError: a null character in the path
        return os.listdir(directory)
    return []
