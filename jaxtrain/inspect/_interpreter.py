"""Evaluates a traced program one operation at a time, also in float64 with random rounding."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxtrain._compiler import called_program

# Elementwise operations that round. Copies, comparisons, maxima and signs are exact.
_ROUNDED = frozenset(
    [
        *("acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh", "cbrt"),
        *("cos", "cosh", "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"),
        *("integer_pow", "lgamma", "log", "log1p", "logistic", "mul", "pow", "rem", "rsqrt"),
        *("sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "convert_element_type"),
    ]
)
# Operations that add up many terms.
_SUMS = (
    *("reduce_sum", "reduce_prod", "reduce_window_sum", "cumsum", "cumprod", "cumlogsumexp"),
    *("scatter-add", "scatter_add", "scatter-mul", "select_and_scatter_add"),
)
# Operations that depend on the dtype, and are computed in that of the program.
_IN_OWN_TYPE = frozenset(
    ("bitcast_convert_type", "nextafter", "random_gamma", "reduce_precision", "rng_uniform")
)


class Interpreter:
    """Evaluates a program one operation at a time.

    Attributes:
      values: the floating-point results of all operations outside of loops, in order.
      equations: the operation of each.
    """

    def __init__(
        self, *, unroll: bool, exact: bool = False, noise: np.random.Generator | None = None
    ) -> None:
        """`unroll` runs loops step by step, `exact` computes in float64, `noise` adds rounding."""
        self._unroll, self._exact, self._noise = unroll, exact, noise
        self.values: list[Any] = []
        self.equations: list[Any] = []

    def run(self, program: Any, arguments: list[Any], *, is_loop: bool = False) -> list[Any]:
        """Returns the outputs of a program, a `ClosedJaxpr` or a `Jaxpr`."""
        jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
        names = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(names, map(self._lift, [*consts, *arguments]), strict=True))

        def read(each: Any) -> Any:
            return self._lift(each.val) if isinstance(each, jex.Literal) else known[each]

        for equation in jaxpr.eqns:
            operands = list(map(read, equation.invars))
            is_call = called_program(equation) is not None
            results = self._apply(equation, operands, is_loop)
            known.update(zip(equation.outvars, results, strict=True))
            if not is_call and not is_loop:
                floats = [each for each in results if is_floating(each)]
                self.values += floats
                self.equations += [equation] * len(floats)
        return list(map(read, jaxpr.outvars))

    def _lift(self, value: Any) -> Any:
        return np.asarray(value, np.float64) if self._exact and is_floating(value) else value

    def _apply(self, equation: Any, operands: list[Any], is_loop: bool) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        inner = called_program(equation)
        if inner is not None:
            return self.run(inner, operands, is_loop=is_loop)
        if self._unroll and name == "scan" and params["length"] and "num_consts" in params:
            return self._scan(operands, **params)
        if self._unroll and name == "while":
            return self._while(operands, **params)
        if self._unroll and name == "cond":
            branches = params["branches"]
            index = min(max(int(operands[0]), 0), len(branches) - 1)
            return self.run(branches[index], operands[1:], is_loop=True)
        if not self._exact:
            return _bind(equation, operands, params)
        n = _terms(name, operands, equation.outvars)
        if n is not None:
            operands = [self._rounded(each, equation, math.sqrt(n)) for each in operands]
        results = list(map(self._lift, self._bind_exactly(equation, operands)))
        if name in _ROUNDED:
            results = [self._rounded(each, equation) for each in results]
        return results

    def _bind_exactly(self, equation: Any, operands: list[Any]) -> list[Any]:
        if equation.primitive.name not in _IN_OWN_TYPE:
            with contextlib.suppress(TypeError, ValueError, NotImplementedError):
                params = {
                    key: np.dtype(np.float64) if _is_floating_type(value) else value
                    for key, value in equation.params.items()
                }
                return _bind(equation, operands, params)
        operands = [
            np.asarray(value, each.aval.dtype) if is_floating(value) else value
            for value, each in zip(operands, equation.invars, strict=True)
        ]
        return _bind(equation, operands, equation.params)

    def _rounded(self, value: Any, equation: Any, times: float = 1.0) -> Any:
        if self._noise is None or not is_floating(value):
            return value
        unit = times * float(jnp.finfo(equation.outvars[0].aval.dtype).eps)
        exact = np.asarray(value)
        return exact * (1 + unit * self._noise.uniform(-1, 1, exact.shape))

    def _scan(
        self,
        operands: list[Any],
        *,
        jaxpr: Any,
        length: int,
        reverse: bool,
        num_consts: int,
        num_carry: int,
        **_: Any,
    ) -> list[Any]:
        start = num_consts + num_carry
        consts, carry, rows = operands[:num_consts], operands[num_consts:start], operands[start:]
        found = []
        for index in range(length)[:: -1 if reverse else 1]:
            inputs = [*consts, *carry, *(each[index] for each in rows)]
            results = self.run(jaxpr, inputs, is_loop=True)
            carry = results[:num_carry]
            found.append(results[num_carry:])
        columns = zip(*found[:: -1 if reverse else 1], strict=True)
        return [*carry, *map(self._stack, columns)]

    def _stack(self, rows: Any) -> Any:
        return np.stack(rows) if self._exact and is_floating(rows[0]) else jnp.stack(rows)

    def _while(
        self,
        operands: list[Any],
        *,
        cond_jaxpr: Any,
        body_jaxpr: Any,
        cond_nconsts: int,
        body_nconsts: int,
        **_: Any,
    ) -> list[Any]:
        start = cond_nconsts + body_nconsts
        of_condition, of_body = operands[:cond_nconsts], operands[cond_nconsts:start]
        carry = operands[start:]
        while bool(self.run(cond_jaxpr, [*of_condition, *carry], is_loop=True)[0]):
            carry = self.run(body_jaxpr, [*of_body, *carry], is_loop=True)
        return carry


def _bind(equation: Any, operands: list[Any], params: dict[str, Any]) -> list[Any]:
    with equation.ctx.manager:  # the settings under which the operation was traced
        found = equation.primitive.bind(*operands, **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _terms(name: str, operands: list[Any], results: list[Any]) -> float | None:
    """Returns how many terms an operation adds up for each result; None for other operations."""
    size = max(1, results[0].aval.size) if results else 1
    if name in ("dot_general", "conv_general_dilated"):
        return max(1.0, math.sqrt(operands[0].size * operands[1].size / size))
    if name.startswith(_SUMS):
        return max(1.0, max(each.size for each in operands) / size)
    return None


def is_floating(value: Any) -> bool:
    """Returns whether a value is a floating-point number or an array of them."""
    return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)


def _is_floating_type(value: Any) -> bool:
    return isinstance(value, np.dtype | type) and jnp.issubdtype(value, jnp.floating)
