"""Registers the lowering rules of this package for the platform "cpu", and turns them on and off.

Inside a loop, XLA's CPU compiler runs the gradients of a convolution by naive nested loops, up to
a hundred times slower than outside. The rules act where JAX translates a program for XLA: models
stay as they are written, gradients and `vmap` follow, and other platforms are untouched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.interpreters import mlir

from jaxtrain.lowerings import _convolution, _pooling

# 0 in the environment turns the rules off before anything is compiled.
VARIABLE = "JAXTRAIN_CPU_LOWERINGS"

_enabled = os.environ.get(VARIABLE) != "0"


def use_cpu_lowerings(enabled: bool) -> None:
    """Turns the package's CPU lowerings of convolutions and max pooling on or off.

    They are on from `import jaxtrain`, for every program of the process that JAX compiles for a
    CPU, unless the environment variable JAXTRAIN_CPU_LOWERINGS is 0. Programs that are already
    compiled are dropped from JAX's memory, so that they follow the new setting.

    Args:
      enabled: whether programs compiled from now on use them.

    Example:
      >>> jt.use_cpu_lowerings(False)  # XLA's own convolutions
      >>> jt.use_cpu_lowerings(True)
    """
    global _enabled
    _enabled = enabled
    jax.clear_caches()


def _register(
    primitive: Any, applies: Callable[..., bool], replacement: Callable[..., jax.Array]
) -> None:
    """Registers a rule that lowers `replacement` where it applies, and JAX's own rule elsewhere."""
    default = _default_rule(primitive)
    if default is None:
        return

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        if not _enabled or not applies(*ctx.avals_in, *ctx.avals_out, **params):
            return default(ctx, *operands, **params)
        function = functools.partial(replacement, **params)
        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    mlir.register_lowering(primitive, rule, platform="cpu")


def _default_rule(primitive: Any) -> Callable[..., Any] | None:
    """Returns JAX's own rule for a CPU, or None if this version of JAX keeps it elsewhere."""
    try:
        from jax._src.interpreters.mlir import _platform_specific_lowerings

        return _platform_specific_lowerings["cpu"][primitive].rule
    except (ImportError, KeyError, AttributeError):
        return None


def _register_xla_convolution() -> None:
    """Lowers `xla_convolution_p` by JAX's own rule for convolutions."""
    default = _default_rule(lax.conv_general_dilated_p)

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        assert default is not None
        return default(ctx, *operands, **_convolution.full_params(*ctx.avals_in, **params))

    mlir.register_lowering(_convolution.xla_convolution_p, rule, platform="cpu")


_register_xla_convolution()  # before the default rule is replaced
_register(lax.conv_general_dilated_p, _convolution.applies, _convolution.convolve)
_register(lax.select_and_scatter_add_p, _pooling.applies, _pooling.max_pool_gradient)
