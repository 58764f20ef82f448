"""Checkpoints: a run saved to disk, from which the same call of `fit` resumes."""

from jaxtrain.checkpoint._file import (
    Checkpoint,
    DamagedError,
    checkpoint_path,
    digest,
    read_file,
    verify,
)
from jaxtrain.checkpoint._store import CheckpointOptions, CheckpointStore, list_epochs

__all__ = ["Checkpoint", "CheckpointOptions", "CheckpointStore", "DamagedError", "digest"]
__all__ += ["checkpoint_path", "list_epochs", "read_file", "verify"]
