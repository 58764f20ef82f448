"""Advice for a run that does not fit in memory: a batch size that fits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxtrain._versions import current_device
from jaxtrain.errors import OutOfMemoryError

# Parts of the messages of XLA's errors.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
# The fraction of free memory that an estimate may use: matrix products need workspace.
_USABLE_FRACTION = 0.5

LowerAt = Callable[[int], jax.stages.Lowered]


@contextlib.contextmanager
def memory_advice(
    batch_size: int, lower: LowerAt | None = None, argument: str = "batch_size"
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
        message = str(error) or type(error).__name__
        is_memory = isinstance(error, MemoryError) or any(w in message for w in _OUT_OF_MEMORY)
        if not is_memory or isinstance(error, OutOfMemoryError):
            raise
        fitting = None
        if lower is not None:
            with contextlib.suppress(Exception):  # better no estimate than another error
                fitting = _fitting_batch_size(batch_size, lower, _free_bytes())
        explained = OutOfMemoryError(batch_size, fitting, message.splitlines()[0], argument)
        explained.__notes__ = getattr(error, "__notes__", [])
        raise explained from error


def _fitting_batch_size(batch_size: int, lower: LowerAt, free: int) -> int | None:
    """Returns the largest of batch_size / 2, / 4, ... at which the steps fit in `free` bytes."""
    while batch_size > 1:
        batch_size //= 2
        if _working_bytes(lower(batch_size)) <= _USABLE_FRACTION * free:
            return batch_size
    return None


def _working_bytes(lowered: jax.stages.Lowered) -> int:
    """Returns the memory of a program without its arguments, which are allocated already."""
    analysis = lowered.compile().memory_analysis()
    if analysis is None:  # not all backends report it
        return 0
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _free_bytes() -> int:
    """Returns the memory that the device, or this process on a CPU, can still allocate."""
    stats = current_device().memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    import resource  # Unix only

    page = os.sysconf("SC_PAGE_SIZE")
    has_available = "SC_AVPHYS_PAGES" in os.sysconf_names
    free = page * os.sysconf("SC_AVPHYS_PAGES" if has_available else "SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = Path("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and size.exists():
        free = min(free, limit - page * int(size.read_text().split()[0]))
    return max(free, 0)
