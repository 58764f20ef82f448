"""Turns the checkpoint flags into a callback of `fit`, and decides whether a run resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain._files import lock_folder
from jaxtrain.callbacks.checkpoint import Checkpoint
from jaxtrain.checkpoint import DamagedError, checkpoint_path, list_checkpoints, read_file
from jaxtrain.cli.flags import TrainingFlags
from jaxtrain.cli.runs import read_json, remove_file, to_json
from jaxtrain.errors import InputError, printable

# Flags that may change when a run resumes: they do not decide what it computes.
_FREE = {
    *(
        "epochs",
        "device",
        "devices",
        "compilation_cache",
        "log",
        "log_histograms",
        "log_interval",
        "output_dir",
        "overwrite",
    ),
    *("data_dir", "safety", "profile"),
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
    safety = config.safety
    if safety.checkpoint_dir is None:
        if safety.resume == "required":
            raise InputError(
                "--resume is required without --checkpoint-dir; expected a folder of checkpoints"
            )
        return []
    folder = safety.checkpoint_dir / part
    names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
    resume = safety.resume
    if part and resume == "required" and _has_checkpoints(safety.checkpoint_dir):
        resume = "auto"  # later parts may not have begun when an earlier one was interrupted
    callback = Checkpoint(
        folder,
        every=safety.checkpoint_every,
        keep=safety.keep,
        resume=resume,
        configuration={name: getattr(config, name) for name in names}
        | {"max_gradient_norm": safety.max_gradient_norm, "on_nonfinite": safety.on_nonfinite}
        | known,
    )
    if config.overwrite and resume == "auto":
        _remove_other_run(folder, callback.configuration)
    return [callback]


def resumes(config: TrainingFlags) -> bool:
    """Returns whether the results in the output folder are those of the run that resumes.

    Raises:
      InputError: results and checkpoints would share a folder, or the results are of a run with
        other flags and the same folder of checkpoints.
    """
    folder, output_dir = config.safety.checkpoint_dir, config.output_dir
    if folder is None:
        return False
    if _same_folder(folder, output_dir):
        raise InputError(
            f"--checkpoint-dir is {folder}, the output folder itself; expected another folder, "
            f"such as {output_dir / 'checkpoints'}"
        )
    if config.safety.resume == "never" or not _has_checkpoints(folder):
        return False
    earlier = read_json(output_dir / "config.json")
    try:
        if not _same_folder(Path(earlier["safety"]["checkpoint_dir"]), folder):
            return False
        now = to_json(dataclasses.asdict(config))
        different = {
            name: (earlier[name], value)
            for name, value in now.items()
            # None: the run fills in a default later.
            if name not in _FREE and value is not None and earlier[name] != value
        }
    except (KeyError, TypeError):  # not written by an experiment
        return False
    if different and not config.overwrite:
        raise InputError(
            f"the output folder {output_dir} contains another run: "
            f"{format_differences(different)}; choose other folders with --output-dir and "
            "--checkpoint-dir, or replace it with --overwrite"
        )
    return not different


def _has_checkpoints(folder: Path) -> bool:
    """Returns whether a run has checkpoints, or one of its parts."""
    try:
        parts = [folder, *folder.iterdir()]
    except (OSError, ValueError):  # ValueError: a null character in the name
        return False
    return any(list_checkpoints(part) for part in parts)


def format_differences(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns names with their earlier and present values, in one clause."""
    return ", ".join(f"{name} was {then} and is now {now}" for name, (then, now) in pairs.items())


def _remove_other_run(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Removes the checkpoints in a folder unless the newest intact one is of this configuration.

    Raises:
      InputError: another run is using the folder.
      StorageError: a checkpoint cannot be removed.
    """
    found = list_checkpoints(folder)
    if not found:
        return
    for at in reversed(found):
        with contextlib.suppress(DamagedError):  # compare the previous one
            record, _ = read_file(checkpoint_path(folder, *at))
            if record["metadata"].get("configuration") == configuration:
                return
            break
    lock = lock_folder(folder, "checkpoint folder")
    try:
        for at in found:
            remove_file(checkpoint_path(folder, *at))
    finally:
        lock.release()
    print(printable(f"removed the checkpoints of another run in {folder}"), file=sys.stderr)


def _same_folder(first: Path, second: Path) -> bool:
    try:
        return os.path.realpath(first) == os.path.realpath(second)
    except (OSError, ValueError):  # no working directory, or a null character in the name
        return False
