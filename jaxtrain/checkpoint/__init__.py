"""Checkpoints: a run saved to disk, from which the same call of `fit` resumes."""

from jaxtrain.checkpoint._digests import digest, digest_program, digest_text, without_addresses
from jaxtrain.checkpoint._file import (
    Checkpoint,
    DamagedError,
    PartOfEpoch,
    checkpoint_path,
    encode_arrays,
    read_arrays,
    read_file,
    verify,
)
from jaxtrain.checkpoint._store import (
    CheckpointOptions,
    CheckpointStore,
    list_checkpoints,
    list_epochs,
)

__all__ = ["Checkpoint", "CheckpointOptions", "CheckpointStore", "DamagedError", "digest"]
__all__ += ["PartOfEpoch", "checkpoint_path", "digest_program", "digest_text", "encode_arrays"]
__all__ += [
    "list_checkpoints",
    "list_epochs",
    "read_arrays",
    "read_file",
    "verify",
    "without_addresses",
]
