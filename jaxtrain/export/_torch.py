"""load_torch and to_torch: weights from PyTorch to a state, and from a state to PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain._placement import to_numpy
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_files import read_state_dict
from jaxtrain.export._torch_layers import Layer, convert, layers_of, with_arrays
from jaxtrain.export._torch_match import TorchLayer, match
from jaxtrain.export._torch_optimizer import load_optimizer
from jaxtrain.export._torch_trace import Uses, trace_uses
from jaxtrain.optimizers._averaging import restart_average
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

    Layers are matched by name if one side has all names of the other, else by shape. Layers of
    equal shapes are matched by order, on the assumption that PyTorch's module creates its layers in
    the order in which the network of `state` uses them. If the two orders differ anywhere, an error
    asks for `mapping`. Compare the outputs of both models once: a module that creates two layers of
    equal shapes in another order than it uses them cannot be noticed.

    The function converts dense, embedding and convolution layers, batch, layer and group norm, LSTM
    cells, multi-head attention, and single parameters of equal shape. A dense layer that flattens
    the features of a Flax convolution is reordered, since PyTorch flattens [channels, height,
    width] and Flax [height, width, channels].

    Args:
      state: a state of the same network, made by `init_state`.
      state_dict: `module.state_dict()`; or a file: ".safetensors", ".pt", ".pth" or ".bin". The
        last three are read with `weights_only=True`, so that they cannot run code.
      mapping: paths in the model by names of layers in PyTorch, such as {"fc1": "Dense_0"}, where
        order and shapes do not determine them.
      strict: False keeps the layers of both sides that have no counterpart as they are, such as a
        new last layer.
      channels: by name of a dense layer in PyTorch, the number of channels of the features that it
        flattens, 1 for none. By default it is found by tracing the network; a `Model` of functions
        with convolutions needs it.
      optimizer: `optimizer.state_dict()` of `torch.optim.SGD`, `Adam` or `AdamW`. The momentum, the
        step count and the learning rate are loaded into the optimizer of `state`. Other options,
        such as betas and weight decay, are not compared: pass the same to both.

    Returns:
      The state with these parameters and running statistics; its step, epoch and key are kept. An
      average of the parameters starts anew with them.

    Raises:
      InputError: tensors are missing, additional, or differ in shape or dtype, all of which are
        named; the order is unclear; the file cannot be read; or the optimizers differ.
      MissingExtraError: the file is a ".pt" file, and PyTorch is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
      ... )
      >>> state = jt.export.load_torch(state, module.state_dict())
    """
    check_state_type(state)
    tensors, _ = read_state_dict(state_dict)
    pairs, sizes = _match(tensors, state, mapping, channels, strict)
    _check_dtypes(tensors, pairs, _leaves(state))
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
    strict: bool = True,
    channels: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the weights as a state dict of PyTorch.

    Args:
      state: the state whose parameters and running statistics are converted.
      like: the PyTorch module, or its state dict, whose names and order are used; layers are
        matched as by `load_torch`. None names the tensors by our paths, such as "Dense_0.weight".
      mapping: as in `load_torch`.
      strict: False keeps the tensors of `like` that have no counterpart, such as further buffers.
      channels: as in `load_torch`; without `like`, by our paths.

    Returns:
      Tensors on the CPU by name, for `module.load_state_dict`: the parameters that `predict` uses,
      which are the average if the optimizer keeps one. Of the two biases of an LSTM, the first is
      0. `num_batches_tracked` is that of `like`.

    Raises:
      InputError: a layer has no counterpart in `like`, or more than one.
      MissingExtraError: PyTorch is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
      ... )
      >>> module.load_state_dict(jt.export.to_torch(state, module))
      <All keys matched successfully>
    """
    check_state_type(state)
    with needs_extra("torch"):
        import torch  # noqa: F401
    tied: Mapping[str, str] = {}
    if like is None:
        uses = trace_uses(state)
        pairs = [(_named_by_us(layer), layer) for layer in layers_of(state, uses)]
        found, sizes = {}, _flattened_channels(pairs, uses, channels or {})
    else:
        tensors, tied = read_state_dict(like)
        found = {} if strict else {full: _to_tensor(tensor) for full, tensor in tensors.items()}
        pairs, sizes = _match(tensors, state, mapping, channels, strict)
    leaves = _leaves(state.replace(params=state.evaluation_params))
    for theirs, ours in pairs:
        for entry in ours.entries:
            arrays = [to_numpy(leaves[path]) for path in entry.paths]
            values = entry.to_torch(arrays, sizes.get(theirs.name, 1))
            for part, value in zip(entry.tensors, values, strict=True):
                found[theirs.tensors[part]] = _to_tensor(value)
        for part, full in theirs.tensors.items():
            if part not in theirs.shapes:  # num_batches_tracked
                found[full] = _to_tensor(tensors[full])
    return found | {full: found[first] for full, first in tied.items() if first in found}


def _match(
    tensors: Mapping[str, np.ndarray],
    state: TrainState,
    mapping: Mapping[str, str] | None,
    channels: Mapping[str, int] | None,
    strict: bool,
) -> tuple[Pairs, dict[str, int]]:
    """Returns pairs of layers, and the channels that each dense layer of PyTorch flattens."""
    _check_names(mapping, "mapping", str, "paths of layers", "{'fc1': 'Dense_0'}")
    _check_names(channels, "channels", int, "numbers of channels", "{'fc1': 64}")
    uses = trace_uses(state)
    pairs = match(
        {full: tensor.shape for full, tensor in tensors.items()},
        layers_of(state, uses),
        mapping or {},
        is_called_in_order=uses is not None,
        strict=strict,
    )
    return pairs, _flattened_channels(pairs, uses, channels or {})


def _check_names(value: Any, argument: str, kind: type, what: str, example: str) -> None:
    is_mapping = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(entry, kind) for name, entry in value.items()
    )
    if value is not None and not is_mapping:
        raise InputError(
            f"{argument} is {value!r}; expected {what} by names of layers, such as {example}",
            argument=argument,
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
    wrong: dict[tuple[str, str], list[str]] = {}
    for theirs, ours in pairs:
        for entry in ours.entries:
            expected = leaves[entry.paths[0]].dtype.name
            for full in (theirs.tensors[part] for part in entry.tensors):
                if tensors[full].dtype.name != expected:
                    wrong.setdefault((tensors[full].dtype.name, expected), []).append(full)
    if wrong:
        texts = [
            f"the dtype is {found}, where the model has {expected}, for {', '.join(names)}"
            for (found, expected), names in wrong.items()
        ]
        raise InputError(
            f"{'; '.join(texts)}; expected the dtypes of the model: convert the tensors, for "
            "example by {name: tensor.float() for name, tensor in state_dict.items()}"
        )


def _flattened_channels(
    pairs: Pairs, uses: Uses | None, channels: Mapping[str, int]
) -> dict[str, int]:
    """Returns, by layer of PyTorch, the channels of the features that a dense layer flattens."""
    dense = {theirs.name: ours for theirs, ours in pairs if ours.kind == "dense"}
    unknown = channels.keys() - dense.keys()
    if unknown:
        raise InputError(
            f"channels has the layer {min(unknown)!r}; expected one of the dense layers with a "
            f"kernel of Flax, {', '.join(dense) or 'of which there is none'}",
            argument="channels",
        )
    found: dict[str, int] = {}
    has_convolutions = any(ours.kind == "convolution" for _, ours in pairs)
    for name, ours in dense.items():
        (kernel,), inputs = ours.entries[0].paths, ours.entries[0].tensors["weight"][1]
        if name in channels:
            found[name] = channels[name]
        elif uses is not None:
            found[name] = uses.flattened.get(kernel, 1)
        elif has_convolutions:
            raise InputError(
                f"{ours.path} may flatten the features of a convolution, which a Model of "
                f"functions does not tell; expected their number of channels, or 1 for none: "
                f"channels={{{name!r}: 1}}",
                argument="channels",
            )
        if inputs % max(found.get(name, 1), 1) or found.get(name, 1) < 1:
            raise InputError(
                f"channels has {found[name]} for {name}, which has {inputs} inputs; expected a "
                "divisor",
                argument="channels",
            )
    return found


def _to_tensor(array: np.ndarray) -> Any:
    """Returns a tensor of PyTorch, which cannot read NumPy arrays of bfloat16."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
