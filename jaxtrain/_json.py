"""Converts values to JSON, and rounds learning rates for logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def to_json(value: Any) -> Any:
    """Returns the nearest JSON value; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def rounded(rate: Any) -> float:
    """Returns a float32 with its seven digits: 0.01, not 0.009999999776."""
    return float(f"{float(rate):.7g}")
