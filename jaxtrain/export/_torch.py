"""load_torch and to_torch: weights from PyTorch to a state, and from a state to PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import PyTree

from jaxtrain._arguments import check_arguments
from jaxtrain._extras import needs_extra
from jaxtrain._placement import to_numpy
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.export._torch_check import compare_outputs, layer_outputs
from jaxtrain.export._torch_files import read_state_dict
from jaxtrain.export._torch_layers import Layer, Orders, layers_of, with_arrays
from jaxtrain.export._torch_layers import to_ours as to_our_arrays
from jaxtrain.export._torch_layers import to_torch as to_tensors
from jaxtrain.export._torch_match import TorchLayer, beyond, match, torch_layers
from jaxtrain.export._torch_optimizer import load_optimizer
from jaxtrain.export._torch_trace import Axis, Uses, trace_uses
from jaxtrain.training.state import TrainState, check_state_type

Pairs = list[tuple[TorchLayer, Layer]]
_Converted = TypeVar("_Converted")


class Conversion(NamedTuple):
    """How weights are converted between a PyTorch module and a state.

    Attributes:
      pairs: layers of PyTorch with ours, in the order in which the model uses them.
      orders: by path of an array, the order of the features that it meets.
      tensors: those of PyTorch by name.
      uses: the traced network; None for plain functions.
      is_sure: whether `load_torch` would take no other order without comparing outputs.
    """

    pairs: Pairs
    orders: Orders
    tensors: Mapping[str, np.ndarray]
    uses: Uses | None
    is_sure: bool = True

    def load(self, state: TrainState) -> TrainState:
        """Returns the state with the tensors of PyTorch."""
        found: dict[str, np.ndarray] = {}
        for theirs, ours in self.pairs:
            parts = {part: self.tensors[full] for part, full in theirs.tensors.items()}
            found |= to_our_arrays(ours, parts, self.orders)
        return state.replace(
            params=with_arrays(state.params, "params", found),
            model_state=with_arrays(state.model_state, "model_state", found),
        )

    def to_torch(self, params: PyTree, model_state: PyTree) -> dict[str, np.ndarray]:
        """Returns parameters, or gradients, and the running statistics by name in PyTorch."""
        arrays = {
            path: to_numpy(leaf)
            for tree, name in ((params, "params"), (model_state, "model_state"))
            for path, leaf in named_arrays(tree, name)
        }
        return {
            theirs.tensors[part]: array
            for theirs, ours in self.pairs
            for part, array in to_tensors(ours, arrays, self.orders).items()
        }

    def layer_outputs(self, state: TrainState, inputs: PyTree) -> dict[str, np.ndarray]:
        """Returns the entries of the outputs of layers in evaluation, in the model's order."""
        if self.uses is None:
            return {}
        return layer_outputs(state, inputs, self.pairs, self.uses)


def load_torch(
    state: TrainState,
    source: Any,
    *,
    mapping: Mapping[str, str] | None = None,
    strict: bool = True,
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
    reordered. If their order in PyTorch is in doubt, they are refused, unless the outputs of the
    module decide.

    Args:
      state: a state of the same network, made by `init_state`.
      source: the module, `module.state_dict()`, or a file of torch.save or safetensors, whatever
        its name. Files are read with `weights_only=True`, so that they cannot run code. With the
        module, both sides are run on the same random inputs and compared, if the module takes
        inputs like those of `state`, and if `strict`.
      mapping: paths in the model by names of layers in PyTorch, such as {"fc1": "Dense_0"}, where
        order and shapes do not determine them.
      strict: False keeps the layers of both sides that have no counterpart as they are, such as a
        new last layer.
      optimizer: `optimizer.state_dict()` of `torch.optim.SGD`, `Adam` or `AdamW`. The momentum, the
        step count and the learning rate are loaded into the optimizer of `state`. Other options,
        such as betas and weight decay, are not compared: pass the same to both.

    Returns:
      The state with these parameters and running statistics, in its own dtypes; its step, epoch and
      key are kept. An average of the parameters starts anew with them.

    Raises:
      InputError: layers are missing, additional, or differ in shape, all of which are named; the
        order of layers or of features is unclear; the outputs of both sides differ; the file cannot
        be read; or the optimizers differ.
      MissingExtraError: the file is of torch.save, and PyTorch is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(
      ...     torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)
      ... )
      >>> state = jt.export.load_torch(state, module)
    """
    check_arguments(load_torch, locals(), eager="call it outside")
    check_state_type(state)
    tensors, tied = read_state_dict(source)
    uses = trace_uses(state)
    pairs = _match(tensors, tied, state, uses, mapping, strict)

    def convert(orders: Orders) -> TrainState:
        return Conversion(pairs, orders, tensors, uses).load(state)

    def compare(loaded: TrainState) -> str | None:
        return compare_outputs(loaded, source, None, pairs, uses) if strict else None

    loaded, orders = _converted(pairs, uses, convert, compare)
    if optimizer is not None:
        opt_state = load_optimizer(state, optimizer, tensors, pairs, orders)
        loaded = state.replace(opt_state=opt_state).replace(
            params=loaded.params, model_state=loaded.model_state
        )
    return loaded


def to_torch(
    state: TrainState,
    like: Any = None,
    *,
    mapping: Mapping[str, str] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Returns the weights as a state dict of PyTorch.

    Args:
      state: the state whose parameters and running statistics are converted.
      like: the PyTorch module, or its state dict, whose names and order are used; layers are
        matched as by `load_torch`, and the outputs of a module are compared. The module is not
        changed. None names the tensors by our paths, such as "Dense_0.weight".
      mapping: as in `load_torch`.
      strict: False keeps the tensors of `like` that have no counterpart, such as further buffers.

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
    check_arguments(to_torch, locals(), eager="call it outside")
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
    evaluated = state.replace(params=state.evaluation_params)
    arrays = {path: to_numpy(leaf) for path, leaf in _leaves(evaluated).items()}
    counters = {
        full
        for theirs, _ in pairs
        for part, full in theirs.tensors.items()
        if part not in theirs.shapes
    }

    def convert(orders: Orders) -> dict[str, Any]:
        found: dict[str, np.ndarray] = {}
        for theirs, ours in pairs:
            parts = to_tensors(ours, arrays, orders)
            found |= {theirs.tensors[part]: array for part, array in parts.items()}
        for full, first in tied.items():
            own = found.setdefault(full, found[first]) if first in found else None
            if own is not None and not np.array_equal(own, found[first]):
                raise InputError(
                    f"{first} and {full} are one tensor in PyTorch, and differ in the state; "
                    "expected a module that does not tie them"
                )
        kept = {full: x for full, x in tensors.items() if full in counters or not strict}
        return {full: _to_tensor(array) for full, array in (kept | found).items()}

    def compare(found: dict[str, Any]) -> str | None:
        return compare_outputs(evaluated, like, found, pairs, uses) if strict else None

    return _converted(pairs, uses, convert, compare)[0]


def _converted(
    pairs: Pairs,
    uses: Uses | None,
    convert: Callable[[Orders], _Converted],
    compare: Callable[[_Converted], str | None],
) -> tuple[_Converted, Orders]:
    """Returns what `convert` returns for the order of features that PyTorch has, and this order.

    Args:
      pairs: layers of PyTorch with ours.
      uses: the traced network.
      convert: converts the weights in given orders of features.
      compare: returns how the outputs differ, "" if they do not, and None if that is unknown.

    Raises:
      InputError: the outputs differ, or the order is in doubt.
    """
    readings, in_doubt = _readings(pairs, uses)
    results = [(convert(reading), reading) for reading in readings]
    differences = [compare(result) for result, _ in results]
    same = [x for x, difference in zip(results, differences, strict=True) if difference == ""]
    doubt = f"the order of the features that {in_doubt} takes is in doubt"
    if any(differences) and not same:
        text = next(filter(None, differences))
        raise InputError(f"{text}; {doubt}" if in_doubt else text)
    if len(same) == 1 or not in_doubt:
        return (same or results)[0]
    module = "" if same else ", or the PyTorch module itself, so that outputs are compared"
    raise InputError(
        f"{doubt}, since images are [channels, height, width] in PyTorch; expected a network that "
        f"transposes them to this order before it flattens them{module} (or leave the layer out by "
        "strict=False, and convert it by hand)"
    )


def _readings(pairs: Pairs, uses: Uses | None) -> tuple[Sequence[Orders], str | None]:
    """Returns the orders that the features may have in PyTorch, the likeliest first.

    Args:
      pairs: layers of PyTorch with ours.
      uses: the traced network.

    Returns:
      The orders, and the name of the first layer whose order is in doubt, if any is.
    """
    orders: dict[str, np.ndarray] = {}
    in_doubt: dict[str, str] = {}  # names of layers by path
    has_convolutions = any(len(x) > 2 for _, ours in pairs for x in ours.shapes.values())
    for where, entry in ((ours.path, x) for _, ours in pairs for x in ours.entries):
        for path in entry.paths:
            if uses is not None:
                axis = uses.features.get(path) or Axis()
            else:
                is_dense = len(entry.shape) > 1 and entry.axis is not None
                axis = Axis(is_sure=not (has_convolutions and is_dense))
            if axis.order is not None and entry.axis is not None:
                orders[path] = axis.order
            if not axis.is_sure or (axis.order is not None and path not in orders):
                in_doubt[path] = where or "the model"
    as_written = {path: order for path, order in orders.items() if path not in in_doubt}
    readings = [orders, as_written] if len(as_written) < len(orders) else [orders]
    return readings, next(iter(in_doubt.values()), None)


def conversions(
    state: TrainState, source: Any, mapping: Mapping[str, str] | None
) -> list[Conversion]:
    """Returns the ways to convert the weights of a PyTorch model, the likeliest first.

    They differ in the order of features. The arguments are those of `load_torch`.

    Raises:
      InputError: layers have no counterpart, or their order is unclear, as in `load_torch`.
    """
    tensors, tied = read_state_dict(source)
    uses = trace_uses(state)
    pairs = _match(tensors, tied, state, uses, mapping, strict=True)
    known, in_doubt = _readings(pairs, uses)
    readings = {tuple(sorted(reading)): reading for reading in reversed([*known, {}])}
    return [
        Conversion(pairs, orders, tensors, uses, in_doubt is None and orders is known[0])
        for orders in reversed(readings.values())
    ]


def misfits(state: TrainState, source: Any) -> tuple[list[TorchLayer], list[Layer]]:
    """Returns the layers of PyTorch and of a model whose shapes the other side does not have."""
    tensors, _ = read_state_dict(source)
    theirs = torch_layers({full: tensor.shape for full, tensor in tensors.items()})
    ours = layers_of(state, trace_uses(state))
    return beyond(theirs, ours), beyond(ours, theirs)


def _match(
    tensors: Mapping[str, np.ndarray],
    tied: Mapping[str, str],
    state: TrainState,
    uses: Uses | None,
    mapping: Mapping[str, str] | None,
    strict: bool,
) -> Pairs:
    """Returns pairs of layers; of tied tensors, those that the model also has twice, or one."""
    layers = layers_of(state, uses)

    def pairs_of(names: Collection[str]) -> Pairs:
        shapes = {full: tensors[full].shape for full in tensors if full in names}
        are_called = uses is not None
        return match(shapes, layers, mapping or {}, is_called_in_order=are_called, strict=strict)

    if tied:
        try:
            return pairs_of(tensors)
        except InputError:
            pass
    return pairs_of(tensors.keys() - tied.keys())


def _named_by_us(layer: Layer) -> TorchLayer:
    """Returns a layer of PyTorch with our path as its name."""
    tensors = {part: ".".join(filter(None, [layer.path, part])) for part in layer.shapes}
    return TorchLayer(layer.path, tensors, layer.shapes)


def _leaves(state: TrainState) -> dict[str, Any]:
    return dict(
        [*named_arrays(state.params, "params"), *named_arrays(state.model_state, "model_state")]
    )


def _to_tensor(array: np.ndarray) -> Any:
    """Returns a tensor of PyTorch, which cannot read NumPy arrays of bfloat16."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
