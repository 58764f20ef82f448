"""load_torch and to_torch: weights from PyTorch to a state, and from a state to PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain._placement import to_numpy
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_check import check_outputs
from jaxtrain.export._torch_files import read_state_dict
from jaxtrain.export._torch_layers import Layer, Orders, layers_of, with_arrays
from jaxtrain.export._torch_layers import to_ours as to_our_arrays
from jaxtrain.export._torch_layers import to_torch as to_tensors
from jaxtrain.export._torch_match import TorchLayer, match
from jaxtrain.export._torch_optimizer import load_optimizer
from jaxtrain.export._torch_trace import Uses, trace_uses
from jaxtrain.training.state import TrainState, check_state_type

Pairs = list[tuple[TorchLayer, Layer]]


def load_torch(
    state: TrainState,
    source: Any,
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
    asks for `mapping`.

    The function converts dense, embedding and convolution layers, batch, layer and group norm, LSTM
    cells, multi-head attention, and single parameters of equal shape. PyTorch flattens images as
    [channels, height, width] and Flax as [height, width, channels]. Layers behind a flatten are
    reordered, or refused if the order in PyTorch is in doubt.

    Args:
      state: a state of the same network, made by `init_state`.
      source: the module, `module.state_dict()`, or a file: ".safetensors", ".pt", ".pth" or ".bin".
        The last three are read with `weights_only=True`, so that they cannot run code. With the
        module, both sides are run on the same random inputs and compared, if the module takes
        inputs like those of `state`, and if `strict`.
      mapping: paths in the model by names of layers in PyTorch, such as {"fc1": "Dense_0"}, where
        order and shapes do not determine them.
      strict: False keeps the layers of both sides that have no counterpart as they are, such as a
        new last layer.
      channels: by name of a dense or norm layer in PyTorch, the number of channels of the images
        [channels, height, width] that are flattened before it, 1 for none. By default it is found
        by tracing the network; a `Model` of functions with convolutions needs it.
      optimizer: `optimizer.state_dict()` of `torch.optim.SGD`, `Adam` or `AdamW`. The momentum, the
        step count and the learning rate are loaded into the optimizer of `state`. Other options,
        such as betas and weight decay, are not compared: pass the same to both.

    Returns:
      The state with these parameters and running statistics; its step, epoch and key are kept. An
      average of the parameters starts anew with them.

    Raises:
      InputError: tensors are missing, additional, or differ in shape or dtype, all of which are
        named; the order of layers or of features is unclear; the outputs of both sides differ; the
        file cannot be read; or the optimizers differ.
      MissingExtraError: the file is a ".pt" file, and PyTorch is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
      ... )
      >>> state = jt.export.load_torch(state, module)
    """
    check_state_type(state)
    tensors, tied = read_state_dict(source)
    uses = trace_uses(state)
    pairs = _match(tensors, tied, state, uses, mapping, strict)
    orders = _feature_orders(pairs, uses, channels)
    _check_dtypes(tensors, pairs, _leaves(state))
    found: dict[str, np.ndarray] = {}
    for theirs, ours in pairs:
        parts = {part: tensors[full] for part, full in theirs.tensors.items()}
        found |= to_our_arrays(ours, parts, orders)
    params = with_arrays(state.params, "params", found)
    opt_state = state.opt_state
    if optimizer is not None:
        opt_state = load_optimizer(state, optimizer, tensors, pairs, orders)
    loaded = state.replace(opt_state=opt_state).replace(
        params=params, model_state=with_arrays(state.model_state, "model_state", found)
    )
    if strict and hasattr(source, "named_modules"):
        check_outputs(loaded, source, source.state_dict(), pairs, uses)
    return loaded


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
        matched as by `load_torch`, and the outputs of a module are compared. The module is not
        changed. None names the tensors by our paths, such as "Dense_0.weight".
      mapping: as in `load_torch`.
      strict: False keeps the tensors of `like` that have no counterpart, such as further buffers.
      channels: as in `load_torch`; without `like`, by our paths.

    Returns:
      Tensors on the CPU by name, for `module.load_state_dict`: the parameters that `predict` uses,
      which are the average if the optimizer keeps one. Of the two biases of an LSTM, the first is
      0. `num_batches_tracked` is that of `like`.

    Raises:
      InputError: a layer has no counterpart in `like`, or more than one; its order of features is
        in doubt; tensors that `like` ties differ in the state; or the outputs differ.
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
    uses = trace_uses(state)
    tensors: Mapping[str, np.ndarray] = {}
    tied: Mapping[str, str] = {}
    if like is None:
        pairs = [(_named_by_us(layer), layer) for layer in layers_of(state, uses)]
    else:
        tensors, tied = read_state_dict(like)
        pairs = _match(tensors, tied, state, uses, mapping, strict)
    orders = _feature_orders(pairs, uses, channels)
    evaluated = state.replace(params=state.evaluation_params)
    arrays = {path: to_numpy(leaf) for path, leaf in _leaves(evaluated).items()}
    found: dict[str, np.ndarray] = {}
    for theirs, ours in pairs:
        found |= {
            theirs.tensors[part]: array for part, array in to_tensors(ours, arrays, orders).items()
        }
    for full, first in tied.items():
        if first not in found:
            continue
        own = found.setdefault(full, found[first])
        if not np.array_equal(own, found[first]):
            raise InputError(
                f"{first} and {full} are one tensor in PyTorch, and differ in the state; expected "
                "a module that does not tie them"
            )
    counters = {
        full
        for theirs, _ in pairs
        for part, full in theirs.tensors.items()
        if part not in theirs.shapes
    }
    kept = {full: x for full, x in tensors.items() if full in counters or not strict}
    result = {full: _to_tensor(array) for full, array in (kept | found).items()}
    if strict and hasattr(like, "named_modules"):
        check_outputs(evaluated, like, result, pairs, uses)
    return result


def _match(
    tensors: Mapping[str, np.ndarray],
    tied: Mapping[str, str],
    state: TrainState,
    uses: Uses | None,
    mapping: Mapping[str, str] | None,
    strict: bool,
) -> Pairs:
    """Returns pairs of layers; of tied tensors, those that the model also has twice, or one."""
    _check_names(mapping, "mapping", str, "paths of layers", "{'fc1': 'Dense_0'}")
    layers = layers_of(state, uses)

    def pairs_of(names: Collection[str]) -> Pairs:
        return match(
            {full: tensors[full].shape for full in tensors if full in names},
            layers,
            mapping or {},
            is_called_in_order=uses is not None,
            strict=strict,
        )

    if tied:
        try:
            return pairs_of(tensors)
        except InputError:
            pass
    return pairs_of(tensors.keys() - tied.keys())


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
    tensors = {part: ".".join(filter(None, [layer.path, part])) for part in layer.shapes}
    return TorchLayer(layer.path, tensors, layer.shapes)


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


def _feature_orders(pairs: Pairs, uses: Uses | None, channels: Mapping[str, int] | None) -> Orders:
    """Returns the order of PyTorch's features by path and axis, from the trace or `channels`.

    Raises:
      InputError: it is in doubt for a layer.
    """
    _check_names(channels, "channels", int, "numbers of channels", "{'fc1': 64}")
    channels = channels or {}
    layers = {theirs.name: ours for theirs, ours in pairs if ours.inputs}
    unknown = channels.keys() - layers.keys()
    if unknown:
        raise InputError(
            f"channels has the layer {min(unknown)!r}; expected one of the dense and norm layers, "
            f"{', '.join(layers) or 'of which there is none'}",
            argument="channels",
        )
    orders: dict[str, dict[int, np.ndarray | None]] = {}
    has_convolutions = any(len(x) > 2 for _, ours in pairs for x in ours.shapes.values())
    for theirs, ours in pairs:
        name = theirs.name
        where = ours.path or "the model"
        if name in channels:
            size = max(ours.shapes.values(), key=len)[-1]
            if channels[name] < 1 or size % channels[name]:
                raise InputError(
                    f"channels has {channels[name]} for {name}, which has {size} inputs; expected "
                    "a divisor",
                    argument="channels",
                )
            order = np.arange(size).reshape(-1, channels[name]).T.reshape(-1)
            orders |= {path: {axis: order} for path, axis in ours.inputs.items()}
        elif uses is None:
            is_dense = any(len(shape) == 2 for shape in ours.shapes.values())
            if has_convolutions and ours.inputs and is_dense:
                raise InputError(
                    f"{where} may flatten the features of a convolution, which a Model of "
                    f"functions does not tell; expected their number of channels, or 1 for none: "
                    f"channels={{{name!r}: 1}}",
                    argument="channels",
                )
        elif uses.unclear.intersection(ours.paths):
            hint = (
                f", or channels={{{name!r}: ...}} with their number in PyTorch"
                if ours.inputs
                else ""
            )
            raise InputError(
                f"the order of the features that {where} takes is in doubt, since images are "
                "[channels, height, width] in PyTorch; expected a network that transposes them to "
                f"this order before it flattens or reshapes them{hint}",
                argument="channels",
            )
        else:
            orders |= {path: uses.feature_orders.get(path, {}) for path in ours.paths}
    return orders


def _to_tensor(array: np.ndarray) -> Any:
    """Returns a tensor of PyTorch, which cannot read NumPy arrays of bfloat16."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
