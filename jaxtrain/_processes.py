"""Several processes that train one model: joining them, agreeing on decisions, and ending."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import InputError, ProcessLostError, message_of, recovery_notes

# Codes of XLA's errors when a process or its network ends.
_LOST = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN|FAILED_PRECONDITION): "
)
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
    JAX aborts the others with a message of its own. After an uncaught exception, this process
    exits at once, so that the others do not wait for it.

    Args:
      coordinator: address and port of process 0, such as "10.0.0.1:1234". None, also for the other
        arguments, takes it from SLURM, Open MPI or a cloud's TPU environment.
      processes: number of processes.
      process_id: number of this process, from 0.
      **options: passed on to `jax.distributed.initialize`.

    Raises:
      InputError: the arguments are incomplete or out of range, or JAX was used before.

    Example:
      >>> jt.parallel.initialize("10.0.0.1:1234", 2, process_id)  # doctest: +SKIP
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, mesh=mesh)
    """
    options.setdefault("heartbeat_timeout_seconds", _HEARTBEAT_SECONDS)
    # Ignored where there are GPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process_id, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the processes could not be joined ({reason}): coordinator is {coordinator}, "
            f"processes is {processes}, process_id is {process_id}; expected the address and port "
            "of process 0, and process_id from 0 to processes - 1; call it before anything else "
            "that uses JAX"
        ) from error
    sys.excepthook = functools.partial(_exit_on_error, sys.excepthook)


def _lost(reason: str) -> ProcessLostError:
    return ProcessLostError(jax.process_index(), jax.process_count(), reason.splitlines()[0])


def _exit_on_error(hook: Any, kind: type, error: BaseException, trace: Any) -> None:
    """Ends the process after an exception: JAX's own exit would wait for the other processes."""
    if isinstance(error, ProcessLostError):
        print("; ".join([f"error: {error}", *recovery_notes(error)]), file=sys.stderr)
    else:
        hook(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def process_lost_errors() -> Iterator[None]:
    """Turns a collective operation that failed into ProcessLostError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # JAX raises some errors of XLA as ValueError.
        reason = message_of(error)
        is_lost = _LOST.match(reason) is not None and not isinstance(error, InputError)
        if not jax.distributed.is_initialized() or not is_lost:
            raise
        lost = _lost(reason)
        lost.__notes__ = getattr(error, "__notes__", [])
        raise lost from error


def are_joined() -> bool:
    """Returns whether the current mesh spans several processes, which then train together."""
    mesh = jax.sharding.get_mesh()
    return not mesh.empty and mesh.is_multi_process


def agree(value: Any) -> Any:
    """Returns the value of process 0, a number, so that all processes take the same decision."""
    if not are_joined():
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value)).item()


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order."""
    if not are_joined():
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.pad(content, (0, int(lengths.max()) - len(content)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def check_same_start(epoch: int, step: int) -> None:
    """Raises InputError if the processes resume at different steps."""
    starts = gather(f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}")
    for process, start in enumerate(starts):
        if start != starts[0]:
            raise InputError(
                f"process {process} resumes after {start}, and process 0 after {starts[0]}; "
                "expected one checkpoint folder, on a file system that all processes share"
            )


def writes_files() -> bool:
    """Returns whether this process writes files: of several that train together, process 0."""
    return not are_joined() or jax.process_index() == 0


def shows_progress() -> bool:
    """Returns whether this process shows progress: of several, process 0."""
    # Without the first condition, JAX would choose its devices here.
    return not jax.distributed.is_initialized() or jax.process_index() == 0
