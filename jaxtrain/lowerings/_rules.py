"""Registers the lowering rules of this package for the platform "cpu", and turns them on and off.

Inside a loop, XLA's CPU compiler runs the gradients of a convolution by naive nested loops, up to
a hundred times slower than outside. The rules act where JAX translates a program for XLA: models
stay as they are written, gradients and `vmap` follow, and other platforms are untouched.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.interpreters import mlir

from jaxtrain._arguments import check_arguments
from jaxtrain._extras import needs_extra
from jaxtrain.errors import InputError
from jaxtrain.lowerings import _convolution, _pooling
from jaxtrain.lowerings._scope import is_in_scope

# In the environment, 0 turns the rules off, and "numba" is `use_cpu_lowerings(numba=True)`.
VARIABLE = "JAXTRAIN_CPU_LOWERINGS"

_enabled = os.environ.get(VARIABLE) != "0"
_with_numba = os.environ.get(VARIABLE) == "numba"


def use_cpu_lowerings(enabled: bool = True, *, numba: bool = False) -> None:
    """Chooses how convolutions and max pooling are compiled for CPUs, in programs of jaxtrain.

    The package's lowerings are on from `import jaxtrain`. They act in the forward and the backward
    pass of its steps, loops and predictions, and leave other programs of the process as they are.
    By default they use XLA's operations only; a NaN may then spread from one channel of a pixel to
    the others. With `numba`, convolutions call functions that Numba compiles for this processor,
    which takes three seconds once per installation. Programs that are already compiled are dropped
    from JAX's memory, so that they follow the new setting.

    The environment variable JAXTRAIN_CPU_LOWERINGS does the same before the process starts: 0 turns
    the lowerings off, and `numba` uses Numba.

    Args:
      enabled: whether programs compiled from now on use the lowerings.
      numba: whether convolutions use functions compiled by Numba, where these apply: float32, one
        or two dimensions, one group, one device, and output channels that fill vector registers (a
        multiple of 16 with AVX-512, of 8 with AVX2, else of 4). The others are lowered as without.

    Raises:
      MissingExtraError: if Numba is not installed.
      InputError: if Numba cannot write its cache.

    Example:
      >>> jt.use_cpu_lowerings(False)  # XLA's own convolutions
      >>> jt.use_cpu_lowerings(numba=True)
      >>> jt.use_cpu_lowerings()  # the default
    """
    global _enabled, _with_numba
    check_arguments(use_cpu_lowerings, locals())
    if numba and not enabled:
        raise InputError("numba is True and enabled is False; expected one of them")
    if numba:
        _import_numba()
    _enabled, _with_numba = enabled, numba
    jax.clear_caches()


def _register(
    primitive: Any, applies: Callable[..., bool], replacement: Callable[..., jax.Array]
) -> None:
    """Registers a rule that lowers `replacement` where it applies, and JAX's own rule elsewhere."""
    default = _default_rule(primitive)
    if default is None:
        warnings.warn(
            f"jaxtrain finds no rule of jax {jax.__version__} for {primitive} on CPUs, so it "
            "leaves this operation to XLA, which is slow in loops; install a version of jax that "
            "`pip show jaxtrain` allows",
            stacklevel=2,
        )
        return

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        if not (_enabled and is_in_scope(ctx) and applies(*ctx.avals_in, *ctx.avals_out, **params)):
            return default(ctx, *operands, **params)
        if primitive is lax.conv_general_dilated_p and _with_numba and _calls_are_possible(ctx):
            params["compiled"] = _import_numba()
        function = functools.partial(replacement, **params)
        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    mlir.register_lowering(primitive, rule, platform="cpu")


def _import_numba() -> Any:
    try:
        with needs_extra("numba"):
            from jaxtrain.lowerings import _numba
    except RuntimeError as error:  # no folder for its cache
        raise InputError(
            f"Numba cannot compile the convolutions ({error}); expected a folder that can be "
            "written, in the environment variable NUMBA_CACHE_DIR"
        ) from error
    return _numba


def _calls_are_possible(ctx: Any) -> bool:
    """Returns whether a program may call functions of this process.

    An exported program may run elsewhere, and XLA cannot divide a call among devices.
    """
    module = ctx.module_context
    return (
        not module.lowering_parameters.for_export
        and getattr(module.axis_context, "num_devices", None) == 1
    )


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
