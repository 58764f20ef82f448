"""Turns the checkpoint flags into a callback of `fit`, and decides whether a run resumes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxtrain import callbacks
from jaxtrain._files import lock_folder, read_input
from jaxtrain.callbacks.checkpoint import Checkpoint
from jaxtrain.checkpoint import (
    DamagedError,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
)
from jaxtrain.cli.flags import TrainingFlags
from jaxtrain.errors import InputError

# Flags that may change when a run resumes: they do not decide what it computes.
_FREE = {
    *("epochs", "device", "devices", "compilation_cache", "data_dir", "output_dir", "overwrite"),
    *("log", "log_histograms", "log_interval", "verify"),
    *("checkpoint_dir", "checkpoint_every", "keep", "resume"),
}


def checkpoint_callbacks(
    config: TrainingFlags, *, part: str = "", **known: Any
) -> list[Checkpoint]:
    """Returns the callback that the flags of checkpoints ask for, or [] without a folder.

    With --overwrite, the checkpoints of another run in the same folder are removed here.

    Args:
      config: the experiment's configuration; a run with another one cannot resume from these
        checkpoints.
      part: subfolder of the checkpoints, in an experiment of several runs.
      known: values that the configuration leaves open, such as the data set of "auto".

    Raises:
      InputError: --resume is required without a folder of checkpoints.
    """
    resume = config.resume
    if config.checkpoint_dir is None:
        if resume == "required":
            raise InputError(
                "--resume is required without --checkpoint-dir; expected a folder of checkpoints"
            )
        return []
    if part and resume == "required" and _has_checkpoints(config.checkpoint_dir):
        resume = "auto"  # later parts may not have begun when an earlier one was interrupted
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    callback = callbacks.checkpoint(
        config.checkpoint_dir / part,
        every=config.checkpoint_every,
        keep=config.keep,
        resume=resume,
        configuration={name: x for name, x in values.items() if name not in _FREE} | known,
    )
    if config.overwrite and resume == "auto":
        _remove_other_run(callback)
    return [callback]


def resumes(config: TrainingFlags) -> bool:
    """Returns whether the results in the output folder are those of the run that resumes.

    Raises:
      InputError: results and checkpoints would share a folder.
    """
    folder = config.checkpoint_dir
    if folder is None:
        return False
    if folder.resolve() == config.output_dir.resolve():
        raise InputError(
            f"--checkpoint-dir is {folder}, the output folder itself; expected another folder, "
            f"such as {folder / 'checkpoints'}"
        )
    if config.resume == "never" or not _has_checkpoints(folder):
        return False
    try:
        earlier = json.loads(read_input(config.output_dir / "config.json"))
        return Path(earlier["checkpoint_dir"]).resolve() == folder.resolve()
    except (ValueError, KeyError, TypeError):  # missing, or of a run without checkpoints
        return False


def _has_checkpoints(folder: Path) -> bool:
    """Returns whether a run has checkpoints, or one of its parts."""
    return any(map(list_checkpoints, [folder, *folder.glob("*/")]))


def _remove_other_run(callback: Checkpoint) -> None:
    """Removes the checkpoints in a folder unless an intact one has the same configuration.

    Raises:
      InputError: another run is using the folder.
      StorageError: a checkpoint cannot be removed.
    """
    folder = callback.directory
    found = [find_checkpoint(folder, *at) for at in list_checkpoints(folder)]
    for path in reversed(found):
        try:
            if read_checkpoint(path)[0]["metadata"].get("configuration") == callback.configuration:
                return
        except DamagedError:
            continue
    if found:
        with lock_folder(folder, "checkpoint folder"):
            for path in found:
                remove_checkpoint(path)
        print(f"removed the checkpoints of another run in {folder}", file=sys.stderr)
