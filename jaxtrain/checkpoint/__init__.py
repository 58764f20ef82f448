"""Checkpoints on disk: the file format, the folder, and what identifies a run (private)."""

from jaxtrain.checkpoint._file import (
    DamagedError,
    PartOfEpoch,
    Snapshot,
    checkpoint_path,
    encode_arrays,
    malformed_is_damaged,
    read_arrays,
    read_file,
    verify,
)
from jaxtrain.checkpoint._functions import describe_function, digest_function
from jaxtrain.checkpoint._identity import (
    check_same_run,
    digest,
    digest_program,
    identify,
    without_addresses,
)
from jaxtrain.checkpoint._load import load_checkpoint
from jaxtrain.checkpoint._store import (
    CheckpointStore,
    find_checkpoint,
    list_checkpoints,
    list_epochs,
    read_checkpoint,
    remove_checkpoint,
)

__all__ = [
    "CheckpointStore",
    "DamagedError",
    "PartOfEpoch",
    "Snapshot",
    "check_same_run",
    "checkpoint_path",
    "describe_function",
    "digest",
    "digest_function",
    "digest_program",
    "encode_arrays",
    "find_checkpoint",
    "identify",
    "list_checkpoints",
    "list_epochs",
    "load_checkpoint",
    "malformed_is_damaged",
    "read_arrays",
    "read_checkpoint",
    "read_file",
    "remove_checkpoint",
    "verify",
    "without_addresses",
]
