"""Loads the state of a PyTorch optimizer into the optimizer of a training state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxtrain.errors import InputError
from jaxtrain.export._torch_files import to_array
from jaxtrain.export._torch_layers import Layer, Orders, to_ours, with_arrays
from jaxtrain.export._torch_match import TorchLayer
from jaxtrain.optimizers._transforms import AmsgradState, DampedTraceState
from jaxtrain.training.state import TrainState

# Our names of PyTorch's arrays per parameter, by the type of the optax state that has them.
_SLOTS: dict[type, dict[str, str]] = {
    optax.TraceState: {"trace": "momentum_buffer"},
    DampedTraceState: {"trace": "momentum_buffer"},
    optax.ScaleByAdamState: {"mu": "exp_avg", "nu": "exp_avg_sq"},
    AmsgradState: {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"},
}
# Our names of the number of steps.
_COUNTS = {"count", "step"}


def load_optimizer(
    state: TrainState,
    state_dict: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[TorchLayer, Layer]],
    orders: Orders,
) -> PyTree:
    """Returns the optimizer state of `state` with the values of `optimizer.state_dict()`.

    Args:
      state: the training state.
      state_dict: of SGD, Adam or AdamW of PyTorch.
      tensors: the state dict of the model, whose parameters the optimizer numbers in order.
      pairs: layers of PyTorch with ours.
      orders: as for `to_ours`.

    Raises:
      InputError: it is not the state of such an optimizer, has other arrays than the optimizer of
        `state`, or belongs to other parameters.
    """
    groups = _checked_groups(state_dict)
    theirs = {slot for group in groups for slot in _slots_of(group)}
    nodes = [
        node for node in jax.tree.leaves(state.opt_state, is_leaf=_has_slots) if _has_slots(node)
    ]
    ours = {slot for node in nodes for slot in _SLOTS[type(node)].values()}
    if len(nodes) > 1 or theirs != ours:
        raise InputError(
            f"the PyTorch optimizer has {_listed(theirs)} for each parameter, where the optimizer "
            f"of the state has {_listed(ours)}; expected the same kind of optimizer with the same "
            "options",
            argument="optimizer",
        )
    slots = _slots_by_name(state_dict, tensors, pairs)
    started = {name for name, values in slots.items() if theirs <= values.keys()}
    steps = {int(to_array(slots[name]["step"])) for name in started if "step" in slots[name]}
    if started not in (set(), set(slots)) or len(steps) > 1:
        raise InputError(
            f"the PyTorch optimizer has updated {len(started)} of {len(slots)} parameters, or "
            "some of them more often than others; expected one that has updated all of them",
            argument="optimizer",
        )

    def load(node: Any) -> Any:
        if not _has_slots(node):
            return node
        changes = {
            field: _loaded(getattr(node, field), slot, slots, pairs, orders)
            if started
            else jax.tree.map(jnp.zeros_like, getattr(node, field))
            for field, slot in _SLOTS[type(node)].items()
        }
        if isinstance(node, DampedTraceState):
            changes["started"] = jnp.full_like(node.started, bool(started))
        return node._replace(**changes)

    opt_state = jax.tree.map(load, state.opt_state, is_leaf=_has_slots)
    is_adam = "betas" in groups[0]
    step = max(steps, default=0) if is_adam else None  # SGD does not count
    return _with_counts(opt_state, float(groups[0]["lr"]), step)


def _checked_groups(state_dict: Any) -> list[Mapping[str, Any]]:
    """Returns the parameter groups of an optimizer that can be loaded."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if (
        not isinstance(groups, list)
        or not isinstance(state_dict.get("state"), Mapping)
        or not groups
    ):
        raise InputError(
            f"optimizer is a {type(state_dict).__name__}; expected optimizer.state_dict() of "
            "PyTorch, with 'state' and 'param_groups'",
            argument="optimizer",
        )
    for group in groups:
        is_adam = {"betas", "amsgrad"} <= group.keys()
        if not is_adam and not {"momentum", "dampening"} <= group.keys():
            options = ", ".join(sorted(group.keys() - {"params", "param_names"}))
            raise InputError(
                f"the PyTorch optimizer has the options {options}; expected those of SGD, Adam or "
                "AdamW, whose state can be loaded",
                argument="optimizer",
            )
        if group.get("maximize"):
            raise InputError(
                "the PyTorch optimizer has maximize=True; expected one that minimizes",
                argument="optimizer",
            )
    rates = {float(group["lr"]) for group in groups}
    if len(rates) > 1:
        raise InputError(
            f"the PyTorch optimizer has the learning rates {sorted(rates)}; expected one for all "
            "parameters",
            argument="optimizer",
        )
    return groups


def _slots_of(group: Mapping[str, Any]) -> set[str]:
    """Returns the names of the arrays that an optimizer keeps for each parameter of a group."""
    if "betas" in group:
        return {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])}
    return {"momentum_buffer"} if group["momentum"] else set()


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
    orders: Orders,
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
        arrays |= to_ours(ours, parts, orders)
    return with_arrays(tree, "params", arrays)


def _with_counts(opt_state: PyTree, rate: float, step: int | None) -> PyTree:
    """Returns an optimizer state with the learning rate and the number of steps of PyTorch.

    A learning rate that follows a schedule is not replaced.
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    scheduled = any("hyperparams_states.learning_rate" in path for path in paths)
    if not any(path.endswith("hyperparams.learning_rate") for path in paths):
        warnings.warn(
            f"the optimizer of the state does not record its learning rate, so PyTorch's {rate:g} "
            "is not loaded; make it with this rate, or use jaxtrain.optimizers",
            stacklevel=4,
        )
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
