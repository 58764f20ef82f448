"""Follows the axes of a network's values to find which features each parameter meets.

PyTorch's images are [channels, height, width], and Flax's [height, width, channels]. Apart from
that, both write the same operations. So it is enough to know for each axis whether it is a height
or a width: features that are flattened from such axes are in another order in PyTorch. The order
is in doubt if it depends on how the PyTorch module is written, for example after a dense layer on
each pixel, which needs channels last in PyTorch as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain._compiler import ELEMENTWISE
from jaxtrain.dataset import named_arrays
from jaxtrain.training.state import TrainState

Shape = tuple[int, ...]

_REDUCTIONS = {f"reduce_{name}" for name in ("sum", "max", "min", "prod", "and", "or")}
_MOVES = {"transpose", "broadcast_in_dim", "squeeze", *_REDUCTIONS}
# These select or combine entries along some axes.
_ALONG_AXES = {
    *("slice", "dynamic_slice", "pad", "rev", "split", "sort"),
    *(f"cum{name}" for name in ("sum", "prod", "max", "min", "logsumexp")),
    *(f"reduce_window{name}" for name in ("", "_sum", "_max", "_min")),
}


class Axis(NamedTuple):
    """An axis along which a value depends on the inputs.

    Attributes:
      order: entry j of PyTorch is entry `order[j]` here; None if both are the same.
      is_sure: whether `order` is certain.
      is_spatial: whether PyTorch has it behind the channels, as the height of an image.
      is_split: whether it is a part of features that were one axis before.
    """

    order: np.ndarray | None = None
    is_sure: bool = True
    is_spatial: bool = False
    is_split: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch certainly has the same order."""
        return self.is_sure and self.order is None


_Axes = Sequence[Axis | None]  # None for an axis along which a value is constant


class _Value(NamedTuple):
    """A value of the traced program.

    Attributes:
      shape: its shape.
      axes: its axes; None if it does not depend on the inputs.
      is_sure: whether PyTorch has an image with the channels first, as a convolution returns it,
        rather than with the channels last.
      paths: parameters that it is made of; if it depends on the inputs, those that meet features
        later, such as the scale of a layer norm that is first multiplied by the deviation.
      varies: by axis, whether it varies with these parameters.
    """

    shape: Shape
    axes: _Axes | None = None
    is_sure: bool = True
    paths: frozenset[str] = frozenset()
    varies: tuple[bool, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether features are behind spatial axes, where PyTorch may have them before."""
        return _is_image(self.axes or (), self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch certainly has the same array."""
        return not self.is_image and all(axis.is_plain for axis in self.axes or () if axis)


@dataclasses.dataclass
class Uses:
    """How a network uses its parameters, by path, such as "params.Dense_0.kernel".

    Attributes:
      jaxpr: the traced program.
      features: the axis of the inputs that each parameter meets, in the order of first use; None
        for one that is constant along all of them.
      convolutions: kernels of convolutions, and whether these are transposed.
      results: position and result of the last operation of the program with the parameter.
      normalized: the inputs after elementwise operations without parameters, if there are any.
    """

    jaxpr: Any
    features: dict[str, Axis | None] = dataclasses.field(default_factory=dict)
    convolutions: dict[str, bool] = dataclasses.field(default_factory=dict)
    results: dict[str, tuple[int, Any]] = dataclasses.field(default_factory=dict)
    normalized: Any = None

    def note(self, operand: _Value, axes: _Axes) -> None:
        """Notes that the parameters of an operand meet a value that has these axes."""
        pairs = zip(axes, operand.varies, operand.shape, strict=True)
        met = [(axis, size) for axis, varies, size in pairs if axis and varies]
        is_sure = all(axis.is_sure for axis, _ in met)
        if _is_image([axis for axis, _ in met], [size for _, size in met]):
            # An array of equal sizes may be [channels, height, width] in PyTorch.
            is_sure &= len({size for _, size in met}) == len(met)
        orders = [axis.order for axis, _ in met if axis.order is not None]
        found = Axis(orders[0] if orders else None, is_sure and len(orders) < 2)
        for path in sorted(operand.paths):
            known = self.features.setdefault(path, None)
            if met:
                self.features[path] = _common([known or found, found])


def trace_uses(state: TrainState) -> Uses | None:
    """Traces a network in evaluation mode; returns None if the shapes of its inputs are unknown."""
    example = sample_shapes(state)
    if example is None:
        return None

    def call(params: PyTree, model_state: PyTree, inputs: PyTree) -> Any:
        key = jax.random.key(0)  # of a model that draws, which may be any
        return adapters.call_in_evaluation(state.model, params, model_state, inputs, key=key)[0]

    with jax.default_matmul_precision("highest"):  # for comparisons of outputs
        closed: Any = jax.make_jaxpr(call)(state.params, state.model_state, example)
    uses = Uses(closed)
    values = [_constant(x.aval.shape) for x in closed.jaxpr.constvars]
    for tree, name in ((state.params, "params"), (state.model_state, "model_state")):
        values += [_constant(x.shape, frozenset([path])) for path, x in named_arrays(tree, name)]
    for leaf in jax.tree.leaves(example):
        last = len(leaf.shape) - 1
        is_image = last > 2  # whose channels may be first or last
        axes = [Axis(is_spatial=is_image and 0 < i < last) for i in range(last + 1)]
        values.append(_data(leaf.shape, axes, not is_image))
    outputs = _run(closed.jaxpr, values, uses, is_outer=True)
    # Such as the image that a decoder makes of dense features.
    if any(sum(x.is_split for x in output.axes or () if x) > 2 for output in outputs):
        path = next(reversed(uses.features))
        uses.features[path] = Axis(is_sure=False)
    return uses


def sample_shapes(state: TrainState) -> PyTree | None:
    """Returns shapes and dtypes of inputs of one example, or None if they are unknown."""
    example = adapters.example_inputs(state.model)
    if example is None:
        return None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), example)


def _run(
    jaxpr: Any, values: Sequence[_Value], uses: Uses, *, is_outer: bool = False
) -> list[_Value]:
    """Runs a program on descriptions of values, and notes how it uses the parameters."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))
    is_normalizing = is_outer

    def read(x: Any) -> _Value:
        return _constant(np.shape(x.val)) if isinstance(x, Literal) else known[x]

    for position, equation in enumerate(jaxpr.eqns):
        operands, name = [read(x) for x in equation.invars], equation.primitive.name
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        shapes = [x.aval.shape for x in inner.invars] if inner is not None else None
        is_call = shapes == [x.shape for x in operands]
        if name == "scan":
            results = _scan(equation, operands, uses)
        elif is_call:
            constants = [_constant(x.aval.shape) for x in inner.constvars]
            results = _run(inner, [*constants, *operands], uses)
        else:
            results = [_result(equation, operands, x.aval.shape, uses) for x in equation.outvars]
        known.update(zip(equation.outvars, results, strict=True))
        if is_outer and any(x.axes is not None for x in results):
            met = frozenset() if is_call else frozenset().union(*(x.paths for x in operands))
            uses.results |= {path: (position, equation.outvars[0]) for path in met}
            is_normalizing &= not uses.features and name in ELEMENTWISE | {"reshape"}
            if is_normalizing and name != "reshape":
                uses.normalized = equation.outvars[0]
    return [read(x) for x in jaxpr.outvars]


def _result(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    """Returns the result of an operation."""
    name, others = equation.primitive.name, operands[1:]
    if name in ELEMENTWISE:
        return _elementwise(operands, shape, uses)
    if operands and not any(x.axes is not None or x.paths for x in others):
        sources = _sources(equation, operands[0].shape, shape)
        if sources is not None:
            return _moved(name, operands[0], sources, shape)
    if all(x.axes is None for x in operands):
        return _constant(shape, frozenset[str]().union(*(x.paths for x in operands)))
    operands = [_settled(x, uses) for x in operands]
    if name == "reshape":
        return _reshape(operands[0], shape, is_raw=not uses.features)
    if name == "conv_general_dilated" and operands[0].axes is not None:
        return _convolution(equation, operands, shape, uses)
    if name == "dot_general":
        return _dot(equation, operands, shape, uses)
    if name == "concatenate":
        return _concatenate(equation.params["dimension"], operands, shape, uses)
    # Of branches, nothing is known.
    is_opaque = any("jaxpr" in key or key == "branches" for key in equation.params)
    is_known = all(x.is_plain and not (is_opaque and x.paths) for x in operands)
    for x in operands:
        uses.note(x, [Axis(is_sure=is_known)] * len(x.shape))
    return _data(shape, [Axis(is_sure=is_known)] * len(shape))


def _elementwise(operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    full = [x for x in operands if len(x.shape) == len(shape)]
    paths = frozenset[str]().union(*(x.paths for x in operands))
    varies = tuple(any(x.varies[i] for x in full) for i in range(len(shape)))
    if all(x.axes is None for x in operands):
        return _Value(shape, None, True, paths, varies)
    axes, is_sure = _joined(full, shape)
    for x in operands:
        uses.note(x, axes if x.shape else ())
    varies = tuple(v and axis is None for v, axis in zip(varies, axes, strict=True))
    return _Value(shape, axes, is_sure, paths if any(varies) else frozenset(), varies)


def _joined(values: Sequence[_Value], shape: Shape) -> tuple[list[Axis | None], bool]:
    """Returns the axes of an operation on several values, and whether their layout is certain."""
    data = [x for x in values if x.axes is not None]
    axes: list[Axis | None] = []
    for i, size in enumerate(shape):
        pairs = [(x.axes[i], x.shape[i]) for x in data if x.axes is not None]
        found = [axis for axis, own in pairs if axis and (own > 1 or size == 1)]
        axes.append(_common(found) if found else None)
    is_sure = all(x.is_sure for x in data)
    for x in data:  # such as dense features that are added to an image
        own = [axis if mine else None for axis, mine in zip(axes, x.axes or (), strict=True)]
        is_sure &= _is_image(own, x.shape) == x.is_image
    return axes, is_sure


def _moved(name: str, value: _Value, sources: Sequence[int | None], shape: Shape) -> _Value:
    """Returns a value whose axes are some of those of another, given by `sources`."""
    varies = tuple(s is not None and value.varies[s] for s in sources)
    before = value.axes
    if before is None:
        return value._replace(shape=shape, varies=varies)
    axes = [None if s is None else before[s] for s in sources]
    if name not in _MOVES:
        axes = [x and x._replace(order=None, is_sure=x.is_plain) for x in axes]
    real = {i: x for i, x in enumerate(before) if x and value.shape[i] > 1}
    kept = [s for s in sources if s is not None and s in real]
    spatial = [s for s in kept if real[s].is_spatial]
    # Such as the mean of a layer norm for each pixel, which needs channels last in PyTorch.
    removed = [i for i, x in real.items() if i not in kept and not x.is_spatial]
    is_by_pixel = any(s < i for s in spatial for i in removed)
    is_sure = (value.is_sure or not spatial) and not is_by_pixel
    if kept != sorted(kept):
        is_sure = not (value.is_image and _is_image(axes, shape))
        if is_sure:  # the axes are in PyTorch's order, or are transposed on both sides
            axes = [x and x._replace(is_spatial=False) for x in axes]
    return _Value(shape, axes, is_sure, value.paths, varies)


def _reshape(value: _Value, shape: Shape, *, is_raw: bool) -> _Value:
    before = value.axes or ()
    axes: list[Axis | None] = [None] * len(shape)
    is_changed = False
    for old, new in _blocks(value.shape, shape):
        parts = [x for x in (before[i] for i in old) if x]
        is_changed |= len(parts) > 1 or bool(parts and len(new) > 1)
        if len(new) == 1:
            axes[new[0]] = before[old[0]] if len(old) == 1 else _merged(value, old)
        elif parts:
            is_plain = len(old) == 1 and parts[0].is_plain
            is_spatial = all(x.is_spatial for x in parts)
            for i in new:
                axes[i] = Axis(None, is_plain, is_spatial, not (is_raw or is_spatial))
    is_still_image = value.is_image and _is_image(axes, shape)
    return _data(shape, axes, value.is_sure and not (is_changed and is_still_image))


def _merged(value: _Value, indices: Sequence[int]) -> Axis | None:
    """Returns the axis that some adjacent axes of a value become."""
    axes = {i: x for i, x in enumerate(value.axes or ()) if x and value.shape[i] > 1}
    parts = {i: axes[i] for i in indices if i in axes}
    if len(parts) < len(indices):  # of one axis and repetitions, the order is the same
        is_plain = len(parts) == 1 and all(x.is_plain for x in parts.values())
        return Axis(is_sure=is_plain) if parts else None
    in_pytorch = sorted(axes, key=lambda i: (axes[i].is_spatial, i))
    places = [in_pytorch.index(i) for i in indices]
    sizes = [value.shape[i] for i in indices]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    for number, part in enumerate(parts.values()):
        order = order if part.order is None else order.take(part.order, number)
    order = order.transpose(np.argsort(places)).reshape(-1)
    are_adjacent = max(places) - min(places) < len(places)
    is_known = are_adjacent and (value.is_sure or places == sorted(places))
    return Axis(
        None if np.array_equal(order, np.arange(len(order))) else order,
        is_known and all(x.is_sure for x in parts.values()),
        all(x.is_spatial for x in parts.values()),
    )


def _convolution(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    value, kernel = operands
    axes, numbers = value.axes or (), equation.params["dimension_numbers"]
    features = axes[numbers.lhs_spec[1]]
    # Dense features may become an image with channels last, as in a decoder.
    is_split = features is not None and features.is_split and numbers.lhs_spec[1] > 1
    is_plain = all(axes[i].is_plain for i in numbers.lhs_spec[1:] if axes[i])
    met = Axis(is_sure=is_plain and not is_split)
    uses.note(kernel._replace(varies=(True,), shape=(2,)), [met])
    uses.convolutions |= dict.fromkeys(kernel.paths, set(equation.params["lhs_dilation"]) != {1})
    spatial = numbers.out_spec[2:]
    return _data(shape, [Axis(is_spatial=i in spatial) for i in range(len(shape))])


def _dot(equation: Any, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    contracted, batch = equation.params["dimension_numbers"]
    axes = [x.axes or [None] * len(x.shape) for x in operands]
    used = [(*contracted[side], *batch[side]) for side in (0, 1)]
    met = [[axes[side][i] for i in used[side]] for side in (0, 1)]
    for side, x in enumerate(operands):
        others = dict(zip(used[side], met[1 - side], strict=True))
        uses.note(x, [others.get(i) for i in range(len(x.shape))])
    pairs = [[x for x in pair if x] for pair in zip(*met, strict=True)]
    found = [x for pair in pairs for x in pair]
    is_known = any(x.paths for x in operands) or all(x.is_plain for x in found)
    is_image = any(x.is_image for x in operands)
    new = Axis(is_split=any(x.is_split for x in found))
    result = [_common(pair) if pair else None for pair in pairs[len(contracted[0]) :]]
    for side, x in enumerate(operands):
        free = [i for i in range(len(x.shape)) if i not in used[side]]
        result += [new if x.axes is None else axes[side][i] for i in free]
    result = [
        x and x._replace(is_sure=x.is_sure and is_known, is_spatial=x.is_spatial and is_image)
        for x in result
    ]
    return _data(shape, result, not is_image)


def _concatenate(at: int, operands: Sequence[_Value], shape: Shape, uses: Uses) -> _Value:
    axes, is_sure = _joined(operands, shape)
    parts = [(x.axes and x.axes[at]) or Axis() for x in operands]
    orders, start = [], 0
    for part, size in zip(parts, (x.shape[at] for x in operands), strict=True):
        orders.append(start + (np.arange(size) if part.order is None else part.order))
        start += size
    axes[at] = None
    for x in operands:
        uses.note(x, axes)
    order = None if all(x.order is None for x in parts) else np.concatenate(orders)
    axes[at] = _common(parts)._replace(order=order, is_sure=all(x.is_sure for x in parts))
    return _data(shape, axes, is_sure)


def _scan(equation: Any, operands: Sequence[_Value], uses: Uses) -> list[_Value]:
    """Traces the body of a loop, whose carry is the same in PyTorch if it is plain."""
    options = equation.params
    body, first = options["jaxpr"].jaxpr, options["num_consts"]
    last = first + options["num_carry"]
    operands = [_settled(x, uses) for x in operands]
    axis = Axis(is_sure=all(x.is_plain for x in operands[first:last]))
    carried = [_data(x.shape, [axis] * len(x.shape)) for x in operands[first:last]]
    entries = [
        x._replace(shape=x.shape[1:], axes=x.axes and x.axes[1:], varies=x.varies[1:])
        for x in operands[last:]
    ]
    constants = [_constant(x.aval.shape) for x in body.constvars]
    results = _run(body, [*constants, *operands[:first], *carried, *entries], uses)
    axis = Axis(is_sure=all(x.is_plain for x in results))
    return [_data(x.aval.shape, [axis] * len(x.aval.shape)) for x in equation.outvars]


def _constant(shape: Shape, paths: frozenset[str] = frozenset()) -> _Value:
    """Returns a value that does not depend on the inputs."""
    return _Value(shape, None, True, paths, tuple(bool(paths) and size > 1 for size in shape))


def _data(shape: Shape, axes: _Axes, is_sure: bool = True) -> _Value:
    """Returns a value without parameters that meet features later."""
    return _Value(shape, axes, is_sure, varies=(False,) * len(shape))


def _settled(value: _Value, uses: Uses) -> _Value:
    """Returns a value whose parameters have met its own features."""
    if value.axes is None or not value.paths:
        return value
    axes = [Axis() if v else axis for v, axis in zip(value.varies, value.axes, strict=True)]
    uses.note(value, axes)
    return _data(value.shape, axes, value.is_sure)


def _common(axes: Sequence[Axis]) -> Axis:
    """Returns the axis that axes of different values become together."""
    order = next((x.order for x in axes if x.order is not None), None)
    is_same = order is None or all(np.array_equal(x.order, order) for x in axes)  # type: ignore[arg-type]
    return Axis(
        order,
        is_same and all(x.is_sure for x in axes),
        any(x.is_spatial for x in axes),
        any(x.is_split for x in axes),
    )


def _is_image(axes: _Axes, shape: Sequence[int]) -> bool:
    found = [x.is_spatial for x, size in zip(axes, shape, strict=False) if x and size > 1]
    return found != sorted(found)


def _blocks(*shapes: Shape) -> Iterator[list[list[int]]]:
    """Yields the axes before and after a reshape that have the same entries, without sizes of 1."""
    totals = [list(itertools.accumulate(shape, operator.mul, initial=1)) for shape in shapes]
    for start, end in itertools.pairwise(sorted(set(totals[0]) & set(totals[1]))):
        yield [
            [i for i, x in enumerate(total[1:]) if total[i] != x and start < x <= end]
            for total in totals
        ]


def _sources(equation: Any, old: Shape, new: Shape) -> list[Any] | None:
    """Returns, for each axis of a result, the axis of the operand; None if that is unknown."""
    name, options, same = equation.primitive.name, equation.params, list(range(len(old)))
    if name == "transpose":
        return list(options["permutation"])
    if name == "broadcast_in_dim":
        at = {axis: i for i, axis in enumerate(options["broadcast_dimensions"])}
        return [at[i] if i in at and old[at[i]] == size else None for i, size in enumerate(new)]
    if name == "squeeze" or name in _REDUCTIONS:
        removed = options["dimensions" if name == "squeeze" else "axes"]
        return [i for i in same if i not in removed]
    if name == "gather" and len(old) == len(new):  # along one axis, as `jax.numpy.take` does
        numbers = options["dimension_numbers"]
        others = tuple(i for i in same if i not in numbers.start_index_map)
        is_kept = len(others) == len(old) - 1 and all(old[i] == new[i] for i in others)
        return same if is_kept and numbers.offset_dims == others else None
    return same if name in _ALONG_AXES else None
