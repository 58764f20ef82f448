"""Several processes that train one model: joining them, agreeing on decisions, and ending."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import (
    InputError,
    ProcessLostError,
    first_line,
    message_of,
    recovery_notes,
)

# Codes of XLA's errors when a process or its network ends.
_LOST = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN|FAILED_PRECONDITION): "
)
# Seconds after which the other processes notice that one no longer responds.
_HEARTBEAT_SECONDS = 30
# How long JAX waits after our own timeout, at which it would abort the process with a stack dump.
_GRACE_SECONDS = 3600
# How many differences an error names, and how long each value may be.
_SHOWN, _LENGTH = 3, 80
# The smallest text that `gather` exchanges, so that few programs are compiled.
_TEXT_BYTES = 1024


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300,
    **options: Any,
) -> None:
    """Joins this process with others into one cluster, in which a mesh spans all their devices.

    Calls `jax.distributed.initialize`. Call it before anything else that uses JAX. If the processes
    have not joined within `timeout`, or if another process ends during `fit`, this one prints one
    line and exits with status 1; if process 0 ends, JAX aborts the others with a message of its
    own. After an uncaught exception, this process exits at once, so that the others do not wait for
    it.

    Args:
      coordinator: address and port of process 0, such as "10.0.0.1:1234". None, also for the other
        arguments, takes it from SLURM, Open MPI or a cloud's TPU environment.
      processes: number of processes.
      process_id: number of this process, from 0.
      timeout: seconds in which all processes must have started.
      **options: passed on to `jax.distributed.initialize`.

    Raises:
      InputError: the arguments are incomplete or out of range, the port of process 0 is in use, or
        JAX was used before.

    Example:
      >>> jt.parallel.initialize("10.0.0.1:1234", 2, process_id)  # doctest: +SKIP
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, mesh=mesh)
    """
    if "initialization_timeout" in options:
        raise InputError("initialization_timeout is given; expected timeout=, which sets it")
    options.setdefault("heartbeat_timeout_seconds", _HEARTBEAT_SECONDS)
    # Ignored where there are GPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    joined = threading.Event()
    try:
        address = None if coordinator is None else _host_and_port(coordinator)
        if not isinstance(timeout, int | float) or not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout is {timeout!r} seconds")
        if address is not None and process_id == 0 and "coordinator_bind_address" not in options:
            with socket.create_server(("", address[1])):
                pass  # JAX would abort if another program listened on the port
        limits = (joined, timeout, address, processes, process_id)
        threading.Thread(target=_exit_after_timeout, args=limits, daemon=True).start()
        options["initialization_timeout"] = int(timeout) + _GRACE_SECONDS
        jax.distributed.initialize(coordinator, processes, process_id, **options)
    except (RuntimeError, ValueError, TypeError, OSError, OverflowError) as error:
        raise InputError(
            f"the processes could not be joined ({first_line(error)}): coordinator is "
            f"{coordinator}, processes is {processes}, process_id is {process_id}; expected "
            "the address and a free port of process 0, and process_id from 0 to processes - 1; "
            "call it before anything else that uses JAX"
        ) from error
    finally:
        joined.set()
    sys.excepthook = functools.partial(_exit_on_error, sys.excepthook)


def _host_and_port(coordinator: Any) -> tuple[str, int]:
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("the coordinator has no port")
    return host.strip("[]"), int(port)


def _exit_after_timeout(
    joined: threading.Event,
    timeout: float,
    address: tuple[str, int] | None,
    processes: int | None,
    process_id: int | None,
) -> None:
    """Ends the process with one line unless it is joined in time: JAX itself would abort it."""
    if joined.wait(timeout):
        return
    found = "expected all processes to start within this time"
    if address is not None:
        host, port = address
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            found = (
                f"nothing answers at {host}:{port} ({error.strerror or error}); expected the "
                "address and port of process 0, which must have started"
            )
        else:
            found = (
                f"process 0 answers at {host}:{port}, so another process is missing; expected "
                "each process_id from 0 to processes - 1 once"
            )
    if not joined.is_set():
        who = "this process" if process_id is None else f"process {process_id} of {processes}"
        print(
            f"error: {who} could not join the others within "
            f"{timeout:g} seconds: {found}; start all processes again, or pass a longer timeout "
            "to jaxtrain.parallel.initialize",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


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
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # while JAX traces
        return False
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
    with process_lost_errors():
        lengths = multihost_utils.process_allgather(np.int32(len(content)))
        size = max(_TEXT_BYTES, 1 << int(lengths.max() - 1).bit_length())
        rows = multihost_utils.process_allgather(np.pad(content, (0, size - len(content))))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def check_same(
    describe: Callable[[], Mapping[str, Any]],
    expected: str = "the same program, arguments and data in every process",
) -> None:
    """Raises InputError in every process if something differs between them, and names it.

    Processes that train together must compute the same programs on the same values: JAX does not
    notice differences, and trains on a mixture. All processes call this at the same point.

    Args:
      describe: returns descriptions by name; called only if several processes train together.
      expected: what was expected, for the message.
    """
    if not are_joined():
        return
    failure = None
    try:
        texts = {name: str(value) for name, value in describe().items()}
    except Exception as error:  # the others wait for what this process describes
        failure, texts = error, {"an error": first_line(error)}
    found = [json.loads(each) for each in gather(json.dumps(texts))]
    if failure is not None:
        raise failure
    differences = []
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name, "missing") for each in found]
        other = next((i for i, value in enumerate(values) if value != values[0]), 0)
        if other:
            first, second = _clipped(values[0], values[other])
            differences.append(f"{name} is {first} on process 0 and {second} on process {other}")
    if differences:
        more = len(differences) - _SHOWN
        shown = "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(f"the processes differ: {shown}; expected {expected}")


def _clipped(first: str, second: str) -> tuple[str, str]:
    """Returns the parts of long texts where they differ."""
    same = sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, first, second)))
    start = max(0, same - _LENGTH // 2) if max(len(first), len(second)) > _LENGTH else 0
    before = "..." if start else ""
    return (
        before + first[start : start + _LENGTH],
        before + second[start : start + _LENGTH],
    )


def writes_files() -> bool:
    """Returns whether this process writes files: of several that train together, process 0."""
    return not are_joined() or jax.process_index() == 0


def shows_progress() -> bool:
    """Returns whether this process shows progress: of several, process 0."""
    # Without the first condition, JAX would choose its devices here.
    return not jax.distributed.is_initialized() or jax.process_index() == 0
