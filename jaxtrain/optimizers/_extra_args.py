"""Passes to an optimizer the extra arguments that it takes, and no others."""

from __future__ import annotations

import inspect
from typing import Any

import optax
from jaxtyping import PyTree


def accepting_extra_args(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose update takes any extra arguments.

    `optax.with_extra_args_support` passes all of them to a `GradientTransformationExtraArgs`, some
    of which, such as `optax.contrib.sam`, refuse those that they do not name.
    """
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optax.with_extra_args_support(optimizer)
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return optimizer
    names = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        taken = {name: value for name, value in extra_args.items() if name in names}
        return optimizer.update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
