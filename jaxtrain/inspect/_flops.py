"""Counts the floating-point operations of a program that JAX has traced.

XLA's own count takes the body of a loop once, so that an LSTM over 28 steps would count as one
step, and depends on the backend. Here a loop of known length counts all its steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from jaxtrain._compiler import inner_jaxprs

# One operation per element of the result.
_ELEMENTWISE = frozenset(
    [
        *("abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh"),
        *("cbrt", "ceil", "clamp", "cos", "cosh", "cumlogsumexp", "cummax", "cummin", "cumprod"),
        *("cumsum", "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor"),
        *("integer_pow", "lgamma", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow"),
        *("rem", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh"),
    ]
)
_REDUCTIONS = frozenset(("reduce", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"))
# Their operations depend on the implementation.
_UNKNOWN = frozenset(
    [
        *("cholesky", "custom_call", "eig", "eigh", "fft", "ffi_call", "householder_product"),
        *("lu", "pallas_call", "qr", "ragged_dot_general", "schur", "svd", "triangular_solve"),
        "tridiagonal_solve",
    ]
)


def count_flops(
    program: jex.ClosedJaxpr, layer_of: Callable[[str], Any] = lambda stack: None
) -> dict[Any, float]:
    """Returns the floating-point operations of a program, by layer.

    A multiplication and an addition count as two; the padding of a convolution counts, the zeros
    between dilated elements do not. Integer operations and copies do not count. A loop counts as
    often as it runs, and of the branches of a condition, the largest counts.

    Args:
      program: the program.
      layer_of: returns the layer of an operation from its name stack.

    Returns:
      The operations; NaN where they are not known, as in a loop whose length depends on data.
    """
    return _count(program.jaxpr, "", layer_of)


def _count(jaxpr: Any, outer: str, layer_of: Callable[[str], Any]) -> dict[Any, float]:
    total: dict[Any, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        stack = f"{outer}/{equation.source_info.name_stack}"
        name, params = str(equation.primitive), equation.params
        own = _own_flops(name, equation)
        if own is not None:
            total[layer_of(stack)] += own
            continue
        parts = [_count(inner, stack, layer_of) for inner in inner_jaxprs(params)]
        if name == "cond":
            parts = [max(parts, key=_total)]
        factor = params["length"] if name == "scan" else math.nan if name == "while" else 1
        for part in parts:
            for layer, flops in part.items():
                if flops:  # a loop of unknown length over integers has none
                    total[layer] += flops * factor
    return total


def _total(flops: dict[Any, float]) -> float:
    found = sum(flops.values())
    return math.inf if math.isnan(found) else found


def _own_flops(name: str, equation: Any) -> float | None:
    """Returns the operations of an equation; None if they are those of the programs inside it."""
    params, operands = equation.params, [each.aval for each in equation.invars]
    result: Any = equation.outvars[0].aval if equation.outvars else None
    flops: float
    if name in _ELEMENTWISE:
        flops = result.size
    elif name in _REDUCTIONS:
        flops = operands[0].size - result.size
    elif name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        flops = 2 * result.size * math.prod(operands[0].shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
        # The kernel has the input channels of one group.
        features = operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
        taps = operands[1].size / features / math.prod(params["lhs_dilation"])
        flops = 2 * result.size * taps
    elif name.startswith("reduce_window"):
        flops = result.size * (math.prod(params["window_dimensions"]) - 1)
    elif name.startswith("select_and_scatter_add"):
        flops = operands[0].size * math.prod(params["window_dimensions"])
    elif name.startswith("scatter"):
        flops = operands[2].size if name != "scatter" else 0
    elif name in _UNKNOWN:
        flops = math.nan
    else:
        return None
    return flops if jnp.issubdtype(result.dtype, jnp.inexact) else 0
