"""Checkpoints: the folder from which a run goes on, written in the background."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtrain.checkpoint_files import (
    Checkpoint,
    DamagedError,
    first_line,
    flatten,
    read_checkpoint,
    synchronize,
    unflatten,
    write_checkpoint,
)
from jaxtrain.errors import (
    NO_SPACE,
    InputError,
    NonFiniteLossError,
    StorageError,
    note_what_is_kept,
)
from jaxtrain.folders import lock_folder, make_folder, remove
from jaxtrain.state import TrainState

Resume = Literal["auto", "never", "must"]

# What the folder is to the user, and the argument that names another.
_NAMES = ("checkpoint folder", "checkpoint_dir")
_UNFINISHED, _DAMAGED = ".unfinished", ".damaged"
# The entries of an identity that are sums of what other versions and devices change by themselves.
COMPILED_STEP = "compiled step (of model, loss and optimizer)"
COMPILED_EVALUATION = "compiled evaluation (of metrics, by test_batch_size)"
START = "start (by seed, optimizer and learning rate)"


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
        self.path = self.path.absolute()  # the program may change its directory
        self.keep = keep
        self.configuration = _as_json(configuration)
        self.identity = _as_json(identity)
        self.versions = dict(versions)
        self._pending: Future[None] | None = None
        make_folder(self.path, *_NAMES)

    def __enter__(self) -> Checkpoints:
        self._lock = lock_folder(self.path, *_NAMES)
        try:
            for left in self.path.glob(f"epoch-*{_UNFINISHED}"):  # by a run that was killed
                remove(left)
        except BaseException:
            os.close(self._lock)
            raise
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
        leaves, record = flatten(checkpoint)
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
                if record["epoch"] != epoch:
                    raise DamagedError(f"{self._folder(epoch)} is that of epoch {record['epoch']}")
            except DamagedError as error:
                damaged[epoch] = str(error)
                continue
            try:
                self._check_same_run(record, epoch)
                checkpoint = unflatten(epoch, record, leaves, like, self._folder(epoch))
            except InputError as error:
                newer = "; newer ones are damaged: " if damaged else ""
                raise InputError(f"{error}{newer}{'; '.join(damaged.values())}") from error
            for number, reason in damaged.items():
                aside = self.path / f"{self._folder(number).name}{_DAMAGED}"
                remove(aside)
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
        moved, sums = differences["versions"], {START, COMPILED_STEP, COMPILED_EVALUATION}
        # Another version or device may change what both are sums of in its last digit.
        forgiven = set(sums) if moved else set()
        if self.identity[START] in record["state_digests"]:
            # The run goes on in the process that wrote it, from the state that it returned.
            forgiven.add(START)
            self.identity[START] = record["identity"].get(START)
        found = {
            name: pair for name, pair in differences["identity"].items() if name not in forgiven
        }
        # Sums are told only where nothing readable is.
        readable = {name: pair for name, pair in found.items() if name not in sums}
        different = differences["configuration"] or readable or found
        if different:
            raise InputError(
                f"the checkpoint of epoch {epoch} in {self.path} is of another run: "
                f"{in_words(different)}; expected the same, or another checkpoint_dir"
            )
        if moved:
            warnings.warn(
                f"the checkpoint of epoch {epoch} was written elsewhere ({in_words(moved)}): the "
                "last digits may differ from here on, and whether start and compiled programs are "
                "the same cannot be told",
                stacklevel=4,
            )

    def _write(self, epoch: int, leaves: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        final = self._folder(epoch)
        scratch = self.path / f"{final.name}{_UNFINISHED}"
        try:
            remove(scratch)
            write_checkpoint(scratch, leaves, record)
            self._delete(epoch)
            os.rename(scratch, final)
            synchronize(self.path)
        except Exception as error:  # Orbax's and TensorStore's share no base class
            remove(scratch)
            # TensorStore has no class of its own for it.
            full = "No space left" in str(error)
            reason = NO_SPACE if full else first_line(error)
            raise StorageError(final, reason) from error
        for old in self.epochs[: -self.keep]:
            self._delete(old)

    def _delete(self, epoch: int) -> None:
        """Under another name first: cut short, it leaves no half of a checkpoint behind."""
        folder = self._folder(epoch)
        doomed = self.path / f"{folder.name}.old{_UNFINISHED}"
        remove(doomed)
        with contextlib.suppress(OSError):  # an old one too many is no reason to stop
            os.rename(folder, doomed)
            remove(doomed)


def checkpoint_folder(path: Path, epoch: int) -> Path:
    """Where the checkpoint of an epoch lies."""
    return path / f"epoch-{epoch}"


def list_epochs(path: Path) -> list[int]:
    """The epochs of the checkpoints in a folder, ascending; none where there is no such folder."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return []
    matches = (re.fullmatch("epoch-(0|[1-9][0-9]*)", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


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


def in_words(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    """Names with what each was then and is now, in one clause."""
    return ", ".join(
        f"{name} was {then} and is now {now}" for name, (then, now) in sorted(pairs.items())
    )
