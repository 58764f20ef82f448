"""Differences of two arrays, and how much of them rounding explains."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import ArrayLike

# How many times the measured effect of rounding is explained.
_FACTOR = 8


def differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Returns the absolute differences of entries; equal infinities differ by 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))


def difference(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the largest difference; infinity if one array has a NaN or another shape."""
    if np.shape(a) != np.shape(b):
        return math.inf
    found = float(differences(a, b).max(initial=0.0))
    return math.inf if math.isnan(found) else found


def largest(array: ArrayLike) -> float:
    """Returns the largest absolute value of the finite entries."""
    array = np.asarray(array)
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def relative(a: ArrayLike, b: ArrayLike, smallest: float = 1e-12) -> float:
    """Returns the largest difference relative to the largest entry of the first array."""
    return difference(a, b) / max(largest(a), smallest)


def explained(scale: float, tolerance: float, noise: float) -> float:
    """Returns the difference that rounding explains in an array.

    Args:
      scale: the largest entry of the array.
      tolerance: of rounding, relative to it.
      noise: the measured effect of rounding; infinity explains nothing.
    """
    return max(tolerance * scale, _FACTOR * noise if math.isfinite(noise) else 0.0)
