"""Checks that a model computes the outputs of each example from this example alone."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import parallel
from jaxtrain._compiler import inner_jaxprs, is_on_cpu, options_for
from jaxtrain._placement import is_key, to_numpy
from jaxtrain.dataset import (
    Dataset,
    describe_array,
    join_inputs,
    map_examples,
    named_arrays,
    shared_inputs,
)
from jaxtrain.errors import InputError
from jaxtrain.training.batch_axis import BatchAxis, keeps_examples_apart
from jaxtrain.training.checks import has_values
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import model_inputs
from jaxtrain.training.tracing import TRACED_ROWS, predict_alone, traced_prediction

# A larger change of an output than this fraction of the largest one is not explained by rounding.
_TOLERANCE = 1e-3
# Among so many examples, one that differs from the first is looked for.
_SEARCHED = 8
# Sizes of an axis of channels in front of an image.
_CHANNELS = (1, 3)


def check_independence(state: TrainState, source: Any) -> None:
    """Raises InputError if the other examples of a batch change the outputs of an example.

    Most models are proven right from their traced program, in a few milliseconds. Others are
    compiled without optimizations, and compute a batch in which another row is replaced. A program
    gives the same bits for the rows that stay, unless it mixes them. Where values are unknown, in a
    traced run or on other hosts, only the first is done.

    Args:
      state: the state before training.
      source: the training data.
    """
    if not state.model.independent_examples:
        return
    shapes = source.batch_shapes()
    traced = traced_prediction(state, source.sample, source.name)
    variables = (state.params, state.model_state)
    _warn_of_channels(traced.jaxpr.jaxpr, jax.tree.leaves(shapes.inputs), source.name)
    axes = [None] * len(jax.tree.leaves(variables))
    if keeps_examples_apart(traced.jaxpr, [*axes, *_batch_axes(join_inputs(shapes))]):
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


def _batch_axes(inputs: PyTree) -> list[BatchAxis | None]:
    """Returns where each array that the model receives has its examples."""
    count = len(jax.tree.leaves(shared_inputs(inputs)))
    return [BatchAxis(0, TRACED_ROWS)] * (len(jax.tree.leaves(inputs)) - count) + [None] * count


def _largest_change(state: TrainState, data: Dataset) -> float:
    """Returns how much an output changes with the other example; 0 if rounding explains it."""
    few = map_examples(np.asarray, data[:_SEARCHED])
    few = few.replace(inputs=jax.tree.map(np.asarray, model_inputs(few.replace(shared=None))))
    rows = [jax.tree.leaves(few[n : n + 1].inputs) for n in range(len(few))]
    other = next((n for n, row in enumerate(rows) if not _are_equal(row, rows[0])), None)
    if other is None:
        return 0.0

    def on_host(leaf: Any) -> Any:
        return leaf if is_key(leaf) else to_numpy(leaf)

    variables = jax.tree.map(on_host, (state.params, state.model_state))
    # Both examples are in each batch, so that its variance is not 0.
    start = [0, other] * (TRACED_ROWS // 2) + [0] * (TRACED_ROWS % 2)
    order = np.stack([start, start, start])
    order[1, 1], order[2, 0] = 0, other
    examples = [map_examples(operator.itemgetter(at), few) for at in order]
    batches = [jax.tree.map(on_host, join_inputs(each)) for each in examples]
    traced = predict_alone.trace(state.model, *variables, batches[0])
    options = options_for(traced.jaxpr)
    if is_on_cpu():
        options = options | {"xla_backend_optimization_level": 0}
    program = traced.lower().compile(compiler_options=options)
    first, *others = (jax.tree.leaves(program(*variables, inputs)) for inputs in batches)
    change = 0.0
    for found, changed in zip(others, order[1:] != order[0], strict=True):
        for ours, theirs in zip(first, found, strict=True):
            # Other outputs, such as scalars, are not one per example.
            if ours.shape[:1] == (TRACED_ROWS,) and not is_key(ours):
                x, y = (np.asarray(each, np.float64)[~changed] for each in (ours, theirs))
                finite = np.isfinite(x) & np.isfinite(y)
                difference = np.abs(x - y)[finite].max(initial=0.0)
                if difference > _TOLERANCE * np.maximum(abs(x), abs(y))[finite].max(initial=0.0):
                    change = max(change, float(difference))
    return change


def _are_equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _warn_of_channels(jaxpr: Any, inputs: list[Any], name: str) -> None:
    """Warns if a convolution takes an axis of channels for one of the image."""
    shapes = [(TRACED_ROWS, *leaf.shape[1:]) for leaf in inputs if leaf.ndim > 3]
    for equation in _equations(jaxpr) if shapes else ():
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


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation.params):
            yield from _equations(inner)
