"""Checks of optimizer arguments, which are numbers, or tracers inside `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxtrain import _arguments

# An array if jax.vmap maps over the argument.
Number: TypeAlias = float | Float[Array, ""]
LearningRate: TypeAlias = Number | optax.Schedule


def is_used(value: Number) -> bool:
    """Returns whether an argument is traced or differs from 0."""
    return isinstance(value, jax.core.Tracer) or bool(value != 0)


def check_learning_rate(learning_rate: LearningRate) -> None:
    """Raises InputError unless the rate is a finite number of at least 0, or a schedule."""
    if not callable(learning_rate):  # a schedule has no value yet
        check_not_negative(learning_rate=learning_rate)


def check_not_negative(**arguments: Any) -> None:
    """Raises InputError unless all arguments are at least 0, and finite in JAX's default dtype."""
    dtype = jnp.result_type(float)
    largest = float(jnp.finfo(dtype).max)
    expected = f"not negative and finite in {dtype}"
    for name, value in arguments.items():
        check_number(name, value, lambda number: 0 <= number <= largest, expected)


def check_fractions(**arguments: tuple[Any, ...]) -> None:
    """Raises InputError unless all numbers of all arguments are in [0, 1)."""
    for name, values in arguments.items():
        for value in values:
            check_number(name, value, lambda number: 0 <= number < 1, "in [0, 1)")


def check_number(name: str, value: Any, is_valid: Callable[[float], bool], expected: str) -> None:
    """Raises InputError if `value` is not a number or not valid; a traced one is not checked."""
    if not isinstance(value, jax.core.Tracer):
        _arguments.check_number(name, value, is_valid, f"a number that is {expected}")
