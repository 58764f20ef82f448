"""What a program needs of the device's memory, and what is free."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from jaxtrain._versions import current_device

# The fraction of free memory that an estimate may use: matrix products need workspace.
USABLE_FRACTION = 0.5
# Parts of the messages of XLA's errors.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the device or the host has too little memory."""
    message = str(error) or type(error).__name__
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
    has_available = "SC_AVPHYS_PAGES" in os.sysconf_names
    free = page * os.sysconf("SC_AVPHYS_PAGES" if has_available else "SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = Path("/proc/self/statm")
    if limit != resource.RLIM_INFINITY and size.exists():
        free = min(free, limit - page * int(size.read_text().split()[0]))
    return max(free, 0)
