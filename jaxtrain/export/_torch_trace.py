"""What the traced program of a network tells about its parameters: their order and their use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain.dataset import named_arrays
from jaxtrain.training.state import TrainState

# Operations whose results are no longer the features of the convolution before them.
_ENDS_FEATURES = {
    *("conv_general_dilated", "dot_general", "reshape", "transpose", "gather"),
    *("scan", "while", "cond"),
}


class Uses(NamedTuple):
    """How a network uses its parameters, by path, such as "params.Dense_0.kernel".

    Attributes:
      order: position of the first operation that combines the parameter with the inputs.
      convolutions: whether the convolution that the parameter is the kernel of is transposed.
      flattened: by the kernel of a dense layer, the number of channels of the features [height,
        width, channels] that it flattens.
    """

    order: dict[str, int]
    convolutions: dict[str, bool]
    flattened: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value of the traced program.

    Attributes:
      shape: its shape.
      parameters: paths of the parameters that it is made of; None if it depends on the inputs.
      operation: name of the operation that returns it.
      options: parameters of the operation.
      operands: values that the operation takes.
    """

    shape: tuple[int, ...]
    parameters: frozenset[str] | None
    operation: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    operands: Sequence[_Value] = ()


def trace_uses(state: TrainState) -> Uses | None:
    """Traces a network in evaluation mode; returns None if the shapes of its inputs are unknown."""
    example = adapters.example_inputs(state.model)
    if example is None:
        return None

    def call(params: PyTree, model_state: PyTree, inputs: PyTree) -> Any:
        return state.model.apply(params, model_state, inputs, train=False, key=None)[0]

    closed: Any = jax.make_jaxpr(call)(state.params, state.model_state, example)
    jaxpr = closed.jaxpr
    variables: list[Any] = [*jaxpr.constvars, *jaxpr.invars]
    values = [_Value(x.aval.shape, frozenset()) for x in variables]
    first = len(jaxpr.constvars)
    named = named_arrays(state.params, "params")
    for index, (path, leaf) in enumerate(named, first):
        values[index] = _Value(leaf.shape, frozenset({path}))
    for index in range(len(values) - len(jax.tree.leaves(example)), len(values)):
        values[index] = dataclasses.replace(values[index], parameters=None)
    uses = Uses({}, {}, {})
    _run(jaxpr, values, uses)
    return uses


def _run(jaxpr: Any, values: Sequence[_Value], uses: Uses) -> list[_Value]:
    """Runs a program on descriptions of values, and notes how it uses the parameters."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(x: Any) -> _Value:
        return _Value(np.shape(x.val), frozenset()) if isinstance(x, Literal) else known[x]

    for equation in jaxpr.eqns:
        name, options = equation.primitive.name, equation.params
        operands = [read(x) for x in equation.invars]
        inner = options.get("jaxpr") or options.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        is_call = inner is not None and len(inner.invars) == len(operands)
        if is_call and name not in _ENDS_FEATURES:
            consts = [_Value(x.aval.shape, frozenset()) for x in inner.constvars]
            results = _run(inner, [*consts, *operands], uses)
        else:
            found = [x.parameters for x in operands]
            paths = frozenset[str]().union(*(x for x in found if x is not None))
            is_constant = None not in found
            if not is_constant:
                _note(name, options, operands, paths, uses)
            parameters = paths if is_constant else None
            results = [
                _Value(x.aval.shape, parameters, name, options, operands) for x in equation.outvars
            ]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _note(
    name: str, options: dict[str, Any], operands: list[_Value], paths: frozenset[str], uses: Uses
) -> None:
    """Notes an operation on the inputs and these parameters."""
    position = len(uses.order)  # the same for parameters of one operation, such as a loop
    for path in paths:
        uses.order.setdefault(path, position)
    if len(paths) != 1:
        return
    (path,) = paths
    if name == "conv_general_dilated":
        uses.convolutions[path] = set(options["lhs_dilation"]) != {1}
    elif name == "dot_general":
        channels = _flattened_channels(operands[0])
        if channels is not None:
            uses.flattened[path] = channels


def _flattened_channels(inputs: _Value) -> int | None:
    """Returns the channels of the convolution whose features were flattened; None if none were."""
    for value in _sources(inputs):
        if value.operation == "reshape":
            source = value.operands[0]
            if len(source.shape) > 2 and math.prod(source.shape[1:]) == inputs.shape[-1]:
                return source.shape[-1] if _are_of_convolution(source) else None
    return None


def _are_of_convolution(features: _Value) -> bool:
    """Returns whether features [..., channels] are those of a convolution."""
    return any(
        value.operation == "conv_general_dilated"
        and value.options["dimension_numbers"].out_spec[1] == len(value.shape) - 1
        and value.shape[-1] == features.shape[-1]
        for value in _sources(features)
    )


def _sources(value: _Value) -> Iterator[_Value]:
    """Yields a value and what it is computed from, up to the operations that end features."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if value.operation not in _ENDS_FEATURES:
            waiting += [x for x in value.operands if x.parameters is None and x.shape]
