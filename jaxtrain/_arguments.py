"""Checks of the arguments of public functions, on the host, before anything compiles."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

from jaxtrain._compiler import is_tracing
from jaxtrain.errors import InputError


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, eager: str | None = None
) -> None:
    """Raises InputError unless the arguments match a function's annotations.

    A public function that runs something begins with `check_arguments(name, locals())`. Flags,
    strings, choices, paths, functions, dicts, tuples and PRNG keys are checked; ranges and all that
    is annotated as something else are left to the function.

    Args:
      function: the function that was called.
      arguments: its arguments by name.
      eager: what to do instead, for a function that cannot be called while JAX traces.
    """
    if eager is not None and _are_traced(arguments):
        raise InputError(
            f"{function.__name__} is called inside a function that JAX traces, such as one under "
            f"jit or in sweep; expected arrays with values: {eager}"
        )
    for name, kinds in _kinds_of(inspect.unwrap(function)).items():
        value = arguments[name]
        if _KEY in kinds:
            if value is not None or _NONE not in kinds:
                check_key(value, name)
        elif not any(kind.accepts(value) for kind in kinds):
            expected = " or ".join(dict.fromkeys(kind.expected for kind in kinds))
            raise InputError(f"{name} is {describe(value)}; expected {expected}", argument=name)


def check_integer(value: Any, name: str, *, minimum: int, maximum: int | None = None) -> None:
    """Raises InputError unless `value` is an integer from `minimum` to `maximum`."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise InputError(
            f"{name} is {describe(value)}; expected an integer of at least {minimum}{upper}",
            argument=name,
        )


def check_number(name: str, value: Any, is_valid: Callable[[float], bool], expected: str) -> None:
    """Raises InputError unless `value` is a valid number; a traced one is not."""
    try:
        valid = not isinstance(value, (str, bytes)) and is_valid(float(value))
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise InputError(f"{name} is {describe(value)}; expected {expected}", argument=name)


def check_finite(**arguments: Any) -> None:
    """Raises InputError unless all arguments are finite numbers."""
    for name, value in arguments.items():
        check_number(name, value, np.isfinite, "a finite number")


def check_arrays(**arrays: Any) -> None:
    """Raises InputError unless all arguments, by name, are arrays of JAX or NumPy."""
    for name, array in arrays.items():
        if not isinstance(array, (jax.Array, np.ndarray, np.generic)):
            raise InputError(f"{name} is {describe(array)}; expected an array of JAX or NumPy")


def check_key(key: Any, name: str = "key") -> None:
    """Raises InputError unless `key` is a single PRNG key."""
    is_key = isinstance(key, jax.Array) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        or (key.dtype == jnp.uint32 and key.ndim == 1)  # jax.random.PRNGKey
    )
    if not is_key:
        raise InputError(
            f"{name} is {describe(key)}; expected a PRNG key, such as jax.random.key(0)",
            argument=name,
        )
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape:
        raise InputError(
            f"{name} is a batch of keys of shape {key.shape}; expected a single PRNG key: "
            "use one of them, or apply jax.vmap to the function"
        )


def axis_hint(predictions: tuple[int, ...], targets: tuple[int, ...]) -> str:
    """Returns a hint if two shapes differ by a last axis of length 1 only, else ""."""
    axes = ":" if min(len(predictions), len(targets)) == 1 else "..."
    if predictions == (*targets, 1) and targets:
        return f": give targets[{axes}, None]"
    if targets == (*predictions, 1) and predictions:
        return f": give targets[{axes}, 0]"
    return ""


def checked_path(path: Any, name: str) -> Path:
    """Returns the path of a file or a folder.

    Raises:
      InputError: it is not a path, or contains a null character.
    """
    if not _is_path(path):
        raise InputError(f"{name} is {describe(path)}; expected a path", argument=name)
    return Path(os.fsdecode(path))


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and "\0" not in os.fsdecode(value)


def check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """Returns the number of a process and the number of processes.

    Raises:
      InputError: they are out of range.
    """
    index, count = shard
    check_integer(count, "shard[1]", minimum=1)
    check_integer(index, "shard[0]", minimum=0, maximum=count - 1)
    return index, count


def describe(value: Any) -> str:
    """Returns a value for a message: its text, or dtype and shape of an array."""
    is_array = isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
    if isinstance(value, jax.core.Tracer) or (is_array and value.shape):
        kind = "traced array" if isinstance(value, jax.core.Tracer) else "array"
        return f"a{'n' * (kind == 'array')} {kind} of {value.dtype}{list(value.shape)}"
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = 100


def _are_traced(arguments: Mapping[str, Any]) -> bool:
    """Returns whether a function is called while JAX traces, or has traced arguments."""
    leaves: list[Any] = []
    for value in arguments.values():
        with contextlib.suppress(TypeError, ValueError):  # is not a pytree
            leaves += jax.tree.leaves(value, lambda each: isinstance(each, Iterator))
    return is_tracing() or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


class _Kind(NamedTuple):
    """What an annotation accepts."""

    expected: str
    accepts: Callable[[Any], bool]


_KEY = _Kind("a PRNG key", lambda value: False)  # `check_key` says more
_NONE = _Kind("None", lambda value: value is None)
_FLAG = _Kind("True or False", lambda value: isinstance(value, (bool, np.bool_)))
_STRING = _Kind("a string", lambda value: isinstance(value, str))
_PATH = _Kind("a path", _is_path)
_FUNCTION = _Kind("a function", callable)
_DICT = _Kind("a dict", lambda value: isinstance(value, Mapping))
_NAMES = _Kind(
    "a dict of strings",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(each, str) for pair in value.items() for each in pair)
    ),
)
_STRINGS = _Kind(
    "a sequence of strings",
    lambda value: (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(each, str) for each in value)
    ),
)


@functools.cache
def _kinds_of(function: Callable[..., Any]) -> dict[str, list[_Kind]]:
    """Returns what the parameters accept, by name, without those of other annotations."""
    found: dict[str, Any] = {}
    for name, text in function.__annotations__.items():
        if name != "return":
            annotation = eval(text, function.__globals__)  # as `typing.get_type_hints`, one by one
            is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
            parts = typing.get_args(annotation) if is_union else (annotation,)
            kinds = [_kind_of(part) for part in parts]
            if _PATH in kinds:
                kinds.remove(_STRING)
            if None not in kinds:
                found[name] = kinds
    return found


def _kind_of(annotation: Any) -> _Kind | None:
    """Returns what a part of an annotation accepts; None for what is checked elsewhere."""
    simple: dict[Any, _Kind] = {
        NoneType: _NONE,
        bool: _FLAG,
        str: _STRING,
        Sequence[str]: _STRINGS,
        Mapping[str, str]: _NAMES,
    }
    by_origin = {os.PathLike: _PATH, Mapping: _DICT}
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        *first, last = map(repr, args)
        return _Kind(
            f"{', '.join(first)} or {last}",
            lambda value: isinstance(value, str) and value in args,
        )
    if origin is tuple and ... not in args:
        return _Kind(
            "a pair" if len(args) == 2 else f"a tuple of {len(args)}",
            lambda value: isinstance(value, (tuple, list)) and len(value) == len(args),
        )
    if origin is Callable and args[0] is not ...:  # a loss, say, is checked where it is called
        return _FUNCTION
    if getattr(annotation, "dtype", None) is jaxtyping.Key:
        return _KEY
    return simple.get(annotation) or by_origin.get(origin)
