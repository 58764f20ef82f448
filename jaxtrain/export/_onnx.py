"""Saves a trained model as an ONNX file, by jax2onnx."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from jaxtrain import parallel
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._extras import needs_extra
from jaxtrain._files import output_path, write_atomically
from jaxtrain.errors import InputError, first_line
from jaxtrain.export._prediction import (
    prediction_function,
    symbolic_inputs,
    trace_any_number,
)
from jaxtrain.training.state import TrainState

# Each element of a window is an operation of the file.
_MAX_WINDOW = 64
# Examples of the comparison.
_MAX_SAMPLES = 16
_HINT = "use jaxtrain.export.stablehlo, which takes every model"
# The packages whose functions jax2onnx replaces.
_PATCHED = ("jax", "flax", "equinox")


def onnx(
    state: TrainState,
    path: str | os.PathLike[str],
    inputs: PyTree,
    *,
    preprocess: Callable[[PyTree], PyTree] | None = None,
    postprocess: Callable[[Any], Any] | None = None,
    opset: int = 23,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Writes a model to an ONNX file that takes any number of examples.

    The conversion is that of jax2onnx, which does not know all operations of JAX. Before the file
    is written, onnxruntime runs it, and its outputs are compared with those of JAX.

    Args:
      state: the trained state.
      path: the file, such as "model.onnx"; it is written completely or not at all.
      inputs: array, or pytree of arrays whose leaves become the inputs of the file in the order
        of `jax.tree.leaves`, [examples, ...]. One example is enough; the values, of at most 16
        examples, are used for the comparison only.
      preprocess: function in JAX from these inputs to those of the model, such as a normalization.
      postprocess: function in JAX of the outputs, such as `jax.nn.softmax`.
      opset: version of ONNX's operators; an old runtime needs a small one.
      input_names: names of the inputs in the file; None leaves them to jax2onnx.
      output_names: names of the outputs, which are the leaves of the model's outputs.

    Raises:
      MissingExtraError: jax2onnx or onnxruntime is not installed.
      InputError: the model does not take the inputs or only a fixed number of examples, jax2onnx
        cannot convert it, there are more or fewer names than arrays, or `path` is something else
        than a new or regular file.
      StorageError: the file cannot be written.

    Example:
      >>> jt.export.onnx(state, "model.onnx", test.inputs[:1], postprocess=jax.nn.softmax)
    """
    check_arguments(onnx, locals(), eager="call it outside")
    file = output_path(path)
    check_integer(opset, "opset", minimum=1)
    predict = prediction_function(state, preprocess, postprocess)
    specs = symbolic_inputs(inputs, "B")
    _check_names(input_names, "input_names", len(jax.tree.leaves(specs)))
    with needs_extra("onnx"), _quiet(), _restored():
        import onnxruntime
        from jax2onnx import to_onnx
    with parallel.without_mesh():
        # Traced here, since some of the functions by which jax2onnx replaces those of Flax do not
        # take all arguments.
        closed = trace_any_number(
            lambda function: jax.make_jaxpr(function)(specs), predict, specs, inputs
        )
    _check_names(output_names, "output_names", len(closed.out_avals))

    # Without operations whose results are not used, such as the random initial carry of an LSTM.
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)

    def evaluate(*leaves: Any) -> Any:
        return _evaluate(jaxpr, closed.consts, *leaves)

    samples = [
        # At least two, since the file takes any number.
        np.repeat(np.asarray(leaf[:_MAX_SAMPLES], spec.dtype), 2 if len(leaf) == 1 else 1, axis=0)
        for leaf, spec in zip(jax.tree.leaves(inputs), jax.tree.leaves(specs), strict=True)
    ]
    try:
        with _quiet(), _restored(), parallel.without_mesh():
            model = to_onnx(
                evaluate,
                jax.tree.leaves(specs),
                opset=opset,
                input_names=input_names,
                output_names=output_names,
            )
        content = model.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        session = onnxruntime.InferenceSession(content, options)
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, dict(zip(names, samples, strict=True)))
    except Exception as error:  # jax2onnx and onnxruntime raise different types
        reason = first_line(error)
        raise InputError(f"jax2onnx cannot convert the model: {reason}; {_HINT}") from error
    sample = jax.tree.unflatten(jax.tree.structure(inputs), samples)
    wanted = jax.tree.leaves(jax.jit(predict)(sample))
    for ours, theirs in zip(map(np.asarray, wanted), found, strict=True):
        differs = ~np.isclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        if np.any(differs):
            difference = np.max(np.abs(ours[differs].astype(float) - theirs[differs]))
            raise InputError(
                f"the ONNX model differs from that in JAX by {difference:g}; expected at most "
                f"1e-5: {_HINT}"
            )
    write_atomically(file, content)


def _check_names(names: Any, argument: str, count: int) -> None:
    if names is None:
        return
    if not len(names) == len(set(names)) == count:
        raise InputError(
            f"{argument} is {names!r}; expected {count} different names", argument=argument
        )


def _evaluate(jaxpr: Any, constants: Sequence[Any], *inputs: Any) -> list[Any]:
    """Evaluates a jaxpr with max pooling as a maximum of slices.

    jax2onnx makes one pooling over all axes of it, which onnxruntime does not run. Calls are
    inlined, since jax2onnx 0.17 does not convert those of JAX 0.12.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        operands = [read(variable) for variable in equation.invars]
        inner = params.get("jaxpr") if name in ("jit", "pjit") else params.get("call_jaxpr")
        if inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, *operands)
        elif name == "reduce_window_max" and _is_pooling(**params):
            results = [_max_pool(*operands, shape=equation.outvars[0].aval.shape, **params)]
        else:
            params = equation.primitive.get_bind_params(params)
            results = equation.primitive.bind(*operands, **params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _is_pooling(
    window_dimensions: Any, base_dilation: Any, window_dilation: Any, padding: Any, **_: Any
) -> bool:
    plain = {*base_dilation, *window_dilation} == {1} and not any(map(any, padding))
    return plain and math.prod(window_dimensions) <= _MAX_WINDOW


def _max_pool(x: Any, *, shape: Any, window_dimensions: Any, window_strides: Any, **_: Any) -> Any:
    slices = [
        lax.slice(
            x,
            tap,
            [t + (n - 1) * s + 1 for t, n, s in zip(tap, shape, window_strides, strict=True)],
            window_strides,
        )
        for tap in itertools.product(*map(range, window_dimensions))
    ]
    return functools.reduce(lax.max, slices)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Undoes changes to the modules and classes of JAX, Flax and Equinox.

    jax2onnx replaces functions while it traces, and leaves some, such as `jax.numpy.cumsum`.
    """
    modules = [m for name, m in [*sys.modules.items()] if name.partition(".")[0] in _PATCHED]
    classes = [
        value
        for module in modules
        for value in [*vars(module).values()]
        if isinstance(value, type) and value.__module__.partition(".")[0] in _PATCHED
    ]
    owners = {id(owner): owner for owner in (*modules, *classes)}
    before = [(owner, dict(vars(owner))) for owner in owners.values()]
    try:
        yield
    finally:
        for owner, attributes in before:
            for name, value in dict(vars(owner)).items():
                old = attributes.get(name)
                if name not in attributes and not isinstance(value, ModuleType):
                    delattr(owner, name)
                elif value is not old and (callable(old) or hasattr(old, "__get__")):
                    setattr(owner, name, old)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings and log messages of jax2onnx, and keeps the settings of `logging`."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        # `logging.info`, which jax2onnx calls, adds a handler.
        root.handlers[:] = handlers
        root.setLevel(level)
