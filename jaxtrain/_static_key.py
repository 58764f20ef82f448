"""What decides whether two static values may share a compiled program."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np

_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def static_key(value: Any) -> Any:
    """Returns a hashable key, equal for two values only where a program for one is right for both.

    Numbers and strings count by type and value: 0, False, 0.0 and -0.0 compare equal in Python, and
    a program differs by them; NaN is equal to itself. Tuples and dataclasses count by their
    entries and fields, methods by their object, and all other objects by identity, whatever their
    `__eq__` says. The key is valid while the value is alive.
    """
    kind: Any = type(value)
    if kind in _SCALARS or isinstance(value, np.generic):
        return kind, repr(value)
    if isinstance(value, tuple):
        return kind, tuple(map(static_key, value))
    if kind is types.MethodType:
        return id(value.__func__), static_key(value.__self__)
    if dataclasses.is_dataclass(value) and value.__dataclass_params__.eq:  # type: ignore[union-attr]
        names = [field.name for field in dataclasses.fields(value) if field.compare]
        return kind, tuple(static_key(getattr(value, name, None)) for name in names)
    return id(value)


class ByKey:
    """A static argument of `jax.jit` that is compared by `static_key`."""

    def __init__(self, value: Any) -> None:
        self.value, self._key = value, static_key(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByKey) and self._key == other._key
