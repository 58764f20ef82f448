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
    leaves = jax.tree.leaves(state.opt_state, is_leaf=_has_slots)
    nodes = [node for node in leaves if _has_slots(node)]
    ours = {slot for node in nodes for slot in _SLOTS[type(node)].values()}
    _check(
        len(nodes) < 2 and theirs == ours,
        f"{', '.join(sorted(theirs)) or 'no arrays'} for each parameter, where the optimizer of "
        f"the state has {', '.join(sorted(ours)) or 'no arrays'}",
        "the same kind of optimizer with the same options",
    )
    slots = _slots_by_name(state_dict, tensors, pairs)
    started = [values for values in slots.values() if theirs <= values.keys()]
    steps = {int(to_array(values["step"])) for values in started if "step" in values}
    _check(
        len(started) in (0, len(slots)) and len(steps) < 2,
        f"updated {len(started)} of {len(slots)} parameters, or some of them more often",
        "one that has updated all of them",
    )

    def load(node: Any) -> Any:
        if not _has_slots(node):
            return node
        changes = {}
        for field, slot in _SLOTS[type(node)].items():
            arrays: dict[str, Any] = {}
            for layer, own in pairs:
                found = {
                    part: slots.get(full, {}).get(slot) for part, full in layer.tensors.items()
                }
                parts = {part: to_array(x) for part, x in found.items() if x is not None}
                arrays |= to_ours(own, parts, orders)
            zeros = jax.tree.map(jnp.zeros_like, getattr(node, field))
            changes[field] = with_arrays(zeros, "params", arrays)
        if isinstance(node, DampedTraceState):
            changes["started"] = jnp.full_like(node.started, bool(started))
        return node._replace(**changes)

    opt_state = jax.tree.map(load, state.opt_state, is_leaf=_has_slots)
    is_adam = "betas" in groups[0]  # SGD does not count its steps
    return _with_counts(opt_state, float(groups[0]["lr"]), max(steps, default=0), is_adam)


def _check(is_valid: Any, found: str, expected: str) -> None:
    if not is_valid:
        raise InputError(
            f"the PyTorch optimizer has {found}; expected {expected}", argument="optimizer"
        )


def _checked_groups(state_dict: Any) -> list[Mapping[str, Any]]:
    """Returns the parameter groups of an optimizer that can be loaded."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list) or not isinstance(state_dict.get("state"), Mapping):
        raise InputError(
            f"optimizer is a {type(state_dict).__name__}; expected optimizer.state_dict() of "
            "PyTorch, with 'state' and 'param_groups'",
            argument="optimizer",
        )
    for group in groups:
        is_known = {"betas", "amsgrad"} <= group.keys() or {"momentum", "dampening"} <= group.keys()
        options = ", ".join(sorted(group.keys() - {"params", "param_names"}))
        _check(is_known, f"the options {options}", "those of SGD, Adam or AdamW")
        _check(not group.get("maximize"), "maximize=True", "one that minimizes")
    rates = {float(group["lr"]) for group in groups}
    _check(len(rates) == 1, f"the learning rates {sorted(rates)}", "one for all parameters")
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
) -> dict[str, dict[str, Any]]:
    """Returns the arrays of the optimizer by the name of the parameter."""
    entries = [(layer, entry) for layer, own in pairs for entry in own.entries]
    entries = [x for x in entries if x[1].paths[0].startswith("params")]
    for layer, entry in entries:
        if entry.added is not None:
            raise InputError(
                f"{layer.name} has two biases in PyTorch, which are trained separately, and one "
                "here; expected no LSTM with biases: pass optimizer=None to load its weights alone",
                argument="optimizer",
            )
    parameters = {layer.tensors[entry.tensor] for layer, entry in entries}
    groups = state_dict["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    names = [name for name in tensors if name in parameters]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    else:
        _check(
            len(groups) == 1,
            f"{len(groups)} parameter groups without names",
            "one group, or an optimizer made with module.named_parameters()",
        )
    _check(
        len(numbers) == len(names) and set(names) == parameters,
        f"{len(numbers)} parameters, where the model has {len(parameters)}",
        "the optimizer of all parameters of this model",
    )
    found: dict[str, dict[str, Any]] = {}
    for number, name in zip(numbers, names, strict=True):
        values = state_dict["state"].get(number, {})
        found[name] = {slot: value for slot, value in values.items() if value is not None}
        for slot, value in found[name].items():
            _check(
                slot == "step" or tuple(value.shape) == tensors[name].shape,
                f"{slot} of another shape than {name}, which has {list(tensors[name].shape)}",
                "the optimizer of this model",
            )
    return found


def _with_counts(opt_state: PyTree, rate: float, step: int, is_adam: bool) -> PyTree:
    """Returns an optimizer state with the learning rate and the number of steps of PyTorch.

    A learning rate that follows a schedule is not replaced.
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    rates = [path for path in paths if path.endswith("hyperparams.learning_rate")]
    if not rates:
        warnings.warn(
            f"the optimizer of the state does not record its learning rate, so PyTorch's {rate:g} "
            "is not loaded; make it with this rate, or use jaxtrain.optimizers",
            stacklevel=4,
        )
    if any("hyperparams_states.learning_rate" in path for path in paths):
        rates = []
    counts = [path for path in paths if is_adam and path.rpartition(".")[2] in ("count", "step")]
    values = dict.fromkeys(rates, np.asarray(rate)) | dict.fromkeys(counts, np.asarray(step))
    return with_arrays(opt_state, "", values)


def _has_slots(node: Any) -> bool:
    return type(node) in _SLOTS
