"""Loads the state of a PyTorch optimizer into the optimizer of a training state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jaxtrain.errors import InputError
from jaxtrain.export._torch_files import to_array
from jaxtrain.export._torch_layers import Layer, convert, with_arrays
from jaxtrain.export._torch_match import TorchLayer
from jaxtrain.optimizers import AmsgradState, DampedTraceState
from jaxtrain.training.state import TrainState

# Our names of PyTorch's arrays per parameter, by the type of the optax state that has them.
_SLOTS: dict[type, dict[str, str]] = {
    optax.TraceState: {"trace": "momentum_buffer"},
    DampedTraceState: {"trace": "momentum_buffer"},
    optax.ScaleByAdamState: {"mu": "exp_avg", "nu": "exp_avg_sq"},
    AmsgradState: {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"},
}
# Our names of the number of steps, and of the flag that there has been one.
_COUNTS = {"count", "step"}


def load_optimizer(
    state: TrainState,
    state_dict: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[TorchLayer, Layer]],
    channels: Mapping[str, int],
) -> PyTree:
    """Returns the optimizer state of `state` with the values of `optimizer.state_dict()`.

    Args:
      state: the training state.
      state_dict: of SGD, Adam or AdamW of PyTorch.
      tensors: the state dict of the model, whose parameters the optimizer numbers in order.
      pairs: layers of PyTorch with ours.
      channels: as for `convert`, by layer of PyTorch.

    Raises:
      InputError: it is not the state of such an optimizer, has other arrays than the optimizer of
        `state`, or belongs to other parameters.
    """
    if not isinstance(state_dict, Mapping) or {"state", "param_groups"} - state_dict.keys():
        raise InputError(
            f"optimizer is a {type(state_dict).__name__}; expected optimizer.state_dict() of "
            "PyTorch, with 'state' and 'param_groups'",
            argument="optimizer",
        )
    slots = _slots_by_name(state_dict, tensors, pairs)
    found = {slot for values in slots.values() for slot in values} - {"step"}
    nodes = [
        node for node in jax.tree.leaves(state.opt_state, is_leaf=_has_slots) if _has_slots(node)
    ]
    expected = {slot for node in nodes for slot in _SLOTS[type(node)].values()}
    if len(nodes) > 1 or (found and found != expected):
        raise InputError(
            f"the PyTorch optimizer has {_listed(found)} for each parameter, where the optimizer "
            f"of the state has {_listed(expected)}; expected the same kind of optimizer with the "
            "same options",
            argument="optimizer",
        )
    rates = {float(group["lr"]) for group in state_dict["param_groups"]}
    if len(rates) > 1:
        raise InputError(
            f"the PyTorch optimizer has the learning rates {sorted(rates)}; expected one for all "
            "parameters",
            argument="optimizer",
        )
    steps = {int(to_array(values["step"])) for values in slots.values() if "step" in values}
    step = max(steps, default=None)

    def load(node: Any) -> Any:
        if not _has_slots(node) or not found:
            return node
        changes = {
            field: _loaded(getattr(node, field), slot, slots, pairs, channels)
            for field, slot in _SLOTS[type(node)].items()
        }
        if isinstance(node, DampedTraceState):
            changes["started"] = jax.numpy.ones_like(node.started)
        return node._replace(**changes)

    opt_state = jax.tree.map(load, state.opt_state, is_leaf=_has_slots)
    return _with_counts(opt_state, rates.pop(), step)


def _slots_by_name(
    state_dict: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[TorchLayer, Layer]],
) -> dict[str, Mapping[str, Any]]:
    """Returns the arrays of the optimizer by the name of the parameter."""
    parameters = {
        theirs.tensors[part]
        for theirs, ours in pairs
        for entry in ours.entries
        if entry.paths[0].startswith("params")
        for part in entry.tensors
    }
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        names = [name for name in tensors if name in parameters]
        if len(groups) > 1:
            raise InputError(
                f"the PyTorch optimizer has {len(groups)} parameter groups without names; expected "
                "one group, or an optimizer made with module.named_parameters()",
                argument="optimizer",
            )
    if len(numbers) != len(names) or set(names) != parameters:
        raise InputError(
            f"the PyTorch optimizer has {len(numbers)} parameters, where the model has "
            f"{len(parameters)}; expected the optimizer of all parameters of this model",
            argument="optimizer",
        )
    found: dict[str, Mapping[str, Any]] = {}
    for number, name in zip(numbers, names, strict=True):
        values = {
            slot: value
            for slot, value in state_dict["state"].get(number, {}).items()
            if value is not None
        }
        for slot, value in values.items():
            if slot != "step" and tuple(value.shape) != tensors[name].shape:
                raise InputError(
                    f"the PyTorch optimizer has {slot} of shape {list(value.shape)} for {name}, "
                    f"which has the shape {list(tensors[name].shape)}; expected the optimizer of "
                    "this model",
                    argument="optimizer",
                )
        found[name] = values
    return found


def _loaded(
    tree: PyTree,
    slot: str,
    slots: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[tuple[TorchLayer, Layer]],
    channels: Mapping[str, int],
) -> PyTree:
    """Returns a pytree like the parameters with the arrays of one slot."""
    arrays: dict[str, Any] = {}
    for theirs, ours in pairs:
        entries = [entry for entry in ours.entries if entry.paths[0].startswith("params")]
        if any(len(entry.tensors) > 1 for entry in entries):
            raise InputError(
                f"{theirs.name} has two biases in PyTorch, which are trained separately, and one "
                "here; expected no LSTM with biases: pass optimizer=None to load its weights alone",
                argument="optimizer",
            )
        parts = {
            part: to_array(slots[theirs.tensors[part]][slot])
            for entry in entries
            for part in entry.tensors
            if slot in slots[theirs.tensors[part]]
        }
        entries = [entry for entry in entries if entry.tensors.keys() <= parts.keys()]
        layer = ours._replace(entries=tuple(entries))
        arrays |= convert(layer, parts, channels.get(theirs.name, 1))
    return with_arrays(tree, "params", arrays)


def _with_counts(opt_state: PyTree, rate: float, step: int | None) -> PyTree:
    """Returns an optimizer state with the learning rate and the number of steps of PyTorch.

    A learning rate that follows a schedule is not replaced.
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    scheduled = any("hyperparams_states.learning_rate" in path for path in paths)
    found: dict[str, np.ndarray] = {}
    for path in paths:
        if path.endswith("hyperparams.learning_rate") and not scheduled:
            found[path] = np.asarray(rate)
        elif path.rpartition(".")[2] in _COUNTS and step is not None:
            found[path] = np.asarray(step)
    return with_arrays(opt_state, "", found)


def _has_slots(node: Any) -> bool:
    return type(node) in _SLOTS


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"
