"""Digests of functions and objects, by which a run recognizes its loss and what reads its data."""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import functools
import hashlib
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxtrain.checkpoint._identity import digest, digest_text, without_addresses
from jaxtrain.losses import name_of

_SCALARS = (type(None), int, float, complex, str, bytes, np.generic)
# The digest of each value by its id, with the value itself, so that its id stays its own.
_Seen: TypeAlias = dict[int, tuple[Any, str]]
# The special methods of a class that are compared.
_COMPARED = ("__call__", "__getitem__", "__getitems__", "__iter__", "__next__")
# Longer bytes, such as those of a table, are not written out.
_LONG = 4096
# How many rows of a memory-mapped array are compared.
_ROWS = 64


def describe_function(function: Any) -> str:
    """Returns the name of a function and a digest of what decides what it computes.

    That is, of a function, its instructions with their constants, its default arguments and the
    variables that it has captured; of a `functools.partial`, the function and the arguments; of a
    method or an object, the methods and constants of its class and the instance's fields, or what
    `pickle` would write of it. Arguments, variables and fields are compared by their content,
    functions among them by the same rules; of a memory-mapped array, 64 rows.

    Of the global variables that it reads, their values count if they are numbers, strings,
    arrays, tuples of these, or functions of the same module. Changes in other modules, in global
    classes and in global lists, dicts and other objects are not noticed.

    The digest does not depend on comments, docstrings, the place in the file or the process. It
    does depend on the version of Python, whose compilers differ.

    """
    return f"{name_of(function)} ({digest_function(function, set())})"


def digest_function(value: Any, opaque: set[str]) -> str:
    """Returns the digest of `describe_function`, also of any object.

    `opaque` receives the types of values that cannot be compared, such as locks and open files.
    """
    try:
        return _digest(value, {}, opaque)
    except Exception:  # whatever the objects raise that it reaches, RecursionError included
        opaque.add(type(value).__name__)
        return "unknown"


def _digest(value: Any, seen: _Seen, opaque: set[str]) -> str:
    if isinstance(value, bytes | bytearray) and len(value) > _LONG:
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, np.memmap):
        rows = value[:: max(1, -(-len(value) // _ROWS))] if value.ndim else value
        return f"array {value.shape} {digest(np.asarray(rows))}"
    if isinstance(value, np.ndarray | jax.Array) and not getattr(value.dtype, "hasobject", False):
        return f"array {digest(value)}"
    if id(value) not in seen:
        seen[id(value)] = value, "..."  # where the value contains itself
        parts = [_digest(part, seen, opaque) for part in _parts(value, opaque)]
        if isinstance(value, set | frozenset):
            parts.sort()
        seen[id(value)] = value, digest_text(f"{_class_name(type(value))}({', '.join(parts)})")
    return seen[id(value)][1]


def _parts(value: Any, opaque: set[str]) -> list[Any]:
    """Returns simpler values that together decide what a value computes."""
    if _is_of_grain(value):
        return _parts_of_grain(value)
    match value:
        case types.FunctionType() if value.__code__.co_filename.startswith("<@beartype"):
            # A type checker's wrapper, whose variables are named by addresses.
            return [vars(value)["__wrapped__"]]
        case types.FunctionType():
            # A variable may be captured before it has a value.
            cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
            captured = [cell.cell_contents for cell in cells]
            defaults = [value.__defaults__, _by_name(value.__kwdefaults__ or {})]
            return [*_instructions(value.__code__, value), *defaults, *captured]
        case functools.partial():
            return [value.func, value.args, _by_name(value.keywords)]
        case types.MethodType():
            return [value.__func__, *_instance(value.__self__)]
        case types.BuiltinFunctionType():
            return [value.__name__, value.__self__]
        case type():
            return [_class_name(value)]
        case types.ModuleType():
            return [value.__name__]
        case weakref.ReferenceType():
            return [value()]
        case Mapping():
            return [part for item in value.items() for part in item]
        case np.ndarray():  # of objects, such as strings
            return [value.shape, *value.ravel().tolist()]
        case list() | tuple() | set() | frozenset():
            return list(value)
    kind: Any = type(value)
    is_object = not callable(value) or _is_function(kind.__call__)
    if hasattr(value, "__wrapped__") and not is_object:  # such as by jax.jit
        return [value.__wrapped__]
    try:
        reduce = copyreg.dispatch_table.get(kind)
        reduced: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception:  # whatever an object raises that cannot be pickled
        opaque.add(kind.__name__)
        return [kind, without_addresses(repr(value))]
    own = (kind.__reduce_ex__, kind.__reduce__, getattr(kind, "__getstate__", None))
    default = (object.__reduce_ex__, object.__reduce__, object.__getstate__)
    if dataclasses.is_dataclass(value) or (own == default and reduce is None):
        return _instance(value)
    if isinstance(reduced, tuple):  # with the items of a container
        reduced = [list(each) if isinstance(each, Iterator) else each for each in reduced]
    return [kind, reduced]


def _is_of_grain(value: Any) -> bool:
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and module.split(".")[0] == "grain"


def _parts_of_grain(value: Any) -> list[Any]:
    """Returns what decides the examples of a data set or an iterator of Grain.

    That is, without its statistics, the options of threads and processes, and where an iterator is.
    """
    if isinstance(value, type | types.FunctionType):
        return [f"{value.__module__}.{value.__qualname__}"]

    def is_compared(name: str, each: Any) -> bool:
        if isinstance(value, Iterator) and name != "_parents" and not hasattr(each, "_parents"):
            return False
        return not name.endswith(("stats", "options", "_name", "has_child"))

    fields = getattr(value, "__dict__", {}).items()
    return [type(value), _by_name({name: each for name, each in fields if is_compared(name, each)})]


def _instructions(code: types.CodeType, function: types.FunctionType) -> list[Any]:
    """Returns the instructions of a function, of those inside it, and the globals they read."""
    parts = [code.co_varnames, code.co_argcount, code.co_flags, code.co_exceptiontable]
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        parts += [instruction.opname, "code" if isinstance(value, types.CodeType) else value]
        if isinstance(value, types.CodeType):
            parts += _instructions(value, function)
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found = function.__globals__.get(value)
            parts += [found] if _counts(found, function.__module__) else []
    return parts


def _instance(value: Any) -> list[Any]:
    """Returns the class of an object with its methods and constants, and the object's fields."""
    if isinstance(value, type):  # of a class method
        return [value]
    kind = type(value)
    members = {name: each for base in reversed(kind.__mro__) for name, each in vars(base).items()}
    # The functions of properties, class methods and static methods.
    members = {
        name: getattr(each, "fget", getattr(each, "__func__", each))
        for name, each in members.items()
        if name in _COMPARED or not name.startswith("__")
    }
    members = {name: each for name, each in members.items() if _counts(each, kind.__module__)}
    if dataclasses.is_dataclass(value):  # without cached properties
        names = [field.name for field in dataclasses.fields(value)]
        return [kind, _by_name(members), [getattr(value, name, None) for name in names]]
    state = object.__getstate__(value)  # __dict__, or a pair of it and the slots
    fields = state if isinstance(state, tuple) else (state,)
    return [kind, _by_name(members), *(_by_name(each or {}) for each in fields)]


def _counts(value: Any, module: str) -> bool:
    """Returns whether a global variable that a function of a module reads is compared."""
    if isinstance(value, tuple):
        return all(_counts(each, module) for each in value)
    if callable(value):
        return _is_function(value) and value.__module__ == module
    return isinstance(value, (*_SCALARS, np.ndarray, jax.Array))


def _is_function(value: Any) -> bool:
    """Returns whether something is a function written in Python, jitted or not."""
    return isinstance(getattr(value, "__wrapped__", value), types.FunctionType)


def _by_name(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items(), key=lambda item: item[0])


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
