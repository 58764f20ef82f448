"""reuse_freed_memory: the C library keeps the memory that one call of a program frees."""

from __future__ import annotations

import ctypes

from jaxtrain.errors import InputError

# Parameters of glibc's `mallopt` with their values when memory is reused, and by default: see
# https://man7.org/linux/man-pages/man3/mallopt.3.html. Freed memory goes back to the kernel
# - where a block has a mapping of its own, as blocks of more than 32 MiB always have (M_MMAP_MAX);
# - where the end of the heap is free (M_TRIM_THRESHOLD);
# - where a thread has a heap of its own, whose size is limited to 64 MiB (M_ARENA_MAX).
_REUSE = {-4: 0, -1: 2**31 - 1, -8: 1}
_DEFAULT = {-4: 65536, -1: 128 * 1024, -8: 0}
# The same for a process that is to be started, such as one that measures PyTorch.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}


def reuse_freed_memory(enable: bool = True) -> bool:
    """Lets the C library reuse freed memory, instead of returning it to the kernel.

    XLA allocates the memory of intermediate results anew in each call of a program on a CPU. By
    default the C library returns large blocks to the kernel after the call, and in the next call
    the kernel fills each of their pages with zeros again. In a loop over `train_step` of a
    convolutional network, this may take 40 % of the time. `train_epoch` and `fit` take many steps
    per call, and gain little.

    It concerns all code of the process, and the process keeps more memory: the largest amount that
    it has used at once, and often further copies of a large block, since smaller ones divide it.
    Without a change of the program, the environment variables `MALLOC_MMAP_MAX_=0
    MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_ARENA_MAX=1` do the same.

    Args:
      enable: False restores the C library's defaults, for memory that is allocated from then on.

    Returns:
      Whether the C library has such settings: glibc on Linux has them.

    Raises:
      InputError: JAX has already started its threads, whose memory is not affected.

    Example:
      >>> jt.reuse_freed_memory()  # doctest: +SKIP
      True
    """
    if enable and _has_started():
        raise InputError(
            "JAX has already started the threads that run its programs; expected "
            "reuse_freed_memory() before the first operation of JAX, such as jax.random.key or "
            "jax.devices"
        )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # macOS, or musl
        return False
    settings = _REUSE if enable else _DEFAULT
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def _has_started() -> bool:
    """Returns whether JAX has opened a backend; False if its private function has moved."""
    from jax._src import xla_bridge

    return bool(getattr(xla_bridge, "backends_are_initialized", lambda: False)())
