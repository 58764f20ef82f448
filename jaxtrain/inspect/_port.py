"""A PyTorch module and a JAX model of the same network, with the same weights and inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jaxtrain import adapters
from jaxtrain._compiler import bounded
from jaxtrain._differences import difference, relative
from jaxtrain._extras import needs_extra
from jaxtrain.dataset import check_inputs
from jaxtrain.errors import InputError, first_line
from jaxtrain.export import Conversion, conversions, misfits
from jaxtrain.model import Model
from jaxtrain.training.state import TrainState, init_state

# Outputs that differ by less have the right layout and order of features.
_SAME = 1e-3


class MisfitError(InputError):
    """Layers of a module and of a model have no counterpart."""


class Port(NamedTuple):
    """A state of a JAX model with the weights of a PyTorch module.

    Attributes:
      state: the state.
      inputs: the inputs in the layout of the model.
      conversion: how weights are converted.
      difference: of the outputs in evaluation, relative to the largest; infinite if their shapes
        differ.
      initial: the state with the model's own parameters.
      biases: names of biases that only the model has, which are 0 in the state.
    """

    state: TrainState
    inputs: PyTree
    conversion: Conversion
    difference: float
    initial: TrainState
    biases: Sequence[str] = ()


def port(
    module: Any,
    model: Any,
    inputs: PyTree,
    optimizer: optax.GradientTransformation | None,
    *,
    key: Key[Array, ""],
    mapping: Mapping[str, str] | None = None,
    model_inputs: PyTree = None,
    any_biases: bool = False,
) -> Port:
    """Returns a state of a JAX model with the weights of a PyTorch module, and its inputs.

    It has the layout of inputs and the order of features with the most similar outputs.

    Args:
      module: the PyTorch module, which is not changed.
      model: the same network as a Linen, NNX or Equinox module, or a `Model`.
      inputs: inputs of the module, [batch, ...]; arrays or tensors.
      optimizer: optimizer of the state.
      key: PRNG key of the state.
      mapping: as in `jaxtrain.export.load_torch`.
      model_inputs: the inputs in the model's layout. None takes them unchanged if the model then
        has the shapes of the weights; else images with their channels last, or without an axis for
        one channel.
      any_biases: whether layers may have a bias on one side alone.

    Raises:
      InputError: the module does not take the inputs, or its layers are not those of the model.
    """
    check_module(module)
    with needs_extra("torch"):
        from jaxtrain.inspect._torch_calls import Reference
    inputs = as_arrays(inputs)
    layouts = [as_arrays(model_inputs)] if model_inputs is not None else list(_layouts(inputs))
    for each in (inputs, *layouts):
        check_inputs(each)
    some = jax.tree.map(lambda leaf: leaf[:4], inputs)
    try:
        theirs = Reference(module).evaluate(some).outputs
        assert theirs is not None
    except Exception as error:  # of the module
        raise InputError(
            f"the module {type(module).__name__} does not take the inputs "
            f"({first_line(error)}); expected those that it is called with, [batch, ...]",
            argument="inputs",
        ) from error
    found: list[Port] = []
    errors: list[tuple[float, Exception]] = []
    for layout in layouts:
        state, biases = None, list[str]()
        try:
            sample = jax.tree.map(lambda leaf: leaf[:1], layout)
            state = init_state(model, optimizer, sample, key=key)
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            others = {n for n, _ in module.named_buffers() if not n.endswith(statistics)}
            source = {n: x for n, x in module.state_dict().items() if n not in others}
            if any_biases:
                source, biases = _with_our_biases(state, source)
            ways = conversions(state, source, mapping)
        except Exception as error:  # networks raise different types for a wrong shape
            is_misfit = state is not None and isinstance(error, InputError) and not error.argument
            error = MisfitError(str(error)) if is_misfit else error
            errors.append((_misfits(state, module), error))
            continue
        for way in ways:
            loaded = way.load(state)
            ours = evaluate(loaded, jax.tree.map(lambda leaf: leaf[:4], layout))
            distance = _difference(theirs, jax.tree.leaves(ours))
            found.append(Port(loaded, layout, way, distance, state, biases))
            if found[-1].difference <= _SAME:
                return found[-1]
    if not found:
        raise min(reversed(errors), key=lambda pair: pair[0])[1]  # of equal ones, channels last
    sure = [each for each in found if each.conversion.is_sure and each.difference < math.inf]
    return min(sure[:1] or found, key=lambda each: each.difference)


def without_dropout(model_or_module: Any) -> Any:
    """Returns the same network without dropout in training.

    Args:
      model_or_module: a `torch.nn.Module`, of which it returns a copy; or the `Model` of a state,
        `state.model`. A `Model` of plain functions is returned unchanged.
    """
    if isinstance(model_or_module, Model):
        return adapters.without_dropout(model_or_module)
    check_module(model_or_module)
    return adapters.torch.without_dropout(model_or_module)


def check_module(module: Any) -> None:
    """Raises InputError unless the module is one of PyTorch."""
    if not hasattr(module, "named_modules") or isinstance(module, type):
        raise InputError(
            f"the module is {module!r:.60}; expected a torch.nn.Module", argument="module"
        )


def as_arrays(inputs: PyTree) -> PyTree:
    """Returns arrays or tensors as arrays of NumPy."""

    def convert(leaf: Any) -> np.ndarray:
        return np.asarray(leaf.detach().cpu() if hasattr(leaf, "detach") else leaf)

    return jax.tree.map(convert, inputs)


def _layouts(inputs: PyTree) -> Iterator[PyTree]:
    """Yields the inputs unchanged, with the channels last, and without an axis for one."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    yield inputs
    if any(len(shape) > 2 for shape in shapes):
        yield jax.tree.map(lambda x: np.moveaxis(x, 1, -1) if x.ndim > 2 else x, inputs)
    if any(len(shape) > 2 and shape[1] == 1 for shape in shapes):
        yield jax.tree.map(lambda x: x[:, 0] if x.ndim > 2 and x.shape[1] == 1 else x, inputs)


def evaluate(state: TrainState, inputs: PyTree) -> PyTree:
    """Returns the outputs of a model in evaluation as arrays of NumPy."""
    outputs = _evaluate(state.model, state.params, state.model_state, inputs)
    return jax.tree.map(np.asarray, outputs)


@bounded
@functools.partial(jax.jit, static_argnums=0)
def _evaluate(model: Model, params: PyTree, model_state: PyTree, inputs: PyTree) -> PyTree:
    key = jax.random.key(0)  # of a model that draws
    return adapters.call_in_evaluation(model, params, model_state, inputs, key=key)[0]


def _difference(theirs: list[np.ndarray], ours: list[np.ndarray]) -> float:
    orders = axis_orders(theirs, ours)
    if orders is None:
        return math.inf
    pairs = zip(theirs, orders, ours, strict=True)
    return max((relative(x.transpose(order), y) for x, order, y in pairs), default=0.0)


def _with_our_biases(
    state: TrainState, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns tensors with the biases that the model has, and the names of those that are new."""
    theirs, ours = misfits(state, tensors)
    found, added = dict(tensors), []
    for layer in theirs:
        rest = {name: shape for name, shape in layer.shapes.items() if name != "bias"}
        same = (x for x in ours if {**x.shapes, "bias": ()} == {**rest, "bias": ()})
        if (other := next(same, None)) is None:
            continue
        ours.remove(other)
        name = f"{layer.name}.bias"
        if "bias" in layer.shapes:
            del found[name]
        elif "bias" in other.shapes:
            added.append(name)
            items = list(found.items())
            last = max(i for i, (key, _) in enumerate(items) if key in layer.tensors.values())
            items.insert(last + 1, (name, np.zeros(other.shapes["bias"], np.float32)))
            found = dict(items)
    return found, added


def _misfits(state: TrainState | None, source: Any) -> float:
    """Returns the number of layers without a counterpart."""
    try:
        return math.inf if state is None else sum(len(x) for x in misfits(state, source))
    except InputError:
        return 0


def axis_orders(
    theirs: Sequence[np.ndarray], ours: Sequence[np.ndarray]
) -> list[tuple[int, ...]] | None:
    """Returns how the axes of PyTorch's outputs are ordered in the model's, as for `transpose`.

    The channels may be first or last. Of several orders with the right shape, the one with the
    smallest difference is taken. None if an output has no order with the right shape.
    """
    if len(theirs) != len(ours):
        return None
    found = []
    for x, y in zip(theirs, ours, strict=True):
        axes = tuple(range(x.ndim))
        orders = [axes, (0, *axes[2:], 1), (0, axes[-1], *axes[1:-1])] if x.ndim > 2 else [axes]
        fitting = [order for order in orders if x.transpose(order).shape == y.shape]
        if not fitting:
            return None
        distances = [difference(x.transpose(order), y) for order in fitting]
        found.append(fitting[distances.index(min(distances))])
    return found
