"""The table of the rules: how each operation of PyTorch is computed in JAX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rule(NamedTuple):
    """How an operation is computed.

    Attributes:
      function: from the arguments of the operation to its results.
      family: the heading of the operation in the documentation.
      random: whether the function takes a `key`.
      takes_last: whether the function takes and returns `ChannelsLast`.
    """

    function: Callable[..., Any]
    family: str
    random: bool
    takes_last: bool


class Update(NamedTuple):
    """The result of an operation that also changes some of its arguments.

    Attributes:
      output: what the operation returns.
      changed: the new values of arguments, by position.
    """

    output: Any
    changed: dict[int, Any]


RULES: dict[str, Rule] = {}


def family(heading: str) -> Callable[..., Any]:
    """Returns a function `register(*names, ...)` for the operations under a heading.

    Its options are `random`, see `Rule`, and `layout`: `channels_last` or `pointwise`.
    """

    def register(*names: str, random: bool = False, layout: Any = None) -> Any:
        def add(function: Callable) -> Callable:
            function = function if layout is None else layout(function)
            RULES.update(dict.fromkeys(names, Rule(function, heading, random, layout is not None)))
            return function

        return add

    return register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelsLast:
    """A tensor [batch, channels, *space], stored as an array [batch, *space, channels].

    Convolutions are faster so, and operations on each element keep the order. Where XLA is left to
    move the transpositions in between, it copies the activations.
    """

    array: jax.Array

    @functools.cached_property
    def channels_first(self) -> jax.Array:
        """The array in PyTorch's order."""
        return jnp.moveaxis(self.array, -1, 1)


def to_first(value: Any) -> Any:
    """Returns a value in PyTorch's order of the axes."""
    return value.channels_first if isinstance(value, ChannelsLast) else value


def channels_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a rule of a function whose first argument and result have channels last."""

    @functools.wraps(function)
    def rule(input: Any, *args: Any, **options: Any) -> Any:
        x = input.array if isinstance(input, ChannelsLast) else jnp.moveaxis(input, 1, -1)
        output = function(x, *map(to_first, args), **options)
        if isinstance(output, Update):
            return output._replace(output=ChannelsLast(output.output))
        if isinstance(output, tuple):
            return ChannelsLast(output[0]), *output[1:]
        return ChannelsLast(output)

    return rule


def pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a rule of a function of each element, for which the order of the axes is the same."""

    @functools.wraps(function)
    def rule(*args: Any, **options: Any) -> Any:
        others = [x for x in args if not isinstance(x, ChannelsLast)]
        if len(others) == len(args) or any(map(np.ndim, others)):
            return function(*map(to_first, args), **options)
        parts = (x.array if isinstance(x, ChannelsLast) else x for x in args)
        return ChannelsLast(function(*parts, **options))

    return rule


def add_all(register: Callable[..., Any], functions: dict[str, Callable], **options: Any) -> None:
    """Registers functions of JAX by the names of the operations that they compute."""
    for names, function in functions.items():
        register(*(f"aten.{name}" for name in names.split()), **options)(function)


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
