"""load_torch and to_torch: the weights of a PyTorch model here, and ours in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain import adapters
from jaxtrain._extras import needs_extra
from jaxtrain._placement import to_numpy
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_files import read_state_dict
from jaxtrain.export._torch_layers import Layer, convert, layers_of, with_arrays
from jaxtrain.export._torch_match import TorchLayer, match
from jaxtrain.export._torch_optimizer import load_optimizer
from jaxtrain.optimizers import restart_average
from jaxtrain.training.state import TrainState, check_state_type

Pairs = list[tuple[TorchLayer, Layer]]


def load_torch(
    state: TrainState,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    *,
    mapping: Mapping[str, str] | None = None,
    strict: bool = True,
    channels: Mapping[str, int] | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> TrainState:
    """Returns a state with the weights of a PyTorch model.

    Layers are matched by their names if all are equal, else by their shapes; those of equal shapes
    by order: PyTorch's module creates them in the order in which our network calls them. If that
    is not the case for all layers, an error asks for `mapping`. Compare the outputs of both models
    once, since two layers of equal shapes that are created in another order are not noticed.

    Converted are dense, embedding and convolution layers, batch, layer and group norm, LSTM cells,
    multi-head attention, and single parameters of equal shape. After convolutions in Flax's
    layout, the first dense layer is reordered, since PyTorch flattens [channels, height, width] and
    Flax [height, width, channels].

    Args:
      state: a state of the same network, made by `init_state`.
      state_dict: `module.state_dict()`, or a file: ".safetensors", or ".pt" or ".pth", which is
        read with `weights_only=True`, so that it cannot run code.
      mapping: paths in the model by names of layers in PyTorch, such as {"fc1": "Dense_0"}, where
        order and shapes do not determine them.
      strict: False keeps the layers of both sides that have no counterpart as they are, such as a
        new last layer.
      channels: by name of a dense layer in PyTorch, the number of channels of the features that it
        flattens, 1 for none; by default those of the convolution before it.
      optimizer: `optimizer.state_dict()` of `torch.optim.SGD`, `Adam` or `AdamW`. The momentum, the
        step count and the learning rate are loaded into the optimizer of `state`, which must have
        the same options.

    Returns:
      The state with these parameters and running statistics; its step, epoch and key are kept. An
      average of the parameters starts anew with them.

    Raises:
      InputError: tensors are missing, additional, or differ in shape or dtype, all of which are
        named; the order is unclear; the file cannot be read; or the optimizers differ.
      MissingExtraError: the file is a ".pt" file, and PyTorch is not installed.

    Example:
      >>> state = jt.init_state(model, jt.optimizers.adam(1e-3), train.inputs[:1], key=key)
      >>> state = jt.export.load_torch(state, torch_model.state_dict())
    """
    check_state_type(state)
    tensors = read_state_dict(state_dict)
    pairs = _match(tensors, state, mapping, strict)
    _check_dtypes(tensors, pairs, _leaves(state))
    sizes = _flattened_channels(pairs, channels or {})
    found: dict[str, np.ndarray] = {}
    for theirs, ours in pairs:
        parts = {part: tensors[full] for part, full in theirs.tensors.items()}
        found |= convert(ours, parts, sizes.get(theirs.name, 1))
    params = with_arrays(state.params, "params", found)
    opt_state = state.opt_state
    if optimizer is not None:
        opt_state = load_optimizer(state, optimizer, tensors, pairs, sizes)
    return state.replace(
        params=params,
        model_state=with_arrays(state.model_state, "model_state", found),
        opt_state=restart_average(opt_state, params),
    )


def to_torch(
    state: TrainState,
    like: Any = None,
    *,
    mapping: Mapping[str, str] | None = None,
    channels: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the weights as a state dict of PyTorch.

    Args:
      state: the state whose parameters and running statistics are converted.
      like: the PyTorch module, or its state dict, whose names and order are used; layers are
        matched as by `load_torch`. None names the tensors by our paths, such as "Dense_0.weight".
      mapping: as in `load_torch`.
      channels: as in `load_torch`; without `like`, by our paths.

    Returns:
      Tensors on the CPU by name, for `module.load_state_dict`. They are those of `state.params`,
      not their average. Of the two biases of an LSTM, the first is 0 and the second is ours.
      `num_batches_tracked` is the number of steps.

    Raises:
      InputError: a layer has no counterpart in `like`, or more than one.
      MissingExtraError: PyTorch is not installed.

    Example:
      >>> torch_model.load_state_dict(jt.export.to_torch(state, torch_model))
    """
    check_state_type(state)
    with needs_extra("torch"):
        import torch
    if like is None:
        pairs = [(_named_by_us(layer), layer) for layer in layers_of(state)]
        order = [full for theirs, _ in pairs for full in theirs.tensors.values()]
    else:
        tensors = read_state_dict(like)
        order = list(tensors)
        pairs = _match(tensors, state, mapping, strict=True)
    sizes = _flattened_channels(pairs, channels or {})
    leaves = _leaves(state)
    found: dict[str, Any] = {}
    for theirs, ours in pairs:
        for entry in ours.entries:
            arrays = [to_numpy(leaves[path]) for path in entry.paths]
            values = entry.to_torch(arrays, sizes.get(theirs.name, 1))
            for part, value in zip(entry.tensors, values, strict=True):
                found[theirs.tensors[part]] = _to_tensor(value)
        for part, full in theirs.tensors.items():
            if part not in theirs.shapes:  # num_batches_tracked
                found[full] = torch.tensor(int(state.step))
    return {full: found[full] for full in order}


def _match(
    tensors: Mapping[str, np.ndarray],
    state: TrainState,
    mapping: Mapping[str, str] | None,
    strict: bool,
) -> Pairs:
    return match(
        {full: tensor.shape for full, tensor in tensors.items()},
        layers_of(state),
        mapping or {},
        is_called_in_order=adapters.example_inputs(state.model) is not None,
        strict=strict,
    )


def _named_by_us(layer: Layer) -> TorchLayer:
    """Returns a layer of PyTorch with our path as its name."""
    tensors = {part: ".".join(filter(None, [layer.path, part])) for part in layer.tensors}
    return TorchLayer(layer.path, tensors, layer.tensors)


def _leaves(state: TrainState) -> dict[str, Any]:
    return dict(
        [*named_arrays(state.params, "params"), *named_arrays(state.model_state, "model_state")]
    )


def _check_dtypes(
    tensors: Mapping[str, np.ndarray], pairs: Pairs, leaves: Mapping[str, Any]
) -> None:
    wrong = []
    for theirs, ours in pairs:
        for entry in ours.entries:
            expected = leaves[entry.paths[0]].dtype.name
            for part in entry.tensors:
                full = theirs.tensors[part]
                if tensors[full].dtype.name != expected:
                    wrong.append(f"{full} has the dtype {tensors[full].dtype.name}, not {expected}")
    if wrong:
        raise InputError(
            f"{'; '.join(wrong)}; expected the dtypes of the model: convert the tensors, for "
            "example by {name: tensor.float() for name, tensor in state_dict.items()}"
        )


def _flattened_channels(pairs: Pairs, channels: Mapping[str, int]) -> dict[str, int]:
    """Returns, by layer of PyTorch, the channels of the features that a dense layer flattens."""
    unknown = channels.keys() - {theirs.name for theirs, _ in pairs}
    if unknown:
        raise InputError(
            f"channels has the layer {min(unknown)!r}, which the state dict does not have; "
            "expected the name of a dense layer",
            argument="channels",
        )
    found: dict[str, int] = {}
    latest = 1
    for theirs, ours in pairs:
        if ours.channels is not None:
            latest = ours.channels
        if ours.features is not None:
            size = channels.get(theirs.name, latest if ours.features % latest == 0 else 1)
            if size < 1 or ours.features % size:
                raise InputError(
                    f"channels has {size} for {theirs.name}, which has {ours.features} inputs; "
                    "expected a divisor",
                    argument="channels",
                )
            found[theirs.name], latest = size, 1
    return found


def _to_tensor(array: np.ndarray) -> Any:
    """Returns a tensor of PyTorch, which cannot read NumPy arrays of bfloat16."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
