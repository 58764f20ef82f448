"""Marks operations, so that the lowering rules act on these alone."""

from __future__ import annotations

import contextlib
from typing import Any

from jax.experimental.xla_metadata import set_xla_metadata

# Unlike a context during lowering, this stays with operations in gradients, loops and functions
# that are compiled later.
_MARK = "jaxtrain_lowerings"


def scope() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the lowerings act on operations, and on their gradients.

    The steps, loops and predictions of jaxtrain, and the `Model` that `init_state` makes of a
    module, use it. A loop of your own that calls a network directly needs it to be as fast.

    Example:
      >>> from jaxtrain import lowerings
      >>> @jax.jit
      ... def forward(params, images):
      ...     with lowerings.scope():
      ...         return network.apply({"params": params}, images)
    """
    return set_xla_metadata(**{_MARK: "1"})


def is_in_scope(ctx: Any) -> bool:
    """Returns whether an operation that is lowered in a context is marked."""
    return _MARK in (ctx.jaxpr_eqn_ctx.xla_metadata or {})
