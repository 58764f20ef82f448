"""Checks that a model computes the outputs of each example from this example alone."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from typing import Any

import jax
import numpy as np

from jaxtrain import parallel
from jaxtrain._compiler import ELEMENTWISE, called_program, equations, is_on_cpu, options_for
from jaxtrain._placement import has_values, is_key, to_numpy
from jaxtrain.dataset import (
    Dataset,
    describe_array,
    join_inputs,
    map_examples,
    named_arrays,
)
from jaxtrain.errors import InputError
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import model_inputs
from jaxtrain.training.tracing import TRACED_ROWS, predict_alone, traced_prediction

# A larger change of an output than this fraction of the largest one is not explained by rounding.
_TOLERANCE = 1e-3
# Among so many examples, one that differs from the first is looked for.
_SEARCHED = 8
# Sizes of an axis of channels in front of an image.
_CHANNELS = (1, 3)
# Operations that leave an axis alone whose size they keep, and which they do not name as one of
# these parameters.
_AXES = ("axes", "axis", "dimension", "dimensions")
_KEEPING = ELEMENTWISE | {
    *(f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum")),
    *(f"cum{name}" for name in ("logsumexp", "max", "min", "prod", "sum")),
    *("argmax", "argmin", "broadcast_in_dim", "concatenate", "dot_general", "dynamic_slice"),
    *("rev", "slice", "sort", "split", "squeeze", "transpose"),
}


def check_independence(state: TrainState, source: Any) -> None:
    """Raises InputError if the other examples of a batch change the outputs of an example.

    Most models are proven right from their traced program, in a few milliseconds. Others are
    compiled without optimizations, and compute a batch in which another row is replaced. A program
    gives the same bits for the rows that stay, unless it mixes them. Where values are unknown, in a
    traced run or on other hosts, only the first is done.
    """
    if not state.model.independent_examples:
        return
    shapes = source.batch_shapes()
    traced = traced_prediction(state, source.sample, source.name)
    variables = (state.params, state.model_state)
    _warn_of_channels(traced.jaxpr.jaxpr, jax.tree.leaves(shapes.inputs), source.name)
    if _is_proven(traced.jaxpr.jaxpr, {TRACED_ROWS: 1}):
        return
    if not all(map(has_values, jax.tree.leaves((variables, source.sample)))):
        return
    change = 0.0
    # Whatever else is wrong with the model, its first step reports.
    with contextlib.suppress(Exception), parallel.without_mesh():
        change = _largest_change(state, source.sample)
    if change:
        found = ", ".join(
            f"{path} is {describe_array(leaf)}"
            for path, leaf in named_arrays(shapes.inputs, f"a batch of {source.name}.inputs")
        )
        raise InputError(
            f"in evaluation, the model's output for one example changes by {change:.2g} with the "
            f"other examples of its batch ({found}); expected examples that do not mix: images "
            "without channels need images[..., None], and a normalization over the batch is a "
            "batch norm with running statistics; where it is meant, as in a graph network, pass "
            "init_state(..., independent_examples=False)",
            argument="state",
        )


def _largest_change(state: TrainState, data: Dataset) -> float:
    """Returns how much an output changes with other examples; 0 if rounding explains it."""
    few = map_examples(np.asarray, data[:_SEARCHED])
    few = few.replace(inputs=jax.tree.map(np.asarray, model_inputs(few.replace(shared=None))))
    leaves = jax.tree.leaves(few.inputs)
    others = [n for n in range(len(few)) if any(not np.array_equal(x[n], x[0]) for x in leaves)]
    if not others:
        return 0.0

    def on_host(leaf: Any) -> Any:
        return leaf if is_key(leaf) else to_numpy(leaf)

    variables = jax.tree.map(on_host, (state.params, state.model_state))
    # The example in row 1 stays. Both are in each batch, so that its variance is not 0.
    n = others[0]
    orders = np.array([[0, n, 0, 0, 0], [n, n, n, n, 0]])
    examples = [map_examples(operator.itemgetter(at), few) for at in orders]
    batches = [jax.tree.map(on_host, join_inputs(each)) for each in examples]
    traced = predict_alone.trace(state.model, *variables, batches[0])
    options = options_for(traced.jaxpr)
    if is_on_cpu():
        options = options | {"xla_backend_optimization_level": 0}
    program = traced.lower().compile(compiler_options=options)
    change = 0.0
    for pair in zip(*(jax.tree.leaves(program(*variables, each)) for each in batches), strict=True):
        # Other outputs, such as scalars, are not one per example.
        if pair[0].shape[:1] == orders.shape[1:] and not is_key(pair[0]):
            x, y = (np.asarray(each[1], np.float64) for each in pair)
            finite = np.isfinite(x) & np.isfinite(y)
            difference = np.abs(x - y)[finite].max(initial=0.0)
            if difference > _TOLERANCE * np.maximum(abs(x), abs(y))[finite].max(initial=0.0):
                change = max(change, float(difference))
    return change


def _is_proven(jaxpr: Any, strides: dict[int, int]) -> bool:
    """Returns whether a program provably computes its outputs from one example each, or from none.

    It is traced for `TRACED_ROWS` examples. An axis whose size is a multiple of them is that of the
    examples: index // stride % TRACED_ROWS is the example. An array without such an axis is the
    same for all examples. Axes of one size have one stride, in `strides`, which grows. Operations
    that may mix examples, or have no rule here, are not proven.
    """
    return all(_keeps_examples_apart(equation, strides) for equation in jaxpr.eqns)


def _keeps_examples_apart(equation: Any, strides: dict[int, int]) -> bool:
    before, after = (
        [_axes_of_examples(each.aval) for each in arrays]
        for arrays in (equation.invars, equation.outvars)
    )
    if not any(before):
        return True
    name, params = equation.primitive.name, equation.params
    inner = params["jaxpr"] if name == "scan" else called_program(equation)
    if inner is not None:  # of which a scan receives one entry of some operands at a time
        inner = getattr(inner, "jaxpr", inner)
        counts = [len(_axes_of_examples(each.aval)) for each in inner.invars]
        return counts == list(map(len, before)) and _is_proven(inner, strides)
    if any(len(axes) > 1 for axes in before) or any(len(axes) != 1 for axes in after):
        return False
    pairs = zip((*equation.invars, *equation.outvars), (*before, *after), strict=True)
    found = [(each.aval.shape, axes[0]) for each, axes in pairs if axes]
    (shape, axis), (new, place) = found[0], found[-1]
    if name == "reshape":
        numbers = strides.get(shape[axis], 0) * math.prod(shape[axis + 1 :])  # of one example
        stride, rest = divmod(numbers, math.prod(new[place + 1 :]))
        fits = stride > 0 and rest == 0 and new[place] % (stride * TRACED_ROWS) == 0
        fits &= params.get("dimensions") is None
        return fits and strides.setdefault(new[place], stride) == stride
    if len({shape[axis] for shape, axis in found}) > 1:
        return False
    if name == "conv_general_dilated":
        return not before[1] and axis == params["dimension_numbers"].lhs_spec[0]
    if name == "gather":
        is_paired = axis in params["dimension_numbers"].operand_batching_dims
        return not before[0] or is_paired or params["slice_sizes"][axis] == shape[axis]
    if name == "pad":
        return not any(params["padding_config"][axis])
    if name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum"):
        return params["window_dimensions"][axis] == 1 and not any(params["padding"][axis])
    named = (params.get(each) for each in _AXES)
    used = [n for each in named for n in (each if isinstance(each, tuple) else (each,))]
    return name == "stack" or (name in _KEEPING and axis not in used)


def _axes_of_examples(array: Any) -> list[int]:
    sizes = enumerate(getattr(array, "shape", ()))
    return [axis for axis, size in sizes if size and size % TRACED_ROWS == 0]


def _warn_of_channels(jaxpr: Any, inputs: list[Any], name: str) -> None:
    """Warns if a convolution takes an axis of channels for one of the image."""
    shapes = [(TRACED_ROWS, *leaf.shape[1:]) for leaf in inputs if leaf.ndim > 3]
    for equation in equations(jaxpr) if shapes else ():
        if equation.primitive.name != "conv_general_dilated":
            continue
        image, kernel = (each.aval.shape for each in equation.invars)
        numbers = equation.params["dimension_numbers"]
        if image not in shapes:
            return  # the first convolution of an image decides
        _, features, *places = numbers.lhs_spec
        sizes = [image[n] for n in places]
        windows = [kernel[n] for n in numbers.rhs_spec[2:]]
        small = [m for m, n in enumerate(sizes) if n in _CHANNELS and windows[m] > 1]
        others = [*(n for m, n in enumerate(sizes) if m not in small), image[features]]
        if small and min(others) > max(_CHANNELS):
            n = places[small[0]]
            warnings.warn(
                f"a convolution takes axis {n} of {name}.inputs, of size {image[n]}, for an axis "
                f"of the image and axis {features}, of size {image[features]}, for its channels; "
                f"expected the channels at axis {features}: use numpy.moveaxis(images, {n}, "
                f"{features})",
                stacklevel=5,
            )
        return
