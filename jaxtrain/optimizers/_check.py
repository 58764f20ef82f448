"""Refuses what is not an optax transformation, and says how to make one of it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import optax

from jaxtrain.errors import InputError


def check_optimizer(optimizer: Any) -> None:
    """Raises InputError unless `optimizer` is an optax transformation."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    name = getattr(optimizer, "__name__", "optimizer")
    found, expected = f"optimizer is a {kind.__name__}", "an optax transformation"
    if hasattr(optimizer, "gradient_transformation"):  # optax.MultiSteps
        found, expected = f"optimizer is an optax.{kind.__name__}", "its gradient_transformation()"
    elif any(base.__module__.startswith("torch.optim") for base in kind.__mro__):
        found = f"optimizer is PyTorch's {kind.__name__}"
        expected += ": pass jaxtrain.optimizers.from_torch(optimizer)"
    elif inspect.isroutine(optimizer) or isinstance(optimizer, (type, functools.partial)):
        found = f"optimizer is the function {name}"
        expected += f": call it: {name if name.isidentifier() else 'optimizer'}(learning_rate)"
    else:
        if isinstance(optimizer, (str, int, float)):
            found = f"optimizer is {optimizer!r}"
        expected += ", such as jaxtrain.optimizers.sgd(0.01)"
    raise InputError(f"{found}; expected {expected}", argument="optimizer")
