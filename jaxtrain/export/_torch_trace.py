"""Traces the order in which PyTorch stores the features that each parameter acts on.

PyTorch's images are [channels, height, width], Flax's [height, width, channels]. The trace follows
the axes of every value from the convolutions to the parameters. Some operations leave open whether
PyTorch's values are in PyTorch's usual layout or in the order as written, for example after a dense
layer that is applied to each pixel. So there are two readings, and a parameter for which they
differ is in doubt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain.dataset import named_arrays
from jaxtrain.training.state import TrainState

Shape = tuple[int, ...]
Order = np.ndarray | None

_ELEMENTWISE = {
    *("abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "cbrt", "ceil", "clamp"),
    *("convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv"),
    *("erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
    *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
    *("reduce_precision", "rem", "round", "rsqrt", "select_n", "sign"),
    *("sharding_constraint", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan"),
    *("tanh", "xor"),
}
_REDUCTIONS = {f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or")}
# These act along some axes, and keep the order of the axes.
_ALONG_AXES = {
    *("slice", "dynamic_slice", "pad", "rev", "split", "sort"),
    *(f"cum{name}" for name in ("sum", "prod", "max", "min", "logsumexp")),
    *(f"reduce_window{name}" for name in ("", "_sum", "_max", "_min")),
}
_LOST = -1


@dataclasses.dataclass
class Uses:
    """How a network uses its parameters, by path, such as "params.Dense_0.kernel".

    Attributes:
      order: position of the first operation that combines the parameter with the inputs.
      convolutions: whether the convolution that the parameter is the kernel of is transposed.
      feature_orders: by axis of the parameter, the order in which PyTorch has its entries: entry j
        of PyTorch is entry `order[j]` here; None if it is the same.
      unclear: parameters whose order in PyTorch is in doubt.
      results: the last operation that combines the parameter with the inputs, with its number.
      steps: number of these operations.
      normalized: operations on the inputs before they meet a parameter, other than reshapes; None
        for one that may move entries, unlike a normalization.
      jaxpr: the traced program.
      is_channels_first: whether PyTorch's values are read as in its usual layout, where that is
        not certain.
    """

    is_channels_first: bool
    jaxpr: Any
    order: dict[str, int] = dataclasses.field(default_factory=dict)
    convolutions: dict[str, bool] = dataclasses.field(default_factory=dict)
    feature_orders: dict[str, dict[int, Order]] = dataclasses.field(default_factory=dict)
    unclear: set[str] = dataclasses.field(default_factory=set)
    results: dict[str, tuple[int, Any]] = dataclasses.field(default_factory=dict)
    steps: int = 0
    normalized: list[Any] = dataclasses.field(default_factory=list)


class _Axis(NamedTuple):
    """An axis of a value.

    Attributes:
      place: sorts the axes as PyTorch has them; None if the value is constant along the axis.
      order: PyTorch's entry j is our entry `order[j]`; None if they are the same.
      is_clear: whether `order` is known.
      is_split: whether the axis is a part of features that were one axis before.
    """

    place: tuple[int, ...] | None = None
    order: Order = None
    is_clear: bool = True
    is_split: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value of the traced program.

    Attributes:
      shape: its shape.
      axes: its axes; None if it does not depend on the inputs.
      parameters: the parameters that it is made of: for each of its axes, the axis of the
        parameter, None if the parameter is constant along it, or _LOST. If the value depends on the
        inputs, only axes along which the inputs are constant.
      is_raw: whether no parameter contributes to it.
      is_as_written: whether PyTorch has its axes in our order by the reading, not by certainty.
    """

    shape: Shape
    axes: tuple[_Axis, ...] | None = None
    parameters: dict[str, tuple[int | None, ...]] = dataclasses.field(default_factory=dict)
    is_raw: bool = False
    is_as_written: bool = False

    @property
    def is_literal(self) -> bool:
        """Whether PyTorch has the axes in our order."""
        places = [axis.place for axis in self._real()]
        return places == sorted(places)

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch has the same array."""
        return self.is_literal and all(x.order is None and x.is_clear for x in self.axes or ())

    def _real(self) -> list[Any]:
        pairs = zip(self.axes or (), self.shape, strict=False)
        return [axis for axis, size in pairs if size > 1 and axis.place is not None]

    def literal(self) -> _Value:
        """Returns the value with the axes in our order."""
        axes = [
            x if x.place is None else x._replace(place=(i,)) for i, x in enumerate(self.axes or ())
        ]
        return dataclasses.replace(self, axes=tuple(axes))

    def as_written(self) -> _Value:
        """Returns the value read as written, unless it has one axis only."""
        several = len(self._real()) > 1
        return dataclasses.replace(self.literal(), is_as_written=several)

    def unclear(self) -> _Value:
        """Returns the value without knowledge of any order."""
        axes = tuple(_Axis((i,), is_clear=False) for i in range(len(self.shape)))
        return dataclasses.replace(self, axes=axes)


def trace_uses(state: TrainState) -> Uses | None:
    """Traces a network in evaluation mode; returns None if the shapes of its inputs are unknown."""
    example = sample_shapes(state)
    if example is None:
        return None

    def call(params: PyTree, model_state: PyTree, inputs: PyTree) -> Any:
        return state.model.apply(params, model_state, inputs, train=False, key=None)[0]

    jaxpr: Any = jax.make_jaxpr(call)(state.params, state.model_state, example)
    uses, other = (_read(jaxpr, state, example, is_first) for is_first in (True, False))
    uses.unclear |= other.unclear
    for path, orders in uses.feature_orders.items():
        others = other.feature_orders.get(path, {})
        if any(not _is_same(order, others.get(axis)) for axis, order in orders.items()):
            uses.unclear.add(path)
    return uses


def sample_shapes(state: TrainState) -> PyTree | None:
    """Returns shapes and dtypes of inputs of one example, or None if they are unknown."""
    example = adapters.example_inputs(state.model)
    if example is None:
        return None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), example)


def evaluate(
    uses: Uses, state: TrainState, inputs: PyTree, equations: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the results of operations, except for those inside a loop or a compiled function.

    Args:
      uses: the traced network.
      state: has its parameters.
      inputs: of one example.
      equations: the operations by name.
    """
    jaxpr = uses.jaxpr.jaxpr
    outer = {id(equation) for equation in jaxpr.eqns}
    found = {name: x.outvars[0] for name, x in equations.items() if id(x) in outer}
    debug_info = jaxpr.debug_info.with_unknown_names()
    jaxpr = jaxpr.replace(outvars=list(found.values()), debug_info=debug_info)
    function = jaxpr_as_fun(ClosedJaxpr(jaxpr, uses.jaxpr.consts))
    arrays = function(*jax.tree.leaves((state.params, state.model_state, inputs)))
    return dict(zip(found, arrays, strict=True))


def _read(closed: Any, state: TrainState, example: PyTree, is_channels_first: bool) -> Uses:
    """Traces the program in one of the two readings."""
    uses = Uses(is_channels_first, closed)
    values = [
        _Value(leaf.shape, parameters={path: tuple(range(len(leaf.shape)))})
        for tree, name in ((state.params, "params"), (state.model_state, "model_state"))
        for path, leaf in named_arrays(tree, name)
    ]
    has_channels_last = "_equinox" not in _framework(state.model.apply)
    for leaf in jax.tree.leaves(example):
        axes = tuple(_Axis((2 * i,)) for i in range(len(leaf.shape)))
        if has_channels_last and is_channels_first and len(axes) > 3:
            axes = (*axes[:-1], _Axis((1,)))  # behind the batch axis
        values.append(_Value(leaf.shape, axes, is_raw=True))
    constants = [_Value(x.aval.shape) for x in closed.jaxpr.constvars]
    outputs = _run(closed.jaxpr, [*constants, *values], uses)
    if any(_is_image_of_features(value) for value in outputs) and uses.results:
        uses.unclear.add(max(uses.results, key=lambda path: uses.results[path][0]))
    return uses


def _is_image_of_features(value: _Value) -> bool:
    """Returns whether a value has features in an image, as a decoder without convolutions has."""
    axes = [axis for axis, size in zip(value.axes or (), value.shape, strict=False) if size > 1]
    return sum(axis.is_split for axis in axes) > 2 or any(
        axis.order is not None or not axis.is_clear for axis in axes
    )


def _framework(apply: Any) -> str:
    """Returns the module of the adapter, also of one in mixed precision."""
    inner = getattr(apply, "apply", None)
    return f"{type(apply).__module__} {type(inner).__module__}"


def _run(jaxpr: Any, values: Sequence[_Value], uses: Uses) -> list[_Value]:
    """Runs a program on descriptions of values, and notes how it uses the parameters."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(x: Any) -> _Value:
        return _Value(np.shape(x.val)) if isinstance(x, Literal) else known[x]

    for equation in jaxpr.eqns:
        operands, name = [read(x) for x in equation.invars], equation.primitive.name
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        is_loop = name in ("scan", "while", "cond")
        if inner is not None and not is_loop and len(inner.invars) == len(operands):
            constants = [_Value(x.aval.shape) for x in inner.constvars]
            results = _run(inner, [*constants, *operands], uses)
        elif name == "scan":
            results = _scan(equation, operands, uses)
        elif any(x.axes is not None for x in operands):
            is_raw = all(x.is_raw for x in operands if x.axes is not None or x.parameters)
            results = [
                dataclasses.replace(_result(equation, operands, x.aval.shape, uses), is_raw=is_raw)
                for x in equation.outvars
            ]
        else:
            results = [_of_parameters(equation, operands, x.aval.shape) for x in equation.outvars]
        if uses.steps == 0 and results and results[0].is_raw and name != "reshape":
            uses.normalized.append(equation if name in _ELEMENTWISE else None)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _result(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    """Returns the result of an operation on values that depend on the inputs."""
    name = equation.primitive.name
    if name in _ELEMENTWISE and any(x.axes is not None and x.shape for x in operands):
        return _elementwise(equation, operands, shape, uses)
    data = [x for x in operands if x.axes is not None]
    sources = _sources(equation, data[0].shape, shape)
    is_alone = data == [operands[0]] and not any(x.parameters for x in operands[1:])
    if is_alone and sources is not None and name != "reshape":
        return _moved(equation, data[0], sources, shape, uses)
    operands = [_settled(equation, x, uses) for x in operands]
    rules: dict[str, Callable[..., _Value]] = {
        "conv_general_dilated": _convolution,
        "dot_general": _dot,
        "concatenate": _concatenate,
    }
    if name in rules:
        return rules[name](equation, operands, shape, uses)
    if is_alone and name == "reshape":
        return _reshape(next(x for x in operands if x.axes is not None), shape, uses)
    return _other(equation, operands, shape, uses)


def _other(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    """Returns the result of any other operation: the same in PyTorch if its operands are."""
    data = [x for x in operands if x.axes is not None]
    value = _Value(shape, tuple(_Axis((i,)) for i in range(len(shape))))
    is_known = all(x.is_plain for x in data)
    for operand in operands:
        for path in operand.parameters:
            _note_use(uses, equation, path)
            if not is_known:
                uses.unclear.add(path)
    if is_known:
        return dataclasses.replace(value, is_as_written=any(x.is_as_written for x in data))
    is_readable = all(dataclasses.replace(x).literal().is_plain for x in data)
    return value.as_written() if is_readable and not uses.is_channels_first else value.unclear()


def _elementwise(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    operands = [_broadcast(x, shape) for x in operands if x.shape or x.parameters]
    value = _joined([x for x in operands if x.axes is not None], uses)
    axes = value.axes or ()
    pending: dict[str, tuple[int | None, ...]] = {}
    for operand in operands:
        placed = [(i, axis) for i, axis in enumerate(axes) if axis.place is not None]
        _note(uses, equation, operand, placed if operand.shape else [])
        for path, of_parameter in operand.parameters.items():
            free = [axis.place is None and size > 1 for axis, size in zip(axes, shape, strict=True)]
            own = zip(of_parameter, free, strict=False)
            rest = tuple(axis if is_free else None for axis, is_free in own)
            if any(axis is not None for axis in rest):
                pending[path] = rest
    return dataclasses.replace(value, shape=shape, parameters=pending)


def _broadcast(value: _Value, shape: Shape) -> _Value:
    """Returns a value of the same number of axes in a larger shape."""
    if value.shape == shape or len(value.shape) != len(shape):
        return value
    same = [a == b for a, b in zip(value.shape, shape, strict=True)]
    axes = value.axes and tuple(x if s else _Axis() for x, s in zip(value.axes, same, strict=True))
    parameters = {
        path: tuple(x if s else None for x, s in zip(of_parameter, same, strict=True))
        for path, of_parameter in value.parameters.items()
    }
    return dataclasses.replace(value, shape=shape, axes=axes, parameters=parameters)


def _settled(equation: Any, value: _Value, uses: Uses) -> _Value:
    """Returns a value without axes that are those of a parameter only, in PyTorch the same."""
    if value.axes is None or not value.parameters:
        return value
    own = {
        i
        for of_parameter in value.parameters.values()
        for i, axis in enumerate(of_parameter)
        if axis is not None and value.shape[i] > 1
    }
    axes = [
        _Axis((i,), is_clear=value.is_literal) if i in own else x for i, x in enumerate(value.axes)
    ]
    _note(uses, equation, value, [(i, axes[i]) for i in own])
    found = dataclasses.replace(value, axes=tuple(axes), parameters={})
    return found.literal() if value.is_literal else found


def _joined(values: Sequence[_Value], uses: Uses) -> _Value:
    """Returns the layout that values of the same axes have together."""
    most = max(len(x._real()) for x in values)
    largest = [x for x in values if len(x._real()) == most]
    best = next((x for x in largest if x.is_literal != uses.is_channels_first), largest[0])
    axes = []
    for i, axis in enumerate(best.axes or ()):
        others = [x.axes[i] for x in values if x.axes and x.axes[i].place is not None]
        if axis.place is None and others:
            axis = others[0]
        is_same = all(_is_same(axis.order, x.order) and x.is_clear for x in others)
        is_split = any(x.is_split for x in others)
        axes.append(axis._replace(is_clear=axis.is_clear and is_same, is_split=is_split))
    value = dataclasses.replace(best, axes=tuple(axes))
    is_written = any(x.is_as_written for x in values)
    value = dataclasses.replace(value, is_as_written=is_written, parameters={})
    return value.literal() if is_written or all(x.is_literal for x in values) else value


def _convolution(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    value, kernel = operands
    if value.axes is None or kernel.axes is not None:
        return _other(equation, operands, shape, uses)
    dimensions, dilation = (equation.params[x] for x in ("dimension_numbers", "lhs_dilation"))
    inputs = [value.axes[i] for i in dimensions.lhs_spec[1:]]
    is_clear = all(x.order is None and x.is_clear for x in inputs) and not inputs[0].is_split
    for path in kernel.parameters:
        _note_use(uses, equation, path)
        uses.convolutions[path] = set(dilation) != {1}
        if not is_clear:
            uses.unclear.add(path)
    places = {axis: (place,) for place, axis in enumerate(dimensions.out_spec)}
    return _Value(shape, tuple(_Axis(places[i]) for i in range(len(shape))))


def _dot(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    contracted, batch = equation.params["dimension_numbers"]
    free = [
        [i for i in range(len(x.shape)) if i not in (*contracted[side], *batch[side])]
        for side, x in enumerate(operands)
    ]
    left, right = operands
    if left.axes is not None and right.axes is not None:
        axes = [left.axes[i] for i in (*batch[0], *free[0])] + [right.axes[i] for i in free[1]]
        pairs = [
            (left.axes[i], right.axes[j])
            for i, j in zip((*contracted[0], *batch[0]), (*contracted[1], *batch[1]), strict=True)
        ]
        is_written = left.is_as_written or right.is_as_written
        value = _Value(shape, tuple(axes), is_as_written=is_written)
        if not all(_is_same(a.order, b.order) and a.is_clear and b.is_clear for a, b in pairs):
            return value.unclear()
        is_literal = is_written or (left.is_literal and right.is_literal)
        return value.literal() if is_literal else value
    side = 0 if left.axes is not None else 1
    value, other = operands[side], operands[1 - side]
    of_value = value.axes or ()
    summed = [of_value[i] for i in contracted[side]]
    indices = zip(
        (*contracted[1 - side], *batch[1 - side]), (*contracted[side], *batch[side]), strict=True
    )
    _note(uses, equation, other, [(j, of_value[i]) for j, i in indices])
    start = min((x.place for x in summed if x.place is not None), default=(len(shape),))
    is_split = any(x.is_split for x in summed)
    new = [_Axis((*start, k), is_split=is_split) for k in range(len(free[1 - side]))]
    parts = [[of_value[i] for i in free[side]], new]
    axes = [*(of_value[i] for i in batch[side]), *parts[side], *parts[1 - side]]
    found = dataclasses.replace(value, shape=shape, axes=tuple(axes))
    if not other.parameters and not all(x.order is None and x.is_clear for x in summed):
        return found.unclear()
    if value.is_literal:
        return found.literal()
    return found if uses.is_channels_first else found.as_written()


def _concatenate(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    at = equation.params["dimension"]
    value = _joined([x for x in operands if x.axes is not None], uses)
    value = dataclasses.replace(value, shape=shape)
    parts = [x.axes[at] if x.axes is not None else _Axis() for x in operands]
    order, start = [], 0
    for operand, part in zip(operands, parts, strict=True):
        size = operand.shape[at]
        order.append(start + (np.arange(size) if part.order is None else part.order))
        start += size
        pairs = [(i, axis) for i, axis in enumerate(value.axes or ()) if i != at]
        _note(uses, equation, operand, pairs)
    axes, is_literal = list(value.axes or ()), value.is_literal
    axes[at] = _Axis(
        (at,) if axes[at].place is None else axes[at].place,
        _order(np.concatenate(order)),
        all(x.is_clear for x in parts),
        any(x.is_split for x in parts),
    )
    value = dataclasses.replace(value, axes=tuple(axes))
    return value.literal() if is_literal else value


def _moved(
    equation: Any, value: _Value, sources: Sequence[int | None], shape: Shape, uses: Uses
) -> _Value:
    """Returns a value whose axes are some of those of another."""
    before = value.axes or ()
    axes = [_Axis() if source is None else before[source] for source in sources]
    acted = {i for i, source in enumerate(sources) if source is not None} & _acted(
        equation, value, shape
    )
    for i in acted:
        axes[i] = axes[i]._replace(is_clear=axes[i].is_clear and axes[i].order is None)
    found = dataclasses.replace(value, shape=shape, axes=tuple(axes))
    if value.is_literal:
        return found.literal()
    kept = [source for source in sources if source is not None and value.shape[source] > 1]
    removed = set(range(len(before))) - {source for source in sources if source is not None}
    is_transposed = kept != sorted(kept)
    # Such as the mean over channels in a layer norm, which PyTorch needs at the last axis.
    is_over_channels = any(
        value.shape[a] > 1 and b < a and (before[a].place or ()) < (before[b].place or ())
        for a in removed
        for b in kept
    )
    if (is_transposed or is_over_channels) and not uses.is_channels_first:
        return found.as_written()
    return found


def _reshape(value: _Value, shape: Shape, uses: Uses) -> _Value:
    blocks = list(_blocks(value.shape, shape))
    is_changed = any(len(old) > 1 or len(new) > 1 for old, new in blocks)
    is_one = sum(size > 1 for size in shape) < 2
    written = value.is_as_written and not is_one
    if is_changed and not (is_one or value.is_literal or uses.is_channels_first):
        value, written = value.literal(), True
    before = value.axes or ()
    axes = [_Axis() for _ in shape]
    for old, new in blocks:
        parts = [before[i] for i in old]
        if len(old) == 1 and len(new) == 1:
            axes[new[0]] = parts[0]
        elif len(new) == 1:
            axes[new[0]] = _merged(value, old)
        else:
            places = [part.place for part in parts if part.place is not None]
            is_clear = len(old) == 1 and parts[0].order is None and parts[0].is_clear
            for number, axis in enumerate(new if places else ()):
                place = (*min(places), number)
                axes[axis] = _Axis(place, None, is_clear, not value.is_raw)
    return dataclasses.replace(value, shape=shape, axes=tuple(axes), is_as_written=written)


def _merged(value: _Value, indices: Sequence[int]) -> _Axis:
    """Returns the axis that some adjacent axes of a value become."""
    before = value.axes or ()
    placed = [i for i in indices if before[i].place is not None]
    if not placed:
        return _Axis()
    places: list[Any] = [before[i].place for i in placed]
    between = any(
        axis.place is not None and size > 1 and min(places) < axis.place < max(places)
        for i, (axis, size) in enumerate(zip(before, value.shape, strict=True))
        if i not in indices
    )
    if len(placed) == 1 and before[placed[0]].order is None:  # repeated entries
        return before[placed[0]]
    if len(placed) < len(indices) or between or not all(before[i].is_clear for i in indices):
        return _Axis(min(places), is_clear=False)
    sizes = [value.shape[i] for i in indices]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    for number, i in enumerate(indices):
        entries = before[i].order
        order = order if entries is None else order.take(entries, number)
    by_place = sorted(range(len(indices)), key=lambda number: places[number])
    return _Axis(min(places), _order(order.transpose(by_place).reshape(-1)))


def _blocks(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the axes before and after a reshape that have the same entries, without sizes of 1."""
    left = [i for i, size in enumerate(old) if size > 1]
    right = [i for i, size in enumerate(new) if size > 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        sizes = [old[a[0]], new[b[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                a.append(left.pop(0))
                sizes[0] *= old[a[-1]]
            else:
                b.append(right.pop(0))
                sizes[1] *= new[b[-1]]
        yield a, b


def _scan(equation: Any, operands: Sequence[_Value], uses: Uses) -> list[_Value]:
    """Traces the body of a loop until no further carry depends on the inputs."""
    options = equation.params
    body, first = options["jaxpr"].jaxpr, options["num_consts"]
    last = first + options["num_carry"]
    constants = [_Value(x.aval.shape) for x in body.constvars]
    operands = [_settled(equation, x, uses) for x in operands]
    carried = operands[first:last]
    entries = [
        _Value(
            x.shape[1:],
            None if x.axes is None else x.axes[1:],
            {path: axes[1:] for path, axes in x.parameters.items()},
            x.is_raw,
            x.is_as_written,
        )
        for x in operands[last:]
    ]
    results: list[_Value] = []
    for _ in range(len(carried) + 1):
        known = [value.axes is None for value in carried]
        results = _run(body, [*constants, *operands[:first], *carried, *entries], uses)
        carried = [
            new if old.axes is None else old if new.axes is None else _joined([old, new], uses)
            for old, new in zip(carried, results, strict=False)
        ]
        if [value.axes is None for value in carried] == known:
            break
    stacked = []
    for value, x in zip(results[len(carried) :], equation.outvars[len(carried) :], strict=True):
        found = _Value(x.aval.shape, is_as_written=value.is_as_written)
        if value.axes is not None:
            axes = (_Axis((-1,)), *value.axes)
            found = dataclasses.replace(found, axes=axes)
            found = found.literal() if value.is_literal else found
        stacked.append(found)
    return [*carried, *stacked]


def _of_parameters(equation: Any, operands: Sequence[_Value], shape: Shape) -> _Value:
    """Returns a value that is made of parameters and constants."""
    parameters: dict[str, tuple[int | None, ...]] = {}
    for operand in operands:
        sources = _sources(equation, operand.shape, shape)
        if operand.shape == () and equation.primitive.name in _ELEMENTWISE:
            sources = [None] * len(shape)
        for path, axes in operand.parameters.items():
            found = tuple(
                _LOST
                if sources is None
                else None
                if source is None
                else axes[source]
                if operand.shape[source] == shape[i]
                else _LOST
                for i, source in enumerate(sources or shape)
            )
            is_new = parameters.setdefault(path, found) == found
            parameters[path] = found if is_new else (_LOST,) * len(shape)
    return _Value(shape, parameters=parameters)


def _sources(equation: Any, old: Shape, new: Shape) -> list[int | None] | None:
    """Returns, for each axis of a result, the axis of the operand; None if that is unknown."""
    name, options = equation.primitive.name, equation.params
    if name == "transpose":
        return list(options["permutation"])
    if name == "broadcast_in_dim":
        at = {axis: i for i, axis in enumerate(options["broadcast_dimensions"])}
        return [at[i] if i in at and old[at[i]] == size else None for i, size in enumerate(new)]
    if name == "squeeze" or name in _REDUCTIONS:
        removed = options["dimensions" if name == "squeeze" else "axes"]
        return [i for i in range(len(old)) if i not in removed]
    if name == "reshape":
        pairs = list(_blocks(old, new))
        if any(len(a) > 1 or len(b) > 1 for a, b in pairs):
            return None
        found = {b[0]: a[0] for a, b in pairs}
        return [found.get(i) for i in range(len(new))]
    is_take = name == "gather" and _taken_axis(equation, old, new) is not None
    if is_take or name in _ALONG_AXES or (name in _ELEMENTWISE and old == new):
        return list(range(len(old)))
    return None


def _taken_axis(equation: Any, old: Shape, new: Shape) -> int | None:
    """Returns the axis along which a gather takes entries, as `jax.numpy.take` and resizing do."""
    numbers = equation.params["dimension_numbers"]
    if len(numbers.start_index_map) != 1 or len(old) != len(new):
        return None
    (axis,) = numbers.start_index_map
    is_kept = all(a == b for i, (a, b) in enumerate(zip(old, new, strict=True)) if i != axis)
    others = tuple(i for i in range(len(old)) if i != axis)
    return axis if is_kept and numbers.offset_dims == others else None


def _acted(equation: Any, value: _Value, shape: Shape) -> set[int]:
    """Returns the axes whose entries an operation selects or combines."""
    name, options = equation.primitive.name, equation.params
    if name == "gather":
        return {_taken_axis(equation, value.shape, shape) or 0}
    if name not in _ALONG_AXES:
        return set()
    axes = {i for i, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if a != b}
    axes |= {i for i, size in enumerate(options.get("window_dimensions", ())) if size > 1}
    if name == "rev":
        axes |= set(options["dimensions"])
    return axes | {options[key] for key in ("axis", "dimension") if key in options}


def _note(uses: Uses, equation: Any, operand: _Value, pairs: Sequence[tuple[int, _Axis]]) -> None:
    """Notes that an operand of parameters meets a value: its axis `i` meets `axis`."""
    for path, of_parameter in operand.parameters.items():
        _note_use(uses, equation, path)
        used = [
            (of_parameter[i], operand.shape[i], axis)
            for i, axis in pairs
            if operand.shape[i] > 1 and of_parameter[i] is not None
        ]
        orders = uses.feature_orders.setdefault(path, {})
        for own, _, axis in used:
            is_lost = own == _LOST and axis.order is not None
            is_other = own in orders and not _is_same(orders[own], axis.order)
            if is_lost or is_other or not axis.is_clear:
                uses.unclear.add(path)
            orders[_LOST if own is None else own] = axis.order
        # In another order of axes, the parameter of PyTorch has another shape, unless it is square.
        places = [(own, size, axis.place) for own, size, axis in used if axis.place is not None]
        places.sort(key=lambda x: x[0] or 0)
        moved = sorted(places, key=lambda x: x[2])
        if moved != places and [x[1] for x in moved] == [x[1] for x in places]:
            uses.unclear.add(path)


def _note_use(uses: Uses, equation: Any, path: str) -> None:
    uses.order.setdefault(path, len(uses.order))
    uses.steps += 1
    uses.results[path] = (uses.steps, equation)


def _order(order: np.ndarray) -> Order:
    return None if np.array_equal(order, np.arange(len(order))) else order


def _is_same(a: Order, b: Order) -> bool:
    return a is b or (a is not None and b is not None and bool(np.array_equal(a, b)))
