"""Compares the outputs of a PyTorch module with those of the state that has its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PyTree

from jaxtrain._differences import relative
from jaxtrain.export._torch_layers import Layer
from jaxtrain.export._torch_match import TorchLayer
from jaxtrain.export._torch_trace import Uses, sample_shapes
from jaxtrain.training.state import TrainState

# What one side may do to the outputs of the other, such as the log-softmax of a classifier.
_LAST = (lambda x: x, jax.nn.log_softmax, jax.nn.softmax, jax.nn.sigmoid)


def compare_outputs(
    state: TrainState,
    module: Any,
    tensors: Mapping[str, Any] | None,
    pairs: Sequence[tuple[TorchLayer, Layer]],
    uses: Uses | None,
) -> str | None:
    """Returns how the outputs of both sides differ for the same random inputs.

    Args:
      state: the state, with the weights.
      module: the PyTorch module, which is not changed; anything else is not compared.
      tensors: the weights to run it with, by name; None for its own.
      pairs: layers of PyTorch with ours.
      uses: the traced network; None if there is none to compare.

    Returns:
      The difference as text; "" if there is none; None if the module does not take such inputs, in
      PyTorch's layout or in ours.
    """
    if uses is None or not hasattr(module, "named_modules"):
        return None
    tensors = module.state_dict() if tensors is None else tensors
    generator = np.random.default_rng(0)
    inputs = jax.tree.map(lambda x: _random(x, generator), sample_shapes(state))
    outputs = uses.jaxpr.jaxpr.outvars
    ours = [np.asarray(x, np.float32) for x in _evaluator(uses, outputs)(state, inputs)]
    tolerance = 5e-2 if "f16[" in str(uses.jaxpr) else 1e-3
    layers = {theirs.name: layer for theirs, layer in pairs}
    given = [jax.tree.leaves(inputs)]
    if uses.normalized is not None and len(given[0]) == 1:
        (array,) = _evaluator(uses, [uses.normalized])(state, inputs)
        given += [[array.reshape(x.shape)] for x in given[0] if x.size == array.size]
    found = [
        (max(map(_difference, theirs, ours), default=0.0), results)
        for arrays in given
        for arguments in _layouts(arrays)
        for theirs, results in _run_module(module, tensors, arguments, layers)
        if [x.size for x in theirs] == [x.size for x in ours]
    ]
    if not found:
        return None
    difference, results = min(found, key=lambda x: x[0])
    if difference <= tolerance:
        return ""
    own = layer_outputs(state, inputs, [pair for pair in pairs if pair[0].name in results], uses)
    names = [name for name in results if name in own]  # in PyTorch's order
    wrong = [x for x in names if not _has_same_entries(results[x], own[x], tolerance)]
    where = f", first after {wrong[0]} ({layers[wrong[0]].path})" if wrong else ""
    return (
        f"the outputs of the PyTorch module and of the state differ by {difference:.2g} of the "
        f"largest{where}; expected the same network, with the same padding, activations and order "
        "of layers (pass module.state_dict() if the difference is intended, such as inputs that "
        "only one side normalizes)"
    )


def layer_outputs(
    state: TrainState,
    inputs: PyTree,
    pairs: Sequence[tuple[TorchLayer, Layer]],
    uses: Uses,
) -> dict[str, np.ndarray]:
    """Returns the outputs of layers in evaluation by name in PyTorch, one axis for all entries."""
    last = {
        theirs.name: max(uses.results[path] for path in ours.paths if path in uses.results)[1]
        for theirs, ours in pairs
        if uses.results.keys() & set(ours.paths)
    }
    function = _evaluator(uses, list(last.values()))
    size = len(jax.tree.leaves(inputs)[0])
    found = [
        function(state, jax.tree.map(lambda leaf: leaf[i : i + 1], inputs))  # noqa: B023
        for i in range(size)  # the program is that of one example
    ]
    arrays = [np.concatenate([x.reshape(-1) for x in each]) for each in zip(*found, strict=True)]
    return dict(zip(last, arrays, strict=True))


def _evaluator(uses: Uses, variables: list[Any]) -> Callable[[TrainState, PyTree], list[Any]]:
    """Returns a function that returns the values of some variables of the traced program."""
    jaxpr = uses.jaxpr.jaxpr
    debug_info = jaxpr.debug_info.with_unknown_names()
    jaxpr = jaxpr.replace(outvars=variables, debug_info=debug_info)
    function = jax.jit(jaxpr_as_fun(ClosedJaxpr(jaxpr, uses.jaxpr.consts)))

    def evaluate(state: TrainState, inputs: PyTree) -> list[Any]:
        arrays = function(*jax.tree.leaves((state.params, state.model_state, inputs)))
        return [np.asarray(x) for x in arrays]

    return evaluate


def _random(shape: jax.ShapeDtypeStruct, generator: np.random.Generator) -> np.ndarray:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return generator.normal(size=shape.shape).astype(shape.dtype)
    limit = 256 if shape.dtype == np.uint8 else 2  # pixels, or tokens of any vocabulary
    return generator.integers(0, limit, shape.shape).astype(shape.dtype)


def _layouts(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields the inputs as they are, with channels first, and with an axis for one channel."""
    yield [np.array(x, order="C") for x in arrays]
    yield [np.array(np.moveaxis(x, -1, 1) if x.ndim > 2 else x, order="C") for x in arrays]
    yield [np.array(x[:, None], order="C") for x in arrays]


def _run_module(
    module: Any, tensors: Mapping[str, Any], arguments: Sequence[np.ndarray], names: Any
) -> list[tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Returns the outputs of a module and of its layers in the order of calls; [] if it fails."""
    import torch

    device = next((x.device for x in module.parameters()), None)
    layers: dict[str, np.ndarray] = {}

    def record(name: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                layers[name] = output.float().cpu().numpy()

        return hook

    training = {layer: layer.training for layer in module.modules()}
    hooks = [x.register_forward_hook(record(n)) for n, x in module.named_modules() if n in names]
    try:
        module.eval()
        weights = {name: tensor.to(device) for name, tensor in tensors.items()}
        values = [torch.from_numpy(x).to(device) for x in arguments]
        with torch.no_grad():
            outputs = torch.func.functional_call(module, weights, tuple(values), tie_weights=False)
        return [([x.float().cpu().numpy() for x in jax.tree.leaves(outputs)], layers)]
    except Exception:  # the inputs are not those that the module takes
        return []
    finally:
        for hook in hooks:
            hook.remove()
        for layer, is_training in training.items():
            layer.training = is_training


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Returns the difference relative to the largest output, in either layout of channels."""
    forms = [theirs, np.moveaxis(theirs, 1, -1)] if theirs.ndim > 2 else [theirs]
    return min(
        relative(form.reshape(-1), np.asarray(last(ours)).reshape(-1), 1e-6)
        for form in forms
        for last in _LAST
    )


def _has_same_entries(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Returns whether two arrays have the same entries in any order."""
    return a.size == b.size and relative(np.sort(a, None), np.sort(b, None), 1e-6) <= tolerance
