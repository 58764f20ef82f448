"""Compares the outputs of a PyTorch module with those of the state that has its weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain.errors import InputError
from jaxtrain.export._torch_layers import Layer
from jaxtrain.export._torch_match import TorchLayer
from jaxtrain.export._torch_trace import Uses, evaluate, sample_shapes
from jaxtrain.training.state import TrainState

# What one side may do to the outputs of the other, such as the log-softmax of a classifier.
_LAST = (lambda x: x, jax.nn.log_softmax, jax.nn.softmax, jax.nn.sigmoid)


def check_outputs(
    state: TrainState,
    module: Any,
    tensors: Mapping[str, Any],
    pairs: Sequence[tuple[TorchLayer, Layer]],
    uses: Uses | None,
) -> None:
    """Raises InputError if both sides return different outputs for the same random inputs.

    Nothing is compared if the module does not take such inputs, in PyTorch's layout or in ours.

    Args:
      state: the state, with the weights.
      module: the PyTorch module; it is not changed.
      tensors: its weights, as tensors by name.
      pairs: layers of PyTorch with ours.
      uses: the traced network; None skips the comparison.
    """
    if uses is None:
        return
    shapes = sample_shapes(state)
    generator = np.random.default_rng(0)
    inputs = jax.tree.map(lambda x: _random(x, generator), shapes)

    def call(inputs: PyTree) -> PyTree:
        apply = state.model.apply
        return apply(state.params, state.model_state, inputs, train=False, key=None)[0]

    tolerance = 5e-2 if "f16[" in str(uses.jaxpr) else 1e-3
    with jax.default_matmul_precision("highest"):
        ours = [np.asarray(x, np.float32) for x in jax.tree.leaves(jax.jit(call)(inputs))]
    names = {theirs.name: layer for theirs, layer in pairs}
    closest: tuple[float, Mapping[str, np.ndarray]] | None = None
    given = [jax.tree.leaves(inputs), *_normalized(state, uses, inputs)]
    for arguments in (x for arrays in given for x in _layouts(arrays)):
        found = _run_module(module, tensors, arguments, names)
        if found is None:
            continue
        outputs, layers = found
        if [x.size for x in outputs] != [x.size for x in ours]:
            continue
        difference = max(map(_difference, outputs, ours), default=0.0)
        if difference <= tolerance:
            return
        if closest is None or difference < closest[0]:
            closest = difference, layers
    if closest is None:
        return
    difference, theirs = closest
    results = {
        name: [uses.results[path] for path in names[name].paths if path in uses.results]
        for name in theirs
    }
    last = {name: max(x, key=lambda result: result[0])[1] for name, x in results.items() if x}
    with jax.default_matmul_precision("highest"):
        own = jax.jit(lambda inputs: evaluate(uses, state, inputs, last))(inputs)
    where = next(
        (
            f", first after {name} ({names[name].path})"
            for name in theirs
            if name in own and not _has_same_entries(theirs[name], own[name], tolerance)
        ),
        "",
    )
    raise InputError(
        f"the outputs of the PyTorch module and of the state differ by {difference:.2g} of the "
        f"largest{where}; expected the same network, with the same padding, activations and order "
        "of layers (pass module.state_dict() if the difference is intended, such as inputs that "
        "only one side normalizes)"
    )


def _random(shape: jax.ShapeDtypeStruct, generator: np.random.Generator) -> np.ndarray:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return generator.normal(size=shape.shape).astype(shape.dtype)
    limit = 256 if shape.dtype == np.uint8 else 2  # pixels, or tokens of any vocabulary
    return generator.integers(0, limit, shape.shape).astype(shape.dtype)


def _normalized(state: TrainState, uses: Uses, inputs: PyTree) -> Iterator[list[np.ndarray]]:
    """Yields the inputs as the state normalizes them, if it does."""
    steps = list(itertools.takewhile(lambda equation: equation is not None, uses.normalized))
    leaves = jax.tree.leaves(inputs)
    if steps and len(leaves) == 1:
        for array in evaluate(uses, state, inputs, {"": steps[-1]}).values():
            if array.size == leaves[0].size:
                yield [np.asarray(array).reshape(leaves[0].shape)]


def _layouts(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields the inputs as they are, with channels first, and with an axis for one channel."""
    layouts: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda x: x,
        lambda x: np.moveaxis(x, -1, 1) if x.ndim > 2 else x,
        lambda x: x[:, None],
    )
    for layout in layouts:
        yield [np.array(layout(x), order="C") for x in arrays]


def _run_module(
    module: Any, tensors: Mapping[str, Any], arguments: Sequence[np.ndarray], names: Any
) -> tuple[list[np.ndarray], dict[str, np.ndarray]] | None:
    """Returns the outputs of a module and of its layers in the order of calls; None if it fails."""
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
        found = [x.float().cpu().numpy() for x in jax.tree.leaves(outputs)]
    except Exception:  # the inputs are not those that the module takes
        return None
    finally:
        for hook in hooks:
            hook.remove()
        for layer, is_training in training.items():
            layer.training = is_training
    return found, layers


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Returns the difference relative to the largest output, in either layout of channels."""
    forms = [theirs, np.moveaxis(theirs, 1, -1)] if theirs.ndim > 2 else [theirs]
    return min(
        _relative(form.reshape(-1), np.asarray(last(ours)).reshape(-1))
        for form in forms
        for last in _LAST
    )


def _has_same_entries(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Returns whether two arrays have the same entries in any order."""
    return a.size == b.size and _relative(np.sort(a, None), np.sort(b, None)) <= tolerance


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference / max(np.abs(a).max(initial=0.0), 1e-6)) if difference else 0.0
