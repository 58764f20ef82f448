"""Several processes that train one model: how they start, agree, and end together."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import InputError, ProcessLostError, recovery_notes

# Seconds after which the other processes notice that one no longer responds.
_HEARTBEAT_SECONDS = 30


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    **options: Any,
) -> None:
    """Joins this process with others into one cluster, in which a mesh spans all their devices.

    Calls `jax.distributed.initialize`. Call it before anything else that uses JAX. If another
    process ends during `fit`, this one prints one line and exits with status 1; if process 0 ends,
    JAX aborts the others with a message of its own.

    Args:
      coordinator: address and port of process 0, such as "10.0.0.1:1234". None, also for the other
        arguments, takes it from SLURM, Open MPI or a cloud's TPU environment.
      processes: number of processes.
      process_id: number of this process, from 0.
      **options: passed on to `jax.distributed.initialize`.

    Raises:
      InputError: the arguments are incomplete or out of range, or JAX was used before.

    Example:
      >>> jt.parallel.initialize("10.0.0.1:1234", 2, process_id)
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> state, history = jt.fit(..., mesh=mesh)
    """
    options.setdefault("heartbeat_timeout_seconds", _HEARTBEAT_SECONDS)
    # Ignored where there are GPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process_id, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the processes could not be joined (coordinator {coordinator}, processes {processes}, "
            f"process_id {process_id}: {reason}); expected the address and port of process 0, and "
            "process_id from 0 to processes - 1, before anything else that uses JAX"
        ) from error
    sys.excepthook = functools.partial(_exit_if_process_lost, sys.excepthook)


def _lost(reason: str) -> ProcessLostError:
    return ProcessLostError(jax.process_index(), jax.process_count(), reason.splitlines()[0])


def _exit(error: ProcessLostError) -> None:
    """Prints one line and ends the process at once: JAX's own exit would wait for the others."""
    line = "; ".join([f"error: {error}", *recovery_notes(error)])
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def _exit_if_process_lost(hook: Any, kind: type, error: BaseException, trace: Any) -> None:
    if isinstance(error, ProcessLostError):
        _exit(error)
    hook(kind, error, trace)


@contextlib.contextmanager
def lost_process_is_one_error() -> Iterator[None]:
    """Turns a collective operation that failed into ProcessLostError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        lost = _lost(str(error))
        lost.__notes__ = getattr(error, "__notes__", [])
        raise lost from error


def agree(value: float) -> float:
    """Returns the value of process 0, so that all processes take the same decision."""
    if not jax.distributed.is_initialized():
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def check_same_epoch(epoch: int) -> None:
    """Raises InputError if the processes resume after different epochs."""
    expected = int(agree(epoch))
    if epoch != expected:
        raise InputError(
            f"process {jax.process_index()} resumes after epoch {epoch} and process 0 after epoch "
            f"{expected}; expected one checkpoint folder, on a file system that all processes share"
        )


def is_first() -> bool:
    """Returns whether this is process 0, which writes files for all."""
    # Without the first condition, JAX would choose its devices here.
    return not jax.distributed.is_initialized() or jax.process_index() == 0
