"""What a program needs of the device's memory, what is free, and advice when it is too little."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxtrain._versions import current_device
from jaxtrain.errors import OutOfMemoryError, first_line, message_of

# The fraction of free memory that an estimate may use: matrix products need workspace.
USABLE_FRACTION = 0.5
# Parts of the messages of XLA's errors.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the device or the host has too little memory."""
    message = message_of(error)
    return isinstance(error, MemoryError) or any(words in message for words in _OUT_OF_MEMORY)


def working_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory of a program without its arguments, which are allocated already."""
    analysis = compiled.memory_analysis()
    if analysis is None:  # not all backends report it
        return 0
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def free_bytes() -> int:
    """Returns the memory that the device, or this process on a CPU, can still allocate."""
    stats = current_device().memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    import resource  # Unix only

    page = os.sysconf("SC_PAGE_SIZE")
    free = page * os.sysconf("SC_PHYS_PAGES")
    available = Path("/proc/meminfo")
    if available.exists():  # the pages of files that Linux caches are available
        lines = available.read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = Path("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and size.exists():
        free = min(free, limit - page * int(size.read_text().split()[0]))
    return max(free, 0)


@contextlib.contextmanager
def memory_advice(
    batch_size: int,
    lower: Callable[[int], jax.stages.Lowered] | None = None,
    argument: str = "batch_size",
) -> Iterator[None]:
    """Turns the device's "out of memory" into an error that names a batch size that fits.

    Args:
      batch_size: examples per step.
      lower: lowers the run's steps at a given batch size, to estimate the memory of the compiled
        program without running it; None if the memory does not depend on the batch size.
      argument: the argument that sets the batch size.

    Raises:
      OutOfMemoryError: the body needs more memory than is available.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        fitting, notes = None, list(getattr(error, "__notes__", []))
        if lower is not None:
            try:
                fitting = _fitting_batch_size(batch_size, lower, free_bytes())
            except Exception as failure:  # better no estimate than another error
                notes.append(f"the batch size that fits could not be estimated: {failure!r}")
        explained = OutOfMemoryError(batch_size, fitting, first_line(error), argument)
        explained.__notes__ = notes
        raise explained from error


def _fitting_batch_size(
    batch_size: int, lower: Callable[[int], jax.stages.Lowered], free: int
) -> int | None:
    """Returns the largest of batch_size / 2, / 4, ... at which the steps fit in `free` bytes."""
    while batch_size > 1:
        batch_size //= 2
        needed = working_bytes(lower(batch_size).compile())
        if needed <= USABLE_FRACTION * free:
            return batch_size
    return None
