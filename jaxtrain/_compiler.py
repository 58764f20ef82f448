"""Known faults of XLA's compiler for CPUs, by version, and how the library avoids them.

docs/compiler.md lists them; tests/test_compiler.py runs the programs that show them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.extend import core as jex
from jaxlib.version import __version__ as JAXLIB

# Without the kernels of YNNPACK, in which most of the known faults are.
WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}
# Flags that switch off a part of the compiler; `verify` tries them in this order.
KNOWN_FLAGS = WITHOUT_YNN | {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_enable_fast_min_max": False,
    "xla_allow_excess_precision": False,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_cudnn_fmha": False,
    "xla_backend_optimization_level": 0,
}
# Products with a small matrix and a reduction after it are wrong beyond this many rows of float32;
# with half as many of float64. See https://github.com/jax-ml/jax/issues/39103.
WRONG_ROWS = frozenset({"0.10.2"})
_ROWS = 32_768
# Arrays with more axes may end the process. See https://github.com/jax-ml/jax/issues/39257.
_MAX_RANK = 6
# The largest number of programs of one function. Each takes some MiB, and keeps the model and the
# optimizer that it was compiled for.
_MAX_PROGRAMS = 24
_bounded: list[Any] = []
# Operations that only call a program, and the names of the parameters that contain it.
_CALLS = frozenset(
    [
        *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    ]
)
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Operations that compute each number from those at the same place in their operands.
ELEMENTWISE = frozenset(
    [
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"),
        *("atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos"),
        *("cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"),
        *("floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p"),
        *("logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or"),
        *("pow", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
        *("sharding_constraint", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
        *("sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    ]
)

Function = TypeVar("Function", bound=Callable[..., Any])


def bounded(function: Function) -> Function:
    """Lets `release_programs` drop the programs of a jitted function, a decorator."""
    _bounded.append(function)
    return function


def release_programs() -> None:
    """Drops all programs once a function has many of them, most of them for dead optimizers.

    JAX keeps each program for as long as the function exists, and what it has traced in caches that
    can only be emptied together. Programs in use are compiled again. Called where a new model or
    optimizer appears; does nothing while JAX traces a program.
    """
    if not is_tracing() and any(function._cache_size() > _MAX_PROGRAMS for function in _bounded):
        for function in _bounded:
            function.clear_cache()
        jax.clear_caches()


def is_tracing() -> bool:
    """Returns whether JAX traces a function; does not start JAX's devices."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # JAX has a mesh outside of traced functions only
        return True
    return False


def is_on_cpu() -> bool:
    """Returns whether JAX compiles for a CPU by default."""
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "cpu"
    return str(getattr(device, "platform", device)) == "cpu"


def limit_rows(size: int) -> int:
    """Returns the number of rows to evaluate at once: `size`, or what is compiled correctly."""
    if JAXLIB not in WRONG_ROWS or not is_on_cpu():
        return size
    double: Any = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return min(size, _ROWS // 2 if double else _ROWS)


def options_for(program: jex.ClosedJaxpr) -> dict[str, Any]:
    """Returns the `compiler_options` with which a program does not end the process."""
    return WITHOUT_YNN if is_on_cpu() and _rank(program.jaxpr) > _MAX_RANK else {}


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among the parameters of an operation, such as the body of a loop."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, jex.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, jex.Jaxpr):
                yield each


def called_program(equation: Any) -> Any:
    """Returns the program of an operation that only calls one, such as `jit`; else None."""
    if equation.primitive.name not in _CALLS:
        return None
    return next(equation.params[key] for key in _PROGRAMS if key in equation.params)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the operations of a program, and those of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation.params):
            yield from equations(inner)


def _rank(jaxpr: Any) -> int:
    """Returns the largest number of axes of an array in a program."""
    results = (each for equation in equations(jaxpr) for each in equation.outvars)
    arrays = (each.aval for each in (*jaxpr.invars, *results))
    return max((len(getattr(each, "shape", ())) for each in arrays), default=0)
