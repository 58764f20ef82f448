"""Follows the axis of the examples through a traced program, to prove that examples do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtrain._compiler import called_program


class BatchAxis(NamedTuple):
    """Where an array has its examples: index // stride % batch along the axis is the example."""

    axis: int
    stride: int = 1


class _UnknownError(Exception):
    """An operation may mix examples, or has no rule here."""


Axes = list[BatchAxis | None]


def keeps_examples_apart(program: Any, axes: Axes, batch: int) -> bool:
    """Returns whether every output provably depends on one example of the inputs, or on none.

    Args:
      program: the traced function, a `ClosedJaxpr`.
      axes: where each argument has its examples; None if it has none.
      batch: number of examples.
    """
    try:
        _follow(program, axes, batch)
    except _UnknownError:
        return False
    return True


def _follow(program: Any, axes: Axes, batch: int) -> Axes:
    jaxpr = getattr(program, "jaxpr", program)
    known: dict[Any, BatchAxis | None] = dict(zip(jaxpr.invars, axes, strict=True))

    def read(each: Any) -> BatchAxis | None:
        return None if hasattr(each, "val") else known.get(each)  # constants have no examples

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        if any(operands):
            name, inner = equation.primitive.name, called_program(equation)
            if inner is not None:
                results = _follow(inner, operands, batch)
            elif name in _RULES:
                results = _RULES[name](equation, operands, batch)
            else:
                raise _UnknownError
            known.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _one(found: set[BatchAxis], equation: Any) -> Axes:
    """Returns the same axis for all results."""
    if len(found) != 1:
        raise _UnknownError
    return [*found] * len(equation.outvars)


def _present(operands: Axes) -> list[BatchAxis]:
    return [each for each in operands if each is not None]


def _elementwise(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    rank = len(equation.outvars[0].aval.shape)
    for each, axis in zip(equation.invars, operands, strict=True):
        if axis is not None and len(each.aval.shape) != rank:
            raise _UnknownError
    return _one(set(_present(operands)), equation)


def _other_axes(*names: str) -> Callable[..., Axes]:
    """Returns the rule of operations that work along the axes in one of these parameters."""

    def rule(equation: Any, operands: Axes, batch: int) -> Axes:
        values = [equation.params[name] for name in names if name in equation.params]
        axes = values[0] if isinstance(values[0], Sequence) else (values[0],)
        if any(each.axis in axes for each in _present(operands)):
            raise _UnknownError
        return _elementwise(equation, operands, batch)

    return rule


def _removed_axes(name: str) -> Callable[..., Axes]:
    """Returns the rule of operations that remove the axes in a parameter."""

    def rule(equation: Any, operands: Axes, batch: int) -> Axes:
        del batch
        (found,) = set(_present(operands))
        axes = equation.params[name]
        if found.axis in axes:
            raise _UnknownError
        return _one({found._replace(axis=found.axis - sum(n < found.axis for n in axes))}, equation)

    return rule


def _untouched(is_untouched: Callable[[dict[str, Any], int, int], bool]) -> Callable[..., Axes]:
    """Returns the rule of operations that leave an axis alone, judged by their parameters."""

    def rule(equation: Any, operands: Axes, batch: int) -> Axes:
        axis, size = operands[0], 0
        if axis is not None:
            size = equation.invars[0].aval.shape[axis.axis]
        if axis is None or not is_untouched(equation.params, axis.axis, size):
            raise _UnknownError
        return _elementwise(equation, operands, batch)

    return rule


def _reshape(equation: Any, operands: Axes, batch: int) -> Axes:
    (found,) = _present(operands)
    shape, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params["dimensions"] is not None:
        raise _UnknownError
    # flat // stride % batch is the example, before and after.
    stride = found.stride * math.prod(shape[found.axis + 1 :])
    for axis, size in enumerate(new):
        inner, rest = divmod(stride, math.prod(new[axis + 1 :]))
        if rest == 0 and inner and size % (inner * batch) == 0:
            return [BatchAxis(axis, inner)]
    raise _UnknownError


def _broadcast(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    (found,) = _present(operands)
    return [found._replace(axis=equation.params["broadcast_dimensions"][found.axis])]


def _transpose(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    (found,) = _present(operands)
    return [found._replace(axis=equation.params["permutation"].index(found.axis))]


def _dot(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    contracted, batched = equation.params["dimension_numbers"]
    found, offset = set(), len(batched[0])
    for side, axis in enumerate(operands):
        used, rank = (*contracted[side], *batched[side]), len(equation.invars[side].aval.shape)
        free = [n for n in range(rank) if n not in used]
        if axis is not None:
            if axis.axis in contracted[side]:
                raise _UnknownError
            places = [*batched[side], *[-1] * (offset - len(batched[side])), *free]
            found.add(axis._replace(axis=places.index(axis.axis)))
        offset += len(free)
    return _one(found, equation)


def _convolution(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    axis, kernel = operands
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["batch_group_count"]
    if axis is None or kernel is not None or groups != 1 or axis.axis != numbers.lhs_spec[0]:
        raise _UnknownError
    return [axis._replace(axis=numbers.out_spec[0])]


def _gather(equation: Any, operands: Axes, batch: int) -> Axes:
    del batch
    values, indices = operands
    numbers = equation.params["dimension_numbers"]
    shape, rank = equation.invars[0].aval.shape, len(equation.outvars[0].aval.shape)
    outer = [n for n in range(rank) if n not in numbers.offset_dims]
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [n for n in range(len(shape)) if n not in removed]
    found = set()
    if indices is not None:
        found.add(indices._replace(axis=outer[indices.axis]))
    if values is not None and values.axis in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(values.axis)
        found.add(values._replace(axis=outer[numbers.start_indices_batching_dims[place]]))
    elif values is not None:
        is_whole = equation.params["slice_sizes"][values.axis] == shape[values.axis]
        if values.axis not in kept or not is_whole:
            raise _UnknownError
        found.add(values._replace(axis=numbers.offset_dims[kept.index(values.axis)]))
    return _one(found, equation)


def _scan(equation: Any, operands: Axes, batch: int) -> Axes:
    consts, carry = equation.params["num_consts"], equation.params["num_carry"]
    rows = [_shifted(each, -1) for each in operands[consts + carry :]]
    state = operands[consts : consts + carry]
    for _ in range(carry + 1):
        inputs = [*operands[:consts], *state, *rows]
        results = _follow(equation.params["jaxpr"], inputs, batch)
        # A carry that starts as a constant may have examples after a step.
        joined = [old or new for old, new in zip(state, results, strict=False)]
        if joined == state:
            break
        state = joined
    if any(new not in (None, old) for old, new in zip(state, results, strict=False)):
        raise _UnknownError
    return [*state, *(_shifted(each, 1) for each in results[carry:])]


def _shifted(axis: BatchAxis | None, by: int) -> BatchAxis | None:
    if axis is not None and axis.axis + by < 0:
        raise _UnknownError
    return None if axis is None else axis._replace(axis=axis.axis + by)


def _is_whole_slice(params: dict[str, Any], axis: int, size: int) -> bool:
    strides = params["strides"] or [1] * (axis + 1)
    return (params["start_indices"][axis], params["limit_indices"][axis]) == (0, size) and (
        strides[axis] == 1
    )


def _is_outside_window(params: dict[str, Any], axis: int, size: int) -> bool:
    del size
    return (
        params["window_dimensions"][axis] == params["window_strides"][axis] == 1
        and params["base_dilation"][axis] == 1
        and tuple(params["padding"][axis]) == (0, 0)
    )


_ELEMENTWISE = (
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "digamma", "div"),
    *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag"),
    *("integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min"),
    *("mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision", "rem"),
    *("round", "rsqrt", "select_n", "sharding_constraint", "shift_left", "sign", "sin", "sinh"),
    *("shift_right_arithmetic", "shift_right_logical", "sqrt", "square", "stop_gradient", "sub"),
    *("tan", "tanh", "xor"),
)
_RULES: dict[str, Callable[[Any, Axes, int], Axes]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        [
            *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or"),
            *("reduce_prod", "reduce_sum"),
        ],
        _removed_axes("axes"),
    ),
    **dict.fromkeys(
        ["concatenate", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "rev", "sort"],
        _other_axes("axis", "dimension", "dimensions"),
    ),
    **dict.fromkeys(
        ["reduce_window_max", "reduce_window_min", "reduce_window_sum"],
        _untouched(_is_outside_window),
    ),
    "split": _other_axes("axis"),
    "squeeze": _removed_axes("dimensions"),
    "slice": _untouched(_is_whole_slice),
    "dynamic_slice": _untouched(lambda params, axis, size: params["slice_sizes"][axis] == size),
    "pad": _untouched(
        lambda params, axis, size: tuple(params["padding_config"][axis]) == (0, 0, 0)
    ),
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
}
