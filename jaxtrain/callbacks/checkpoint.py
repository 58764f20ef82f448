"""checkpoint: saves a run to disk, from which the same call of `fit` resumes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from jaxtrain._arguments import check_arguments, check_integer, checked_path
from jaxtrain._placement import read_only
from jaxtrain._processes import are_joined, gather
from jaxtrain.callbacks._callback import Callback, check_column, check_number
from jaxtrain.callbacks.early_stopping import is_improvement
from jaxtrain.checkpoint import CheckpointStore, PartOfEpoch, Snapshot, check_same_run
from jaxtrain.errors import InputError

if TYPE_CHECKING:
    from jaxtrain.training.history import Run


def checkpoint(
    directory: str | os.PathLike[str],
    *,
    every: int = 1,
    every_steps: int | None = None,
    keep: int = 3,
    resume: Literal["auto", "required", "never"] = "auto",
    configuration: Mapping[str, Any] | None = None,
    best: str | None = None,
    store: Literal["file", "orbax"] = "file",
) -> Checkpoint:
    """Saves the run in a folder; the same call of `fit` resumes from its newest checkpoint.

    A run resumes if its data, their order, the batch sizes, the columns of the history, the key and
    shapes of the state, and `configuration` are the same. If the code of the model, the loss or the
    optimizer has changed, it resumes with a warning. On the same CPU with the same versions, the
    results are bit-identical to those of an uninterrupted run.

    Args:
      directory: the folder of the checkpoints, used by this run only.
      every: epochs between two checkpoints; the last epoch is always saved.
      every_steps: steps between two checkpoints within an epoch, besides those of `every`; None
        saves after epochs only.
      keep: number of checkpoints to keep, the newest ones, those within an epoch included; the
        newest one of a complete epoch is always kept.
      resume: "auto" resumes if there is a checkpoint, "required" fails without one, "never" fails
        if there is one.
      configuration: settings by name, JSON-serializable values or paths; a run with other settings
        does not resume.
      best: a column of the history; `fit` returns the state after the epoch where it was best:
        smallest if `early_stopping` infers "min" from the column's name, else largest. None returns
        the last state.
      store: "file" gathers the state in process 0, which writes one file. "orbax" writes a folder
        by Orbax, each process its part, for a state that is larger than the memory of one host; it
        can be restored on other numbers of devices and processes.

    Raises:
      InputError: a value is out of range or not JSON-serializable. In `fit`: the checkpoints belong
        to another run, are in use, or are all damaged.
      MissingExtraError: in `fit`, Orbax is not installed.
      StorageError: in `fit`, a checkpoint could not be written; earlier ones are intact.

    Example:
      >>> checkpoint = jt.callbacks.checkpoint("checkpoints", every=5)
      >>> trained, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[checkpoint])
      >>> # The same call resumes; here, after the last of 5 epochs:
      >>> trained, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[checkpoint])
    """
    check_arguments(checkpoint, locals())
    check_integer(every, "every", minimum=1)
    check_integer(keep, "keep", minimum=1)
    if every_steps is not None:
        check_integer(every_steps, "every_steps", minimum=1)
    settings = _to_json({} if configuration is None else configuration)
    path = _absolute(directory)
    return Checkpoint(path, every, every_steps, keep, resume, settings, best, store)


@dataclasses.dataclass(eq=False)
class Checkpoint(Callback):
    """What `checkpoint` returns; the attributes are its arguments."""

    directory: Path
    every: int
    every_steps: int | None
    keep: int
    resume: Literal["auto", "required", "never"]
    configuration: dict[str, Any]
    monitor: str | None
    store: Literal["file", "orbax"] = "file"
    saves = True
    _store: CheckpointStore | None = None
    _seekable: bool = False

    def on_start(self, run: Run) -> Run | None:
        """Locks the folder, and returns the run of the newest checkpoint."""
        if self.monitor is not None:
            check_column(self.monitor, run.columns, "best is", "best")
        described = run.describe()
        self._seekable = described["seekable"]
        if self.every_steps is not None and not self._seekable:
            warnings.warn(
                "the training data are a stream that has no position, so every_steps="
                f"{self.every_steps} saves nothing and an interrupted run resumes at the start of "
                "the epoch; use jaxtrain.data.stream or an iterator of Grain to resume within it",
                stacklevel=3,
            )
        identity = {**described, "configuration": self.configuration}
        self._store = CheckpointStore(
            self.directory, identity, self.keep, orbax=self.store == "orbax"
        )
        check = functools.partial(check_same_run, identity)
        found = self._store.restore(
            run.state, run.columns, check, sums=run.log.totals, resume=self.resume
        )
        return None if found is None else _resumed(run, found)

    def next_pause(self, run: Run) -> int | None:
        """Returns the next multiple of `every_steps`."""
        if self.every_steps is None or not self._seekable:
            return None
        return (run.step // self.every_steps + 1) * self.every_steps

    def on_steps(self, run: Run) -> None:
        """Saves the steps of an incomplete epoch."""
        if self.every_steps is None or not self._seekable:
            return
        if run.step % self.every_steps == 0 and run.step != run.steps_per_epoch:
            positions = None if run.position is None else gather(json.dumps(run.position))
            self._save(
                run,
                PartOfEpoch(
                    step=run.step,
                    examples=run.examples,
                    loss=run.log.loss,
                    weight=run.log.weight,
                    sums=run.log.totals,
                    counts=run.counts,
                    seconds=run.seconds,
                    positions=positions,
                ),
            )

    def on_epoch(self, run: Run) -> Run:
        """Saves a complete epoch."""
        if self.monitor is not None:
            check_number(self.monitor, run.rows[-1], "best is", "best")
            if is_improvement(run.rows, self.monitor):
                run = run.replace(best=run.state)
        if run.epoch % self.every == 0 or run.is_over or run.epoch == run.last_epoch:
            self._save(run, None)
        return run

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Waits for the checkpoint that is being written, and releases the folder."""
        store, self._store = self._store, None
        if store is not None:
            store.close(error)

    def _save(self, run: Run, part: PartOfEpoch | None) -> None:
        assert self._store is not None  # after `on_start`
        history = run.history
        self._store.save(
            Snapshot(
                epoch=run.epoch,
                state=run.state,
                history=dict(history),
                step_losses=history.step_losses,
                best=run.best,
                monitor=run.monitor,
                part=part,
            )
        )


def _resumed(run: Run, found: Snapshot) -> Run:
    """Returns the run of a checkpoint.

    Raises:
      InputError: it is after the last epoch of this run.
    """
    part = found.part
    begun = found.epoch + (part is not None)
    if begun > run.last_epoch:
        raise InputError(
            f"epochs is {run.last_epoch - run.epoch}, but the checkpoint directory holds epoch "
            f"{begun}; expected at least {begun - run.epoch}, or another directory",
            argument="epochs",
        )
    columns = (read_only(found.history[name]) for name in run.columns)
    # Python numbers, or one array per epoch.
    values = (column.tolist() if column.ndim == 1 else column for column in columns)
    rows = tuple(dict(zip(run.columns, row, strict=True)) for row in zip(*values, strict=True))
    run = run.replace(
        state=found.state,
        epoch=found.epoch,
        rows=rows,
        step_losses=(read_only(found.step_losses),),
        # With another column to monitor, or none, it is not the best state.
        best=found.best if found.monitor == run.monitor else None,
        resumed=True,
    )
    if part is None:
        return run
    return run.replace(
        step=part.step,
        examples=part.examples,
        log=read_only(run.log._replace(loss=part.loss, weight=part.weight, totals=part.sums)),
        position=_own_position(part),
        counts=part.counts,
        seconds=part.seconds,
    )


def _own_position(part: PartOfEpoch) -> Any:
    """Returns the position of this process in its stream.

    Raises:
      InputError: the checkpoint was written by another number of processes.
    """
    if part.positions is None:
        return None
    processes = jax.process_count() if are_joined() else 1
    if len(part.positions) != processes:
        raise InputError(
            f"the checkpoint after step {part.step} of an epoch was written by "
            f"{len(part.positions)} processes, and this run has {processes}; expected "
            f"{len(part.positions)}: start as many, or delete the checkpoint to resume from the "
            "previous one"
        )
    return json.loads(part.positions[jax.process_index() if processes > 1 else 0])


def _absolute(directory: Any) -> Path:
    """Returns the folder's absolute path, since the program may change its working directory."""
    path = checked_path(directory, "directory")
    if path == Path():
        raise InputError(
            f"directory is {str(directory)!r}, the current folder; expected a folder for the "
            "checkpoints alone, such as 'checkpoints'",
            argument="directory",
        )
    return path.absolute()


def _to_json(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings converted to JSON and back; paths become strings."""
    try:
        return json.loads(json.dumps(dict(configuration), default=os.fspath, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"configuration is {reprlib.repr(configuration)}, which JSON cannot represent "
            f"({error}); expected finite numbers, strings, paths, and lists or dicts of them",
            argument="configuration",
        ) from error
