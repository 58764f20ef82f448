"""Moves traced values out of an optimizer into its state, so that the state can leave the trace.

An optimizer that is built under `jax.vmap` or `jax.jit` with a traced learning rate keeps the
tracer in the closures of its functions. These functions are static in a TrainState, so a state
that leaves the transformation would carry a leaked tracer. The jaxpr of an update could not
replace them: which arguments an update takes, a loss function for example, is known only when it
is called.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """Replaces a tracer; names the entry of `HoistedState.values` to use."""

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
    values: list[jax.core.Tracer] = []

    def to_slot(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        known = [index for index, value in enumerate(values) if value is leaf]
        if not known:
            values.append(leaf)
        return _Slot(known[0] if known else len(values) - 1)

    template = _copy(optimizer, to_slot, {})
    if not values:
        return optimizer, opt_state

    def update(
        updates: PyTree, state: HoistedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, HoistedState]:
        def to_value(leaf: Any) -> Any:
            return state.values[leaf.index] if isinstance(leaf, _Slot) else leaf

        inner = _copy(template, to_value, {})
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, HoistedState(inner_state, state.values)

    kind = type(optimizer)  # with extra arguments or without
    return kind(_refuse_init, update), HoistedState(opt_state, tuple(values))


def _refuse_init(params: PyTree) -> PyTree:
    raise InputError(
        "the optimizer was built with a traced argument, under jax.vmap for example, and cannot "
        "be initialized again; expected an optimizer built with numbers: build a new optimizer "
        "and pass it to with_optimizer"
    )


def _copy(node: Any, replace: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
    """Returns a copy of a function, container or object, with its leaves replaced.

    Args:
      node: what to copy.
      replace: called with everything that is not copied, such as arrays, modules and classes.
      copies: copies by the id of the original, so that what functions share stays shared.
    """
    if id(node) in copies:
        return copies[id(node)]
    visit = functools.partial(_copy, replace=replace, copies=copies)
    if isinstance(node, types.FunctionType):
        cells = tuple(map(visit, node.__closure__ or ()))
        if id(node) in copies:  # one of the cells refers to the function
            return copies[id(node)]
        result = types.FunctionType(node.__code__, node.__globals__, node.__name__, None, cells)
        copies[id(node)] = result
        result.__defaults__ = visit(node.__defaults__)
        result.__kwdefaults__ = visit(node.__kwdefaults__)
        result.__dict__.update(visit(node.__dict__))
        return result
    if isinstance(node, types.CellType):
        cell = copies[id(node)] = types.CellType()
        try:
            content = node.cell_contents
        except ValueError:  # of a variable that has no value yet
            return cell
        cell.cell_contents = visit(content)
        return cell
    if isinstance(node, types.MethodType):
        return types.MethodType(node.__func__, visit(node.__self__))
    if isinstance(node, functools.partial):
        return functools.partial(visit(node.func), *visit(node.args), **visit(node.keywords))
    if isinstance(node, tuple):
        children = map(visit, node)
        return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
    if hasattr(node, "__wrapped__") and hasattr(node, "lower"):  # jitted
        return visit(node.__wrapped__)  # inlined, since its caller is compiled
    if isinstance(node, (dict, list)):
        items = copies[id(node)] = copy.copy(node)
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            items[key] = visit(value)
        return items
    if not _is_copied_object(node):
        return replace(node)
    try:
        instance = copies[id(node)] = copy.copy(node)
    except Exception:  # some objects cannot be copied; a tracer inside them stays in place
        return replace(node)
    if instance is not node:  # copy returns some objects themselves, such as cached functions
        for name, value in vars(node).items():
            object.__setattr__(instance, name, visit(value))
    return instance


def _is_copied_object(node: Any) -> bool:
    is_instance = hasattr(node, "__dict__") and not isinstance(node, type)
    return is_instance and (callable(node) or dataclasses.is_dataclass(node))
