"""PyTorch modules as models: their operations, which `torch.export` lists, and rules in JAX.

`_adapter`, `_export`, `_interpreter` and `_messages` import PyTorch; no other module does.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

from jaxtrain.adapters._shared import Static, WithoutDropout
from jaxtrain.adapters.torch._dropout import call_without_dropout, dropout_rate, dropping_nothing
from jaxtrain.adapters.torch._rules import RULES, family
from jaxtrain.model import Model

__all__ = [
    "adapt",
    "call",
    "call_without_dropout",
    "dropout_rate",
    "dropping_nothing",
    "operations",
    "register",
    "without_dropout",
]

_FAMILIES = (
    *("_linear", "_convolution", "_pooling", "_normalization", "_activations", "_recurrent"),
    *("_arithmetic", "_reductions", "_shapes", "_indexing", "_creation", "_random"),
    "_special",
)
_register = family("Your own")


def register(name: str, *, random: bool = False) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers how an operation of PyTorch is computed in JAX.

    The function takes the operation's arguments in PyTorch's order, with arrays in place of
    tensors; dtypes are those of JAX, and devices and memory formats are left out. It must not
    change its arguments: the operation in place, such as `aten.relu_`, follows from it.

    Args:
      name: the operation, such as "aten.relu", or with its overload, "aten.max.dim".
      random: whether the function draws random numbers; it then takes a PRNG key, `key=`.

    Example:
      >>> @jt.adapters.torch.register("my_library.cube")
      ... def cube(x):
      ...     return x**3
    """
    load_rules()  # which would replace it later
    return _register(name, random=random)


def adapt(module: Any, call: Static | None) -> tuple[Model, tuple[Any, Any]]:
    """Returns the Model of a PyTorch module with its parameters and its other variables."""
    load_rules()
    from jaxtrain.adapters.torch import _adapter

    return _adapter.adapt(module, call)


def call(module: Any, inputs: Any) -> Any:
    """Returns the outputs of a module in its current mode; the inputs are tensors."""
    from jaxtrain.adapters.torch import _adapter

    return _adapter.call_forward(module, inputs, train=module.training, rngs=None)


def without_dropout(module: Any) -> Any:
    """Returns a copy of a module that drops nothing, also by functions that it calls."""
    from jaxtrain.adapters.torch import _adapter

    found = copy.deepcopy(module)
    call = _adapter.call_without_dropout
    found.forward = WithoutDropout(Static(found.forward), call)
    return found


def operations() -> dict[str, list[str]]:
    """Returns the names of the operations of PyTorch that have a rule, by family."""
    load_rules()
    found: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        library, operation, *_ = name.split(".")
        if library == "aten" and operation[0] != "_":
            found.setdefault(rule.family, []).append(operation)
    return {heading: [*dict.fromkeys(names)] for heading, names in found.items()}


def load_rules() -> None:
    """Imports the modules with the rules."""
    for name in _FAMILIES:
        importlib.import_module(f"{__name__}.{name}")
