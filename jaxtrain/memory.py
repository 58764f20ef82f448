"""How much memory a run's compiled steps take, and the batch size that a device has room for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxtrain.devices import current_device
from jaxtrain.errors import OutOfMemoryError

# What XLA's errors say.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")
# Of the memory that is free, what an estimate may fill: matrix products take room of their own.
_SHARE = 0.5


@contextlib.contextmanager
def out_of_memory_explained(
    batch_size: int,
    lower: Callable[[int], jax.stages.Lowered] | None = None,
    flag: str = "batch_size",
) -> Iterator[None]:
    """Turn the device's "out of memory" into an error that says which batch size fits.

    Args:
      batch_size: examples a step.
      lower: the run's steps at another batch size, to be compiled for an estimate, not run; None
        where the batch size is not what it depends on.
      flag: the argument that sets the batch size.

    Raises:
      OutOfMemoryError: what runs in this context asked for more than there is.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        words = str(error) or type(error).__name__
        memory = isinstance(error, MemoryError) or any(word in words for word in _OUT_OF_MEMORY)
        if not memory or isinstance(error, OutOfMemoryError):
            raise
        fitting = None
        if lower is not None:
            with contextlib.suppress(Exception):  # an estimate that fails is none
                fitting = fitting_batch_size(batch_size, lower, free_bytes())
        explained = OutOfMemoryError(batch_size, fitting, words.splitlines()[0], flag)
        explained.__notes__ = getattr(error, "__notes__", [])
        raise explained from error


def fitting_batch_size(
    batch_size: int, lower: Callable[[int], jax.stages.Lowered], free: int
) -> int | None:
    """The largest half, quarter, … of a batch size whose compiled steps need less than `free`.

    Args:
      batch_size: what did not fit.
      lower: the steps at another batch size.
      free: bytes.

    Returns:
      A batch size, or None if not even one example fits.
    """
    while batch_size > 1:
        batch_size //= 2
        if _working_bytes(lower(batch_size)) <= _SHARE * free:
            return batch_size
    return None


def _working_bytes(lowered: jax.stages.Lowered) -> int:
    """What running takes beyond the arguments, which are there already."""
    analysis = lowered.compile().memory_analysis()
    if analysis is None:  # a backend that does not tell
        return 0
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def free_bytes() -> int:
    """Memory that the device, or this process on a CPU, can still have."""
    stats = current_device().memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    import resource  # of Unix alone

    page = os.sysconf("SC_PAGE_SIZE")
    free = page * os.sysconf(
        "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = Path("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and size.exists():
        free = min(free, limit - page * int(size.read_text().split()[0]))
    return max(free, 0)
