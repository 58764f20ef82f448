"""from_torch: the optimizer that a constructed optimizer of PyTorch is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxtrain._arguments import describe
from jaxtrain.errors import InputError
from jaxtrain.optimizers._torch import OPTIMIZERS

# Options that say how PyTorch computes an update, and what a group contains besides options.
_IGNORED = {"foreach", "fused", "capturable", "differentiable", "params", "param_names"}


def from_torch(torch_optimizer: Any, module: Any = None) -> optax.GradientTransformation:
    """Returns the optimizer with the options of an optimizer of `torch.optim`.

    Parameter groups become parts of the state's parameters, by name: each has its own options, and
    parameters that are in no group stay as they are.

    Args:
      torch_optimizer: SGD, Adam, AdamW, RMSprop, Rprop, Adagrad or Adadelta, which has taken no
        step and has no scheduler.
      module: the module whose parameters it has. It is needed if there are several groups, or not
        all parameters are in one, and the optimizer was not made from `module.named_parameters()`.

    Raises:
      InputError: the optimizer is another one, has an option or a state that cannot be translated,
        or the names of its parameters are unknown; `init_state` raises it if the state has more
        parameters than the only group, whose names are unknown.

    Example:
      >>> import torch
      >>> module = torch.nn.Linear(64, 10)
      >>> theirs = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
      >>> optimizer = jt.optimizers.from_torch(theirs)
      >>> state = jt.init_state(module, optimizer, jnp.ones((1, 64)), key=key)
    """
    bases = [f"{base.__module__}.{base.__name__}" for base in type(torch_optimizer).__mro__]
    kind = type(torch_optimizer).__name__
    name = kind.lower()
    if "torch.optim.optimizer.Optimizer" not in bases or name == "lbfgs" or name not in OPTIMIZERS:
        known = ", ".join(x for x in OPTIMIZERS if x != "lbfgs")
        raise InputError(
            f"torch_optimizer is a {kind}; expected an optimizer of torch.optim that "
            f"jaxtrain.optimizers has ({known}): L-BFGS is jaxtrain.optimizers.lbfgs or minimize",
            argument="torch_optimizer",
        )
    for slots in torch_optimizer.state.values():
        if any(slots.get(slot) is not None for slot in ("momentum_buffer", "prev")) or (
            slots.get("step", 0) > 0
        ):
            raise InputError(
                f"the {kind} has taken steps, and its averages cannot be translated; expected one "
                "that has just been made",
                argument="torch_optimizer",
            )
    if module is not None and not hasattr(module, "named_parameters"):
        raise InputError(
            f"module is {describe(module)}; expected the PyTorch module of the optimizer",
            argument="module",
        )
    groups = torch_optimizer.param_groups
    parts = [_translate(name, group, torch_optimizer.defaults) for group in groups]
    names = [_names(group, module) for group in groups]
    if None in names:
        if len(groups) == 1:
            return _of_all_parameters(parts[0], kind, groups[0]["params"])
        raise InputError(
            f"the {kind} has {len(groups)} groups of parameters without names; expected the module "
            "as well: from_torch(torch_optimizer, module)",
            argument="module",
        )
    label_of = {name: str(i) for i, group in enumerate(names) for name in group or ()}

    def label(params: PyTree) -> PyTree:
        def find(path: Any, _: Any) -> str:
            return label_of.get(jax.tree_util.keystr(path, simple=True, separator="."), "none")

        labels = jax.tree_util.tree_map_with_path(find, params)
        if set(label_of.values()) - set(jax.tree.leaves(labels)):
            raise InputError(
                f"the state has none of the parameters of a group of the {kind}, such as "
                f"{next(iter(label_of))}; expected a state of the same PyTorch module",
                argument="optimizer",
            )
        return labels

    named = {str(i): part for i, part in enumerate(parts)}
    return optax.partition({**named, "none": optax.set_to_zero()}, label)


def _of_all_parameters(
    optimizer: optax.GradientTransformation, kind: str, tensors: list[Any]
) -> optax.GradientTransformation:
    """Returns an optimizer that refuses a state with more parameters than a group without names.

    The sizes are compared, since another framework may transpose, join or split the arrays.
    """
    trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)

    def init(params: PyTree) -> PyTree:
        size = sum(map(jnp.size, jax.tree.leaves(params)))
        if size > trained:
            raise InputError(
                f"the {kind} trains {trained} numbers of unnamed parameters, and the state has "
                f"{size}; expected the module as well: from_torch(torch_optimizer, module)",
                argument="module",
            )
        return optimizer.init(params)

    return optimizer._replace(init=init)


def _translate(
    name: str, group: Mapping[str, Any], defaults: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Returns the optimizer of a group of parameters."""
    options = {**defaults, **group}
    if name == "adam" and options.get("decoupled_weight_decay"):
        name = "adamw"
    known = {"lr", *inspect.signature(OPTIMIZERS[name]).parameters}
    for option, value in options.items():
        if option == "initial_lr":
            raise InputError(
                "the optimizer has a scheduler, which cannot be translated; expected an optimizer "
                "without one, and a schedule such as jaxtrain.optimizers.step_lr as the rate of "
                f"jaxtrain.optimizers.{name}",
                argument="torch_optimizer",
            )
        is_used = option not in known | _IGNORED | {"decoupled_weight_decay"} and value
        if is_used:
            raise InputError(
                f"{option} is {value!r} in the optimizer of PyTorch, and "
                f"jaxtrain.optimizers.{name} has no such option; expected {option}=False",
                argument="torch_optimizer",
            )
    found = {option: value for option, value in options.items() if option in known}
    return OPTIMIZERS[name](float(found.pop("lr")), **found)


def _names(group: Mapping[str, Any], module: Any) -> list[str] | None:
    """Returns the names of a group's trained parameters, or None if they are unknown."""
    if "param_names" in group:
        pairs = zip(group["param_names"], group["params"], strict=True)
        return [name for name, parameter in pairs if parameter.requires_grad]
    if module is None:
        return None
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    unknown = [tuple(x.shape) for x in group["params"] if id(x) not in name_of]
    if unknown:
        raise InputError(
            f"the optimizer has a parameter of shape {unknown[0]} that the module does not have; "
            "expected the module whose parameters it was made of",
            argument="module",
        )
    return [name_of[id(x)] for x in group["params"] if x.requires_grad]
