"""Passes to an optimizer the extra arguments that it takes, and no others."""

from __future__ import annotations

import re
from typing import Any

import optax
from jaxtyping import PyTree

from jaxtrain.errors import InputError
from jaxtrain.optimizers._check import check_optimizer

_REFUSED = re.compile(r"unexpected keyword argument '(\w+)'")


def accepting_extra_args(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose update takes any extra arguments.

    Some, such as `optax.contrib.sam`, refuse arguments that they do not name, and `optax.chain`
    passes them on regardless. Its signature does not show this, so the update is called again
    without the refused argument; a compiled program is not affected. The other parts of the chain
    do not receive that argument either.

    Raises:
      InputError: the optimizer is not an optax transformation; or, in an update, one part of it
        refuses an argument that another needs.
    """
    check_optimizer(optimizer)
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optax.with_extra_args_support(optimizer)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        refused: list[str] = []
        while True:
            try:
                return optimizer.update(updates, state, params, **extra_args)
            except TypeError as error:
                for name in refused:
                    if f"'{name}'" in str(error):
                        raise InputError(
                            f"one part of the optimizer refuses the argument {name}, and another "
                            "requires it; wrap the part that refuses it, for example in "
                            "jaxtrain.optimizers.record_gradient_norm(optax.contrib.sam(...))",
                            argument="optimizer",
                        ) from error
                found = _REFUSED.search(str(error))
                if found is None or found[1] not in extra_args:
                    raise
                refused.append(found[1])
                del extra_args[found[1]]

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
