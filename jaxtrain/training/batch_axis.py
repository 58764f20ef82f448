"""Follows the axis of the examples through a traced program, to prove that examples do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxtrain._compiler import called_program


class BatchAxis(NamedTuple):
    """Where an array has its examples: index // stride % examples along the axis is the example."""

    axis: int
    examples: int
    stride: int = 1

    def at(self, axis: int) -> BatchAxis:
        """Returns the same at another axis."""
        return self._replace(axis=axis)


Axes = list[BatchAxis | None]


def keeps_examples_apart(program: Any, axes: Axes) -> bool:
    """Returns whether every output provably depends on one example of the inputs, or on none.

    Args:
      program: the traced function, a `ClosedJaxpr`.
      axes: where each argument has its examples; None if it has none.
    """
    try:
        _follow(program, axes)
    except Exception:  # an operation that may mix examples, or has no rule here
        return False
    return True


def _follow(program: Any, axes: Axes) -> Axes:
    jaxpr = getattr(program, "jaxpr", program)
    known: dict[Any, BatchAxis | None] = dict(zip(jaxpr.invars, axes, strict=True))

    def read(each: Any) -> BatchAxis | None:
        return None if hasattr(each, "val") else known.get(each)  # constants have no examples

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        if any(operands):
            inner = called_program(equation)
            if inner is None:
                results = _RULES[equation.primitive.name](equation, operands)
            else:
                results = _follow(inner, operands)
            known.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _only(operands: Iterable[BatchAxis | None]) -> BatchAxis:
    """Returns the axis of all operands that have examples, which must agree."""
    (found,) = {each for each in operands if each is not None}
    return found


def _elementwise(equation: Any, operands: Axes) -> Axes:
    rank = len(equation.outvars[0].aval.shape)
    pairs = zip(equation.invars, operands, strict=True)
    _require(all(axis is None or len(each.aval.shape) == rank for each, axis in pairs))
    return [_only(operands)] * len(equation.outvars)


def _along(name: str) -> Callable[..., Axes]:
    """Returns the rule of operations along the axes in a parameter, which keep the shape."""

    def rule(equation: Any, operands: Axes) -> Axes:
        axes = equation.params[name]
        _require(_only(operands).axis not in (axes if isinstance(axes, Sequence) else (axes,)))
        return _elementwise(equation, operands)

    return rule


def _removing(name: str) -> Callable[..., Axes]:
    """Returns the rule of operations that remove the axes in a parameter."""

    def rule(equation: Any, operands: Axes) -> Axes:
        found, axes = _only(operands), equation.params[name]
        _require(found.axis not in axes)
        return [found.at(found.axis - sum(n < found.axis for n in axes))] * len(equation.outvars)

    return rule


def _sparing(is_spared: Callable[[dict[str, Any], int, int], bool]) -> Callable[..., Axes]:
    """Returns the rule of operations that may leave an axis of a size alone."""

    def rule(equation: Any, operands: Axes) -> Axes:
        axis = _only(operands[:1]).axis
        _require(is_spared(equation.params, axis, equation.invars[0].aval.shape[axis]))
        return _elementwise(equation, operands)

    return rule


def _is_whole_slice(params: dict[str, Any], axis: int, size: int) -> bool:
    limits = (params["start_indices"][axis], params["limit_indices"][axis])
    return limits == (0, size) and (params["strides"] is None or params["strides"][axis] == 1)


def _is_outside_window(params: dict[str, Any], axis: int, size: int) -> bool:
    names = ("window_dimensions", "window_strides", "base_dilation")
    return all(params[n][axis] == 1 for n in names) and not any(params["padding"][axis])


def _reshape(equation: Any, operands: Axes) -> Axes:
    found = _only(operands)
    shape, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    _require(equation.params["dimensions"] is None)
    # flat // stride % examples is the example, before and after.
    stride = found.stride * math.prod(shape[found.axis + 1 :])
    for axis, size in enumerate(new):
        inner, rest = divmod(stride, math.prod(new[axis + 1 :]))
        if rest == 0 and inner and size % (inner * found.examples) == 0:
            return [BatchAxis(axis, found.examples, inner)]
    raise ValueError


def _broadcast(equation: Any, operands: Axes) -> Axes:
    found = _only(operands)
    return [found.at(equation.params["broadcast_dimensions"][found.axis])]


def _transpose(equation: Any, operands: Axes) -> Axes:
    found = _only(operands)
    return [found.at(equation.params["permutation"].index(found.axis))]


def _dot(equation: Any, operands: Axes) -> Axes:
    contracted, batched = equation.params["dimension_numbers"]
    found, offset = [], len(batched[0])
    for side, axis in enumerate(operands):
        used, rank = (*contracted[side], *batched[side]), len(equation.invars[side].aval.shape)
        free = [n for n in range(rank) if n not in used]
        if axis is not None:
            _require(axis.axis not in contracted[side])
            is_batched = axis.axis in batched[side]
            place = batched[side].index(axis.axis) if is_batched else offset + free.index(axis.axis)
            found.append(axis.at(place))
        offset += len(free)
    return [_only(found)]


def _convolution(equation: Any, operands: Axes) -> Axes:
    found, numbers = _only(operands[:1]), equation.params["dimension_numbers"]
    _require(operands[1] is None and equation.params["batch_group_count"] == 1)
    _require(found.axis == numbers.lhs_spec[0])
    return [found.at(numbers.out_spec[0])]


def _gather(equation: Any, operands: Axes) -> Axes:
    values, indices = operands
    numbers = equation.params["dimension_numbers"]
    shape, rank = equation.invars[0].aval.shape, len(equation.outvars[0].aval.shape)
    outer = [n for n in range(rank) if n not in numbers.offset_dims]
    found = [] if indices is None else [indices.at(outer[indices.axis])]
    if values is not None and values.axis in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(values.axis)
        found.append(values.at(outer[numbers.start_indices_batching_dims[place]]))
    elif values is not None:
        _require(equation.params["slice_sizes"][values.axis] == shape[values.axis])
        removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [n for n in range(len(shape)) if n not in removed]
        found.append(values.at(numbers.offset_dims[kept.index(values.axis)]))
    return [_only(found)]


def _scan(equation: Any, operands: Axes) -> Axes:
    consts, carry = equation.params["num_consts"], equation.params["num_carry"]
    rows = [_shifted(each, -1) for each in operands[consts + carry :]]
    state = operands[consts : consts + carry]
    results: Axes = []
    for _ in range(carry + 1):
        results = _follow(equation.params["jaxpr"], [*operands[:consts], *state, *rows])
        # A carry that starts as a constant may have examples after a step.
        before, state = state, [old or new for old, new in zip(state, results, strict=False)]
        if state == before:
            break
    _require(all(new in (None, old) for old, new in zip(state, results, strict=False)))
    return [*state, *(_shifted(each, 1) for each in results[carry:])]


def _shifted(axis: BatchAxis | None, by: int) -> BatchAxis | None:
    _require(axis is None or axis.axis + by >= 0)
    return None if axis is None else axis.at(axis.axis + by)


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
_REDUCTIONS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or")
_RULES: dict[str, Callable[[Any, Axes], Axes]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((*_REDUCTIONS, "reduce_prod", "reduce_sum"), _removing("axes")),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), _along("axis")),
    **dict.fromkeys(("concatenate", "sort"), _along("dimension")),
    **dict.fromkeys(
        ("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
        _sparing(_is_outside_window),
    ),
    "split": _along("axis"),
    "rev": _along("dimensions"),
    "squeeze": _removing("dimensions"),
    "slice": _sparing(_is_whole_slice),
    "dynamic_slice": _sparing(lambda params, axis, size: params["slice_sizes"][axis] == size),
    "pad": _sparing(lambda params, axis, size: not any(params["padding_config"][axis])),
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
}
