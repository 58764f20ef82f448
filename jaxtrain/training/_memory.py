"""Advice for a run that does not fit in memory: a batch size that fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

from jaxtrain import _device_memory
from jaxtrain.errors import OutOfMemoryError

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
        if isinstance(error, OutOfMemoryError) or not _device_memory.is_out_of_memory(error):
            raise
        message = str(error) or type(error).__name__
        fitting = None
        if lower is not None:
            with contextlib.suppress(Exception):  # better no estimate than another error
                fitting = _fitting_batch_size(batch_size, lower, _device_memory.free_bytes())
        explained = OutOfMemoryError(batch_size, fitting, message.splitlines()[0], argument)
        explained.__notes__ = getattr(error, "__notes__", [])
        raise explained from error


def _fitting_batch_size(batch_size: int, lower: LowerAt, free: int) -> int | None:
    """Returns the largest of batch_size / 2, / 4, ... at which the steps fit in `free` bytes."""
    while batch_size > 1:
        batch_size //= 2
        needed = _device_memory.working_bytes(lower(batch_size).compile())
        if needed <= _device_memory.USABLE_FRACTION * free:
            return batch_size
    return None
