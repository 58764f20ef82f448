"""verify: computes a training step in several ways, which should agree up to rounding."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from jaxtrain import adapters, parallel
from jaxtrain._arguments import check_arguments
from jaxtrain._compiler import KNOWN_FLAGS, equations
from jaxtrain.dataset import Dataset, as_dataset, named_arrays
from jaxtrain.inspect._interpreter import Interpreter
from jaxtrain.losses import Loss, context_parameters, mean_terms
from jaxtrain.model import Model
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import Batch, LossContext, check_loss, gradients
from jaxtrain.training.tracing import traced_prediction

# Differences up to this many times the effect of rounding are explained by it.
_FACTOR = 8
_ROUNDED_RUNS = 2
_DRAWS = frozenset(("random_bits", "random_gamma", "rng_bit_generator", "threefry2x32"))
_OPERATIONS, _COMPILED, _HALVES = "operation by operation", "compiled", "as two half batches"


class Difference(NamedTuple):
    """The largest difference between one way to compute a step and the step in float64.

    Attributes:
      way: how the step was computed, such as "compiled" or "under vmap".
      quantity: the array whose difference is largest relative to `explained`, such as "loss" or
        "gradients.Dense_0.kernel".
      difference: the largest absolute difference of an element; infinite if one is not finite.
      explained: the largest difference that rounding explains.
    """

    way: str
    quantity: str
    difference: float
    explained: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.explained


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """Whether the ways to compute a training step agree; prints as a table.

    Attributes:
      differences: the largest difference of each way from float64.
      operation: the first operation whose result differs by more than rounding, with its place in
        the source; None if there is none.
      flag: the compiler's flag that removes the difference; None if none of the known ones does.

    Example:
      >>> verification = jt.verify(state, batch, loss_fn)
      >>> verification.differences[1].way, verification.differences[1].ok
      ('compiled', True)
    """

    differences: tuple[Difference, ...]
    operation: str | None
    flag: str | None

    @property
    def ok(self) -> bool:
        """Whether rounding explains all differences."""
        return all(each.ok for each in self.differences)

    def __str__(self) -> str:
        rows = [("way", "largest difference in", "difference", "explained", "")]
        for way, quantity, difference, explained in self.differences:
            verdict = "ok" if difference <= explained else "WRONG"
            rows.append((way, quantity, f"{difference:.2g}", f"{explained:.2g}", verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.operation is not None:
            lines.append(f"first operation that differs: {self.operation}")
        if not self.ok:
            remedy = "no known flag of the compiler" if self.flag is None else self.flag
            lines.append(f"removed by: {remedy}")
        return "\n".join(lines)

    __repr__ = __str__


def verify(state: TrainState, batch: Batch, loss_fn: Loss) -> Verification:
    """Computes a training step in several ways, and reports differences that rounding cannot cause.

    The loss, the gradients, the predictions and the model state are computed in float64, one
    operation at a time, and compared with the same step in float32: operation by operation,
    compiled, compiled inside a loop, compiled under `vmap`, and as two half batches. The halves of
    a model that draws random numbers or has a state, as dropout and batch norm do, or that has sown
    losses, legitimately differ, so they are computed in evaluation mode, without sown losses. They
    are left out where the loss takes a key, the model draws in evaluation as well, or the loss adds
    up several means of different weights, and so is not the mean of its halves.

    What rounding explains is measured. The step in float64 is repeated with random changes of up to
    one unit in the last place of float32 (or of the type that the program has there) to the result
    of each operation that rounds, and of √n units to the terms of sums and products of n terms
    (Monte Carlo arithmetic, Parker 1997). Eight times the largest change among the elements of an
    array is explained.

    If a way differs, the values within the step are compared in the order of the program, to name
    the first that is wrong. As each operation is compiled and run alone, this takes seconds for
    small networks. Loops are run step by step, so verify a recurrent network on short sequences.

    Args:
      state: the state before the step, on one device; not modified.
      batch: inputs and targets with leading axis [batch], a `Dataset` or a tuple. Use the batch
        size of training, since a fault of a compiler may depend on it.
      loss_fn: per-example loss.

    Returns:
      The largest difference of each way; `verification.ok` says whether rounding explains all.

    Raises:
      InputError: `batch` is not a valid batch, or the loss does not return one value per example.

    Example:
      >>> verification = jt.verify(state, batch, loss_fn)
      >>> verification.ok
      True
      >>> table = str(verification)  # print(verification) shows it
    """
    check_arguments(verify, locals(), eager="call it outside")
    check_state_type(state)
    check_loss(loss_fn)
    state, data = jax.tree.map(jnp.asarray, (state, as_dataset(batch, "batch")))
    parallel.check_devices(state, data)
    traced_prediction(state, data, "batch")  # whose error names inputs that do not fit
    with parallel.without_mesh():
        function = functools.partial(_results, loss_fn=loss_fn)
        step = _Step(function, state, data)
        results, values = step.one_by_one()
        alone = step.compare(_OPERATIONS, results)
        ways = [step.compare(way, run(function, state, data)) for way, run in _WAYS.items()]
        operation = None if alone.ok else step.first(values)
        flag = None
        if (wrong := next((each for each in ways if not each.ok), None)) is not None:
            run = _WAYS[wrong.way]
            operation = operation or step.first(run(step.values, state, data))
            operation = operation or step.first_alone(run, wrong.quantity)
            flag = _removing_flag(
                functools.partial(run, function, state, data),
                lambda found: step.compare(wrong.way, found).ok,
            )
        draws = adapters.draws_in_evaluation(state.model) or "key" in context_parameters(loss_fn)
        has_halves = len(data) > 1 and not draws and state.model.independent_examples
        has_halves = has_halves and _has_one_mean(state, data, loss_fn)
        halves = [_halves(step, state, data, loss_fn)] if has_halves else []
    return Verification((alone, *ways, *halves), operation, flag)


def _results(state: TrainState, batch: Dataset, *, loss_fn: Loss) -> dict[str, Any]:
    """Returns what a step computes, without integers and keys."""
    (loss, aux), grads = gradients(state, batch, loss_fn)
    found = {
        "loss": loss,
        "gradients": grads,
        "predictions": aux.predictions,
        "model_state": aux.model_state,
    }
    return {
        path: leaf
        for path, leaf in named_arrays(found, "")
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


class _Step:
    """A function of a state and a batch as a program of operations, with its values in float64."""

    def __init__(self, function: Callable[..., Any], state: TrainState, batch: Dataset) -> None:
        self.function, self._state, self._batch = function, state, batch
        self._program, shapes = jax.make_jaxpr(function, return_shape=True)(state, batch)
        self._names = list(shapes)
        self.draws = _contains(self._program.jaxpr, _DRAWS)
        with jax.enable_x64(True):
            exact = Interpreter(unroll=True, exact=True)
            results = exact.run(self._program, jax.tree.leaves((state, batch)))
            self._values, self._equations = exact.values, exact.equations
            self._results = dict(zip(self._names, results, strict=True))
            noise = [0.0] * len(self._values)
            result_noise = [0.0] * len(results)
            for seed in range(_ROUNDED_RUNS):
                run = Interpreter(unroll=True, exact=True, noise=np.random.default_rng(seed))
                rounded = run.run(self._program, jax.tree.leaves((state, batch)))
                noise = _bounds(noise, run.values, self._values)
                result_noise = _bounds(result_noise, rounded, results)
        self._noise = noise
        self._explained = dict(zip(self._names, result_noise, strict=True))

    def values(self, state: TrainState, batch: Dataset) -> list[Any]:
        """Returns the values of all operations; may be traced."""
        run = Interpreter(unroll=False)
        run.run(self._program, jax.tree.leaves((state, batch)))
        return run.values

    def one_by_one(self) -> tuple[dict[str, Any], list[Any]]:
        """Returns the results and the values of all operations, each compiled alone."""
        run = Interpreter(unroll=True)
        results = run.run(self._program, jax.tree.leaves((self._state, self._batch)))
        return dict(zip(self._names, results, strict=True)), run.values

    def compare(self, way: str, found: dict[str, Any]) -> Difference:
        """Returns the result whose difference is largest relative to what rounding explains."""
        rows = [
            Difference(way, name, _largest(found[name], exact), self._explained[name])
            for name, exact in self._results.items()
        ]
        return max(rows, key=lambda each: _ratio(each.difference, each.explained))

    def first(self, values: list[Any]) -> str | None:
        """Returns the first operation that differs, from the values of all; None if none does."""
        for found, exact, noise, equation in zip(
            values, self._values, self._noise, self._equations, strict=True
        ):
            if _largest(found, exact) > noise:
                return _describe(equation)
        return None

    def first_alone(self, run: Callable[..., Any], name: str) -> str | None:
        """Returns the first operation that differs when the program ends with it.

        If all values are returned, the compiler may not make the fusion that is wrong.
        """
        exact = self._results[name]
        last = next((n for n, each in enumerate(self._values) if each is exact), None)
        if last is None:
            return None

        def is_wrong(n: int) -> bool:
            found = run(lambda state, batch: self.values(state, batch)[n], self._state, self._batch)
            return _largest(found, self._values[n]) > self._noise[n]

        first = bisect.bisect_left(range(last), True, key=is_wrong)
        return _describe(self._equations[first])


def _compiled(
    function: Callable[..., Any],
    state: TrainState,
    batch: Dataset,
    options: dict[str, Any] | None = None,
) -> Any:
    return jax.jit(function, compiler_options=options)(state, batch)


def _in_loop(
    function: Callable[..., Any],
    state: TrainState,
    batch: Dataset,
    options: dict[str, Any] | None = None,
) -> Any:
    """Returns the results of the second step of a loop over the same batch twice."""

    def loop(steps: Any, state: TrainState, batches: Dataset) -> Any:
        def step(index: Any, _: Any) -> Any:
            return function(state, jax.tree.map(lambda leaf: leaf[index], batches))

        shapes = jax.eval_shape(step, 0, None)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.fori_loop(0, steps, step, zeros)

    return jax.jit(loop, compiler_options=options)(2, state, _twice(batch))


def _vmapped(
    function: Callable[..., Any],
    state: TrainState,
    batch: Dataset,
    options: dict[str, Any] | None = None,
) -> Any:
    """Returns the results for two copies of the state, [2, ...]."""
    mapped = jax.vmap(function, in_axes=(0, None))
    return jax.jit(mapped, compiler_options=options)(_twice(state), batch)


_WAYS = {_COMPILED: _compiled, "inside a loop": _in_loop, "under vmap": _vmapped}


def _has_one_mean(state: TrainState, batch: Dataset, loss_fn: Loss) -> bool:
    """Returns whether the loss of a batch is one weighted mean, not a sum of several."""

    def loss(state: TrainState, batch: Dataset) -> Any:
        (_, aux), _ = gradients(state, batch, loss_fn)
        further = LossContext(state.params, aux.model_state, batch, lambda: state.key)
        return further.bind(loss_fn)(aux.predictions, batch.targets)

    return len(mean_terms(jax.eval_shape(loss, state, batch))) == 1


def _halves(step: _Step, state: TrainState, batch: Dataset, loss_fn: Loss) -> Difference:
    def weight(state: TrainState, batch: Dataset) -> Any:
        return gradients(state, batch, loss_fn)[0][1].weight

    way = _HALVES
    if step.draws or jax.tree.leaves(state.model_state) or adapters.sown_losses(state.model):
        way += ", evaluation mode"
        model = _in_evaluation_mode(state.model)
        state = state.replace(model=model)
        step = _Step(step.function, state, batch)
    halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    found = [_compiled(step.function, state, half) for half in halves]
    weights = np.asarray([_compiled(weight, state, half) for half in halves], np.float64)

    def join(name: str) -> Any:
        parts = [np.asarray(each[name], np.float64) for each in found]
        if name.split(".")[0] == "predictions":
            return np.concatenate(parts)
        return np.einsum("h,h...->...", weights, np.stack(parts)) / weights.sum()

    return step.compare(way, {name: join(name) for name in found[0]})


def _in_evaluation_mode(model: Model) -> Model:
    def apply(params: PyTree, model_state: PyTree, inputs: PyTree, **_: Any) -> Any:
        return model.apply(params, model_state, inputs, train=False, key=None)

    return Model(model.init, apply)


def _removing_flag(run: Callable[..., Any], is_right: Callable[[Any], bool]) -> str | None:
    """Returns the first known flag of the compiler with which `run` is right."""
    for name, value in KNOWN_FLAGS.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a flag that the version lacks
            if is_right(run({name: value})):
                return f"XLA_FLAGS=--{name}={value}"
    return None


def _contains(jaxpr: Any, names: frozenset[str]) -> bool:
    return any(equation.primitive.name in names for equation in equations(jaxpr))


def _largest(found: Any, exact: Any) -> float:
    """Returns the largest absolute difference; infinite where only one of the two is finite.

    `found` may have an additional leading axis.
    """
    ours, theirs = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours - theirs)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    difference = np.where(same, 0, np.nan_to_num(difference, nan=np.inf))
    return float(difference.max(initial=0.0))


def _bounds(before: list[float], rounded: list[Any], exact: list[Any]) -> list[float]:
    """Returns the larger of earlier bounds and those by one more run with rounding."""

    def bound(value: Any, reference: Any) -> float:
        finite = np.abs(np.nan_to_num(np.asarray(reference), posinf=0, neginf=0))
        unit = float(finite.max(initial=0.0)) * float(np.finfo(np.float32).eps)
        return max(_FACTOR * _largest(value, reference), unit)

    return list(map(max, before, map(bound, rounded, exact)))


def _ratio(difference: float, explained: float) -> float:
    return difference / explained if explained else math.inf if difference else 0.0


def _twice(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)


def _describe(equation: Any) -> str:
    """Returns an operation, the shape of its result, and the line of the model that asks for it."""
    shapes = ", ".join(each.aval.str_short(short_dtypes=False) for each in equation.outvars)
    traceback = equation.source_info.traceback
    frames = [] if traceback is None else list(traceback.frames)
    own = [
        each
        for each in frames
        if not any(f"/{name}/" in each.file_name for name in ("jax", "jaxtrain", "flax", "optax"))
    ]
    place = f" at {own[0].file_name}:{own[0].line_num}" if own else ""
    stack = str(equation.source_info.name_stack)
    return f"{equation.primitive} -> {shapes}{f' in {stack}' if stack else ''}{place}"
