"""The table of the rules: how each operation of PyTorch is computed in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """How an operation is computed.

    Attributes:
      function: from the arguments of the operation to its results.
      family: the heading of the operation in the documentation.
      random: whether the function takes a `key`.
    """

    function: Callable[..., Any]
    family: str
    random: bool


class Update(NamedTuple):
    """The result of an operation that also changes some of its arguments.

    Attributes:
      output: what the operation returns.
      changed: the new values of arguments, by position.
    """

    output: Any
    changed: dict[int, Any]


RULES: dict[str, Rule] = {}


def family(heading: str) -> Callable[..., Callable[[Callable], Callable]]:
    """Returns a function `register(*names, random=False)` for the operations under a heading."""

    def register(*names: str, random: bool = False) -> Callable[[Callable], Callable]:
        def add(function: Callable) -> Callable:
            RULES.update(dict.fromkeys(names, Rule(function, heading, random)))
            return function

        return add

    return register


def add_all(register: Callable[..., Any], functions: dict[str, Callable]) -> None:
    """Registers functions of JAX by the names of the operations that they compute."""
    for names, function in functions.items():
        register(*(f"aten.{name}" for name in names.split()))(function)


def promoted(*arrays: Any) -> list[Any]:
    """Returns arrays in their common dtype; None stays None."""
    dtype = jnp.result_type(*(x for x in arrays if x is not None))
    return [x if x is None else jnp.asarray(x, dtype) for x in arrays]


def along(vector: Any, axis: int, ndim: int) -> Any:
    """Returns a vector with the shape in which it is broadcast along an axis."""
    return vector.reshape((-1, *(1,) * (ndim - 1 - axis % ndim)))


def pair(value: Any, count: int) -> tuple[int, ...]:
    """Returns a setting of a layer per axis; one value is that of all axes."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * count if len(values) == 1 else values


def in_float32(x: jax.Array) -> jax.Array:
    """Returns an array of half precision in float32, for statistics."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
