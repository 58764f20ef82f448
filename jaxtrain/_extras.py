"""Optional dependencies: a failed import becomes an error that names the extra to install."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtrain.errors import MissingExtraError


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raises MissingExtraError if an import inside the block does not find its package.

    Args:
      extra: the extra of jaxtrain that installs the package.

    Example:
      >>> with needs_extra("data"):
      ...     from sklearn.datasets import load_digits
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name).partition(".")[0], extra) from error
