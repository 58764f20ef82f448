"""Moves traced values out of an optimizer into its state, so that the state can leave the trace.

An optimizer that is built under `jax.vmap` or `jax.jit` with a traced learning rate keeps the
tracer in the closures of its functions. These functions are static in a TrainState, so a state
that leaves the transformation would carry a leaked tracer.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jaxtrain.errors import InputError


class HoistedState(NamedTuple):
    """State of an optimizer that `hoist_tracers` rebuilt.

    Attributes:
      inner: state of the original optimizer.
      values: the values that its functions closed over as tracers.
    """

    inner: PyTree
    values: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Replaces a tracer in a closure; names the entry of `HoistedState.values` to use."""

    index: int


def hoist_tracers(
    optimizer: optax.GradientTransformation, params: PyTree
) -> tuple[optax.GradientTransformation, PyTree]:
    """Initializes an optimizer and moves its tracers into the state.

    Closures, defaults, partials, containers, dataclasses and callable objects are searched. A
    tracer elsewhere is not found and stays in place.

    Args:
      optimizer: any optax transformation.
      params: the parameters to optimize.

    Returns:
      An optimizer and its initial state. If the given optimizer closes over tracers, an equivalent
      one whose state, a `HoistedState`, contains their values; it can update, but not
      initialize again. Otherwise the given optimizer itself.
    """
    # Compiled as one program: run eagerly, each operation would be compiled separately.
    opt_state = jax.jit(optimizer.init)(params)
    if not (_holds(optimizer.init, jax.core.Tracer) or _holds(optimizer.update, jax.core.Tracer)):
        return optimizer, opt_state
    values: list[jax.core.Tracer] = []

    def to_slot(tracer: jax.core.Tracer) -> _Slot:
        for index, value in enumerate(values):
            if value is tracer:
                return _Slot(index)
        values.append(tracer)
        return _Slot(len(values) - 1)

    template = _substitute(optimizer.update, jax.core.Tracer, to_slot)

    def update(
        updates: PyTree, state: HoistedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, HoistedState]:
        inner_update = _substitute(template, _Slot, lambda slot: state.values[slot.index])
        updates, inner = inner_update(updates, state.inner, params, **extra_args)
        return updates, HoistedState(inner, state.values)

    kind = type(optimizer)  # with extra arguments or without
    return kind(_refuse_init, update), HoistedState(opt_state, tuple(values))


def _refuse_init(params: PyTree) -> PyTree:
    raise InputError(
        "the optimizer was built with a traced argument, under jax.vmap for example, and cannot "
        "be initialized again; expected an optimizer built with numbers: build a new optimizer "
        "and pass it to with_optimizer"
    )


def _holds(node: Any, kind: type, seen: dict[int, Any] | None = None) -> bool:
    """Returns whether an instance of `kind` can be reached from a function or container."""
    seen = {} if seen is None else seen
    if isinstance(node, kind):
        return True
    if id(node) in seen:
        return False
    seen[id(node)] = node  # kept alive, so that its id is not reused
    return any(_holds(child, kind, seen) for child in _children(node))


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, types.FunctionType):
        yield from (_content(cell) for cell in node.__closure__ or ())
        yield from (node.__defaults__, node.__kwdefaults__, node.__dict__)
    elif isinstance(node, types.MethodType):
        yield from (node.__self__, node.__func__)
    elif isinstance(node, functools.partial):
        yield from (node.func, node.args, node.keywords)
    elif isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, (tuple, list)):
        yield from node
    elif _is_jitted(node):
        yield node.__wrapped__
    elif _is_record(node):
        yield vars(node)


def _substitute(node: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Returns a copy of a function or container with all instances of `kind` replaced.

    Parts without instances are not copied. Cells that functions share stay shared.
    """
    copies: dict[int, Any] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, kind):
            return replace(node)
        if id(node) in copies:
            return copies[id(node)]
        if not _holds(node, kind):
            return node
        if isinstance(node, types.FunctionType):
            return visit_function(node)
        if isinstance(node, types.MethodType):
            return types.MethodType(visit(node.__func__), visit(node.__self__))
        if isinstance(node, functools.partial):
            return functools.partial(visit(node.func), *visit(node.args), **visit(node.keywords))
        if isinstance(node, dict):
            mapping = copies[id(node)] = copy.copy(node)
            mapping.update({key: visit(value) for key, value in node.items()})
            return mapping
        if isinstance(node, list):
            items: list[Any] = []
            copies[id(node)] = items
            items.extend(map(visit, node))
            return items
        if isinstance(node, tuple):
            children = [visit(child) for child in node]
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        if _is_jitted(node):
            return visit(node.__wrapped__)  # inlined, since its caller is compiled
        result = copies[id(node)] = copy.copy(node)
        for name, value in vars(node).items():
            object.__setattr__(result, name, visit(value))
        return result

    def visit_function(function: types.FunctionType) -> types.FunctionType:
        cells = [
            copies.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ()
        ]
        result = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, tuple(cells)
        )
        copies[id(function)] = result  # before visiting its content, which may refer to it
        result.__defaults__ = visit(function.__defaults__)
        result.__kwdefaults__ = visit(function.__kwdefaults__)
        result.__dict__.update(visit(function.__dict__))
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if _is_filled(original) and not _is_filled(cell):
                cell.cell_contents = visit(original.cell_contents)
        return result

    return visit(node)


def _content(cell: types.CellType) -> Any:
    return cell.cell_contents if _is_filled(cell) else None


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_jitted(node: Any) -> bool:
    return (
        not isinstance(node, type)
        and callable(node)
        and hasattr(node, "lower")
        and hasattr(node, "__wrapped__")
    )


def _is_record(node: Any) -> bool:
    """Returns whether a node is a dataclass or a callable object, whose attributes are searched."""
    if isinstance(node, type) or not hasattr(node, "__dict__"):
        return False
    return dataclasses.is_dataclass(node) or callable(node)
