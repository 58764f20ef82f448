"""compare: whether a JAX model computes and trains as a PyTorch module does, and if not, why."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxtrain import adapters, optimizers, parallel
from jaxtrain._compiler import bounded
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.inspect._port import (
    MisfitError,
    Port,
    as_arrays,
    best_port,
    check_module,
    evaluate,
    first_line,
    in_layout,
    without_dropout,
)
from jaxtrain.losses import Loss, context_parameters
from jaxtrain.model import Model
from jaxtrain.training.state import TrainState, init_state, with_optimizer
from jaxtrain.training.step import apply_gradients, check_loss, gradients

if TYPE_CHECKING:
    from jaxtrain.inspect._search import Search
    from jaxtrain.inspect._torch_calls import Change, Reference, Site

_STEPS, _RATE = 5, 0.1
# In which the search runs, those that differ most.
_EXAMPLES = 4
# The rounding of float32, and how much of what PyTorch rounds is explained.
_TOLERANCE, _FACTOR = 1e-5, 8
# Backward passes and statistics subtract numbers that are nearly equal.
_LARGER_TOLERANCE = 1e-4
# Arrays below this fraction of the largest of a quantity are compared relative to that.
_SMALLEST = 1e-2
_EVALUATION, _TRAINING = "outputs in evaluation", "outputs in training"
_BUFFERS, _GRADIENTS = "buffers after a pass", "gradients"
_LOSSES, _PARAMETERS = f"losses of {_STEPS} steps", f"parameters after {_STEPS} steps"

_Arrays = dict[str, np.ndarray]


class PortDifference(NamedTuple):
    """The largest difference between a PyTorch module and a model in one quantity.

    Attributes:
      quantity: such as "gradients".
      difference: that of the array that differs most, relative to its largest entry.
      tolerance: what rounding explains.
      where: the array, with its names in PyTorch and in the model.
      remaining: the difference if PyTorch does what the causes say; None without causes.
    """

    quantity: str
    difference: float
    tolerance: float
    where: str
    remaining: float | None = None

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.tolerance


class Cause(NamedTuple):
    """Something that a model does differently from a PyTorch module.

    Attributes:
      kind: what it is about, such as "padding".
      where: the layers, with their names in PyTorch and in the model.
      theirs: what PyTorch does.
      ours: what the model does, or something with the same results.
      fix: what to write in the model.
    """

    kind: str
    where: str
    theirs: str
    ours: str
    fix: str

    def __str__(self) -> str:
        return (
            f"{self.kind} at {self.where}\n"
            f"   PyTorch has {self.theirs}, the model {self.ours}\n"
            f"   write {self.fix}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Whether a model computes and trains as a PyTorch module does; prints as a table.

    Attributes:
      differences: the largest difference of each quantity; () if the weights do not fit.
      causes: what the model does differently, as far as it was found.
      first: the first layer whose output differs in evaluation, in both names; None without one.
      refused: why the weights do not fit; None if they do.
      notes: differences that a right port may have.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU())
      >>> class Port(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.gelu(nn.Dense(4)(x))
      >>> report = jt.compare(module, Port(), np.ones((8, 3), np.float32))
      >>> report.causes[0].fix
      'jax.nn.gelu(x, approximate=False)'
    """

    differences: tuple[PortDifference, ...]
    causes: tuple[Cause, ...]
    first: str | None
    refused: str | None
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the port is right: rounding explains all differences."""
        return not self.refused and not self.causes and all(each.ok for each in self.differences)

    def __str__(self) -> str:
        rows = [["quantity", "difference", "tolerance", "", "fixed", "where"]]
        for each in self.differences:
            verdict = "ok" if each.ok else "NO"
            remaining = "" if each.remaining is None else f"{each.remaining:.1e}"
            numbers = f"{each.difference:.1e}", f"{each.tolerance:.1e}"
            rows.append([each.quantity, *numbers, verdict, remaining, each.where])
        if not any(row[4] for row in rows[1:]):
            rows = [[*row[:4], row[5]] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
            if self.differences
        ]
        if self.refused:
            lines.append(f"the weights do not fit: {self.refused}")
        if self.first is not None:
            lines.append(f"first layer that differs: {self.first}")
        lines += [f"{number}. {cause}" for number, cause in enumerate(self.causes, start=1)]
        unexplained = [
            x.quantity
            for x in self.differences
            if (x.difference if x.remaining is None else x.remaining) > x.tolerance
        ]
        if unexplained:
            names = ", ".join(unexplained)
            lines.append(f"no known cause explains the difference of: {names}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(
            textwrap.fill(line, 99, subsequent_indent="   ") if " " * 3 not in line else line
            for line in "\n".join(lines).splitlines()
        )

    __repr__ = __str__


def compare(
    module: Any,
    model: Any,
    inputs: PyTree,
    targets: PyTree = None,
    *,
    loss_fn: Loss | None = None,
    optimizer: Any = None,
    mapping: Mapping[str, str] | None = None,
    model_inputs: PyTree = None,
) -> Comparison:
    """Compares a JAX model with the PyTorch module of which it is a port, and finds what differs.

    The weights and buffers of the module are loaded into the model, as by
    `jaxtrain.export.load_torch`. Compared are the outputs in evaluation and, without dropout, those
    in training, the buffers after a training pass, the loss, the gradients, and the losses and
    parameters of five steps. PyTorch runs as it is; neither argument is changed.

    Rounding in float32 explains differences up to 1e-5 of the largest entry of the outputs and of
    the loss, and up to 1e-4 of that of an array of gradients, buffers or parameters. Where rounding
    has more effect, eight times the difference between PyTorch in float32 and in float64 is
    explained.

    If something differs, calls of functions in a copy of the module are changed one by one to what
    ports usually do: padding, epsilon, activations, a missing bias, momentum and more. A cause is
    reported if, with the change, the first layer that differs has the model's outputs. Rates of
    dropout, and epsilon of norms, are compared as numbers.

    Args:
      module: the `torch.nn.Module`.
      model: the port: a Linen, NNX or Equinox module, or a `Model`.
      inputs: a batch for the module, [batch, ...]; arrays or tensors.
      targets: the targets of the batch, as `loss_fn` takes them.
      loss_fn: per-example loss of the model's predictions, for both sides: PyTorch continues with
        its gradients. None takes a random projection of the outputs.
      optimizer: an optimizer of `torch.optim` with the parameters of the module; None takes SGD
        with a learning rate of 0.1.
      mapping: paths of layers in the model by names of layers in PyTorch, as in `load_torch`.
      model_inputs: the batch in the model's layout. None takes the inputs as they are or, if the
        weights fit only then, with the channels last.

    Returns:
      The differences and their causes; `report.ok` says whether the port is right.

    Raises:
      InputError: an argument has the wrong type, the module does not take the inputs, the loss
        takes more than predictions, targets and inputs, or the layers of both sides need a
        `mapping`.
      MissingExtraError: PyTorch is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
      >>> class Port(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return jnp.tanh(nn.Dense(4)(x))
      >>> report = jt.compare(module, Port(), np.ones((8, 3), np.float32))
      >>> report.ok
      True
      >>> table = str(report)  # print(report) shows it
    """
    check_module(module)
    loss_fn = _check_loss(loss_fn, targets)
    make_theirs, optimizer = _optimizers(optimizer)
    inputs, key = as_arrays(inputs), jax.random.key(0)
    options: dict[str, Any] = {"key": key, "mapping": mapping, "model_inputs": model_inputs}
    options["any_biases"] = True
    with parallel.without_mesh():
        try:
            port = best_port(module, model, inputs, None, **options)
        except MisfitError as error:
            options["model_inputs"] = error.inputs
            return _refused(module, model, inputs, str(error), options)
        state = with_optimizer(port.state, optimizer)
        port = port._replace(state=state.replace(model=without_dropout(state.model)))
        both = _Both(module, model, port, inputs)
        outputs = evaluate(port.state, port.inputs)
        theirs = both.reference.evaluate(inputs).outputs or []
        shapes = [[list(x.shape) for x in side] for side in (theirs, jax.tree.leaves(outputs))]
        if [math.prod(x) for x in shapes[0]] != [math.prod(x) for x in shapes[1]]:
            text = f"the module returns outputs of {shapes[0]}, and the model of {shapes[1]}"
            return Comparison((), (), None, text, ())
        sample = jax.tree.map(lambda leaf: leaf[:1], port.inputs)
        predictions = init_state(Model(_no_params, _return_params), None, sample, key=key)
        batch = Dataset(port.inputs, as_arrays(targets))
        return _compared(_Measure(both, batch, loss_fn, make_theirs, outputs, predictions))


def _check_loss(loss_fn: Loss | None, targets: PyTree) -> Loss:
    if loss_fn is None:
        if targets is not None:
            raise InputError(
                "targets is given without loss_fn; expected both, such as "
                "loss_fn=jaxtrain.losses.cross_entropy"
            )
        return _projection
    check_loss(loss_fn)
    others = [name for name in context_parameters(loss_fn) if name != "inputs"]
    if others:
        raise InputError(
            f"loss_fn takes {' and '.join(others)}, which differ between both sides; expected a "
            "loss of predictions, targets and inputs",
            argument="loss_fn",
        )
    return loss_fn


def _optimizers(optimizer: Any) -> tuple[Callable[[Any], Any], Any]:
    """Returns a function of a module that makes its optimizer in PyTorch, and ours."""
    import torch

    if optimizer is None:
        return lambda copy: torch.optim.SGD(copy.parameters(), lr=_RATE), _sgd()
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or len(groups) != 1:
        found = type(optimizer).__name__ if groups is None else f"has {len(groups)} groups"
        raise InputError(
            f"the optimizer {found}; expected one of torch.optim with one group of parameters, "
            "such as torch.optim.SGD(module.parameters(), lr=0.1)",
            argument="optimizer",
        )
    options = {name: x for name, x in groups[0].items() if name not in ("params", "param_names")}

    def make(copy: Any) -> Any:
        return type(optimizer)([{**options, "params": list(copy.parameters())}])

    # Of a parameter as large as any model, which may have more than the module trains.
    large = torch.nn.ParameterList([torch.empty(2**50, device="meta")])
    return make, optimizers.from_torch(make(large))


@functools.cache
def _sgd() -> Any:
    """Returns the default optimizer, always the same, so that a step is compiled once."""
    return optimizers.sgd(_RATE)


def _projection(predictions: PyTree, targets: PyTree) -> Float[Array, "batch"]:
    """Returns for each example a random combination of its outputs."""
    leaves = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(predictions)]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    means = [
        jnp.mean((x * jax.random.normal(key, x.shape[1:])[None]).reshape(len(x), -1), axis=1)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return functools.reduce(jnp.add, means)


def _no_params(key: Any, inputs: PyTree) -> tuple[PyTree, PyTree]:
    return {}, {}


def _return_params(
    params: PyTree, model_state: PyTree, inputs: PyTree, *, train: bool, key: Any
) -> tuple[PyTree, PyTree]:
    return params, model_state


@bounded
@functools.partial(jax.jit, static_argnames="loss_fn")
def _train_step(state: TrainState, batch: Dataset, loss_fn: Loss) -> Any:
    """Returns the next state; and the loss, the predictions, the model state and the gradients."""
    (loss, aux), grads = gradients(state, batch, loss_fn)
    after = apply_gradients(state, grads, model_state=aux.model_state)
    return after, (loss, aux.predictions, aux.model_state, grads)


@bounded
@functools.partial(jax.jit, static_argnames="loss_fn")
def _loss_and_gradients(state: TrainState, batch: Dataset, loss_fn: Loss) -> Any:
    (loss, _), grads = gradients(state, batch, loss_fn)
    return loss, grads


def _refused(
    module: Any, model: Any, inputs: PyTree, reason: str, options: dict[str, Any]
) -> Comparison:
    """Returns the comparison of a module whose weights do not fit, with the causes of shapes."""
    try:
        port = best_port(module, model, inputs, None, strict=False, **options)
    except InputError:
        return Comparison((), (), None, reason, ())
    both = _Both(module, model, port, inputs)
    search = both.search(None)
    search.run()
    causes = both.causes(search.changes, list(search.sites))
    first = None if not search.first else both.name(search.first)
    return Comparison((), tuple(causes), first, reason, ())


class _Both:
    """A module, and a port that has its weights."""

    def __init__(self, module: Any, model: Any, port: Port, inputs: PyTree) -> None:
        from jaxtrain.inspect._torch_calls import Reference

        self.module, self.port, self.inputs = module, port, inputs
        self.reference, self.exact = Reference(module), Reference(module, exact=True)
        model = model[0] if isinstance(model, tuple) and not isinstance(model, Model) else model
        bases = {base.__module__.split(".")[0] for base in type(model).__mro__}
        is_nnx = any(base.__module__.startswith("flax.nnx") for base in type(model).__mro__)
        self._prefix = "eqx.nn." if "equinox" in bases else "nnx." if is_nnx else "nn."
        pairs = port.conversion.pairs
        self._path_of = {theirs.name: ours.path for theirs, ours in pairs}
        entries = [
            (theirs.tensors, ours.path, entry) for theirs, ours in pairs for entry in ours.entries
        ]
        self._arrays_of = {
            names[entry.tensor]: path if len(entry.paths) > 1 else _shortened(path, *entry.paths)
            for names, path, entry in entries
        }
        self.added = {names[x.tensor]: names[x.added] for names, _, x in entries if x.added}
        self._calls = _recorded(port.initial, port.inputs)

    def name(self, layer: str) -> str:
        """Returns the name of a layer, or of an array, in PyTorch and in the model."""
        ours = self._path_of.get(layer) or self._arrays_of.get(layer)
        return f"{layer} ({ours})" if ours else layer

    def settings(self) -> dict[str, dict[str, float]]:
        """Returns numbers of the model's layers in PyTorch's sense, by name in PyTorch."""
        found: dict[str, dict[str, float]] = {}
        for name, path in self._path_of.items():
            given = self._calls[path].settings if path in self._calls else {}
            found[name] = {
                {"epsilon": "eps"}.get(key, key): 1 - x if key == "momentum" else x
                for key, x in given.items()
            }
        return found

    def search(
        self, outputs: Sequence[np.ndarray] | None, examples: Sequence[int] = (0,)
    ) -> Search:
        """Returns the search for what differs in some examples in evaluation."""
        from jaxtrain.inspect._search import Search

        theirs, ours = (
            jax.tree.map(lambda leaf: leaf[np.asarray(examples)], tree)
            for tree in (self.inputs, self.port.inputs)
        )
        layers = self.port.conversion.layer_outputs(self.port.state, ours)
        # The two sides may call a layer last in different ways if others have its weights.
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        counts = Counter(map(id, tensors.values()))
        tied = {name.rpartition(".")[0] for name, x in tensors.items() if counts[id(x)] > 1}
        layers = {name: x for name, x in layers.items() if name not in tied}
        some = None if outputs is None else [x[np.asarray(examples)] for x in outputs]
        arguments = self.reference, self.exact, theirs, layers, some
        return Search(*arguments, self.settings(), _TOLERANCE)

    def module_changes(self) -> tuple[list[Change], list[Change]]:
        """Returns the changes of the module that are known, and others to try in training."""
        from jaxtrain.inspect import _causes

        known = [_causes.with_bias(name.removesuffix(".bias")) for name in self.port.biases]
        others = [_causes.one_bias(list(self.added.values()))] if self.added else []
        if not all(x.requires_grad for x in self.module.parameters()):
            others.append(_causes.unfrozen())
        return known, others

    def causes(self, changes: Sequence[Change], sites: Sequence[Site]) -> list[Cause]:
        """Returns changes as causes; those that are equal are one."""
        places, last = {}, ""
        for site in sites:
            last = site.layer if site.layer in self._path_of else last
            after = f" after {self.name(last)}" if last and site.function != "outputs" else ""
            places[site] = f"{site.layer or site.function}{after}"
        found: dict[tuple[str, ...], list[str]] = {}
        for change in changes:
            for site, theirs in change.theirs.items():
                path = self._path_of.get(site.layer)
                call = self._calls.get(path) if path is not None else None
                kind = site.function.rstrip("123d") if call is None else call.type
                eps = "eps" if self._prefix == "eqx.nn." else "epsilon"
                fix = change.fix[site].format(layer=f"{self._prefix}{kind}", eps=eps)
                where = self.name(site.layer) if path is not None else places.get(site, "")
                found.setdefault((change.kind, theirs, change.ours, fix), []).append(where)
        return [
            Cause(kind, ", ".join(dict.fromkeys(where)), theirs, ours, fix)
            for (kind, theirs, ours, fix), where in found.items()
        ]

    def other_epsilons(self, sites: Mapping[Site, Mapping[str, Any]]) -> list[Change]:
        """Returns the calls of norms whose model has another epsilon, by its number."""
        from jaxtrain.inspect import _causes

        return [
            change
            for site, arguments in sites.items()
            for given in [self.settings().get(site.layer, {})]
            if "eps" in given
            for change in _causes.in_evaluation(site, arguments, given)
            if change.kind == "epsilon"
        ]

    def dropout(self, rates: Sequence[tuple[str, float]]) -> list[Cause]:
        """Returns the differences from the layers of PyTorch that drop, with their rates."""
        names = ("rate", "p", "dropout_rate")
        drops = {
            path: rate
            for path, call in self._calls.items()
            for name, rate in call.settings.items()
            if rate > 0 and name in names and ("drop" in call.type.lower() or name == names[-1])
        }
        # A block with a rate may pass it to layers of its own.
        ours = [
            (path, rate)
            for path, rate in drops.items()
            if not any(other.startswith(f"{path}.") for other in drops)
        ]
        if not ours and rates and _depends_on_key(self.port.initial, self.port.inputs):
            return []  # dropout by functions, whose rates are unknown
        if len(rates) != len(ours):
            theirs, own = (str([x for _, x in side]) for side in (rates, ours))
            fix = f"dropout with the rates {theirs}, in this order"
            return [Cause("dropout", "the network", f"the rates {theirs}", own, fix)]
        return [
            Cause("dropout", f"{a or 'the module'} ({b})", f"{x:g}", f"{y:g}", f"a rate of {x:g}")
            for (a, x), (b, y) in zip(rates, ours, strict=True)
            if not math.isclose(x, y, rel_tol=1e-6)
        ]

    def initialization(self) -> list[str]:
        """Returns a note if the model's own initial weights have another deviation."""
        initial = self.port.conversion.to_torch(
            self.port.initial.params, self.port.initial.model_state
        )
        for name, tensor in self.port.conversion.tensors.items():
            if name in initial and tensor.ndim > 1 and tensor.size >= 64:
                theirs, ours = float(tensor.std()), float(initial[name].std())
                if not 0.8 < ours / max(theirs, 1e-30) < 1.25:
                    return [
                        f"the model's own initial weights have another scale: {self.name(name)} "
                        f"has a standard deviation of {ours:.2g}, and {theirs:.2g} in PyTorch, "
                        "which matters for training from scratch"
                    ]
        return []


def _recorded(state: TrainState, inputs: PyTree) -> dict[str, adapters.Call]:
    """Returns the layers that a model calls in training, by path."""
    arguments = state.params, state.model_state, inputs, state.key
    with adapters.recording(state.model, *arguments[:2]) as recorder:
        jax.eval_shape(
            lambda params, model_state, inputs, key: state.model.apply(
                params, model_state, inputs, train=True, key=key
            ),
            *arguments,
        )
    return {".".join(call.path): call for call in recorder.calls}


def _depends_on_key(state: TrainState, inputs: PyTree) -> bool:
    """Returns whether the outputs in training depend on the key."""

    def run(key: Any, params: PyTree, model_state: PyTree, inputs: PyTree) -> PyTree:
        return state.model.apply(params, model_state, inputs, train=True, key=key)[0]

    return adapters.depends_on_key(run, state.key, (state.params, state.model_state, inputs))


class _Measure(NamedTuple):
    """How both sides are trained.

    Attributes:
      both: the sides.
      batch: the batch of the model.
      loss_fn: the loss.
      optimizer: makes the optimizer of a module.
      outputs: those of the model in evaluation.
      predictions: a state whose parameters are predictions, for gradients of the loss.
    """

    both: _Both
    batch: Dataset
    loss_fn: Loss
    optimizer: Callable[[Any], Any]
    outputs: PyTree
    predictions: TrainState

    def theirs(
        self, reference: Reference, changes: Sequence[Change] = (), seed: int = 0
    ) -> tuple[dict[str, _Arrays], list[tuple[str, float]]]:
        """Returns the arrays of PyTorch by quantity and name, and the rates of dropout."""
        outputs = reference.evaluate(self.both.inputs, changes).outputs
        if outputs is None:
            raise InputError("the changed module fails")
        found = reference.train(self.both.inputs, self._loss, self.optimizer, _STEPS, changes, seed)
        parameters, losses = dict(found.parameters), dict(enumerate(found.losses, start=1))
        for name, added in self.both.added.items():
            parameters[name] = parameters[name] + parameters[added]
        return {
            _EVALUATION: _numbered(outputs),
            _TRAINING: _numbered(found.outputs),
            _BUFFERS: found.buffers,
            "loss": {"loss": np.asarray(losses[1])},
            _GRADIENTS: found.gradients,
            _LOSSES: {f"step {i}": np.asarray(x) for i, x in losses.items()},
            _PARAMETERS: parameters,
        }, found.rates

    def _loss(self, outputs: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        """Returns the loss of outputs of PyTorch, and its gradients with respect to them."""
        leaves, structure = jax.tree.flatten(self.outputs)
        found = [in_layout(jnp.asarray(x), y.shape) for x, y in zip(outputs, leaves, strict=True)]
        state = self.predictions.replace(params=jax.tree.unflatten(structure, found))
        value, grads = _loss_and_gradients(state, self.batch, self.loss_fn)
        pairs = zip(jax.tree.leaves(grads), outputs, strict=True)
        return float(value), [np.asarray(in_layout(x, y.shape)) for x, y in pairs]

    def ours(self) -> dict[str, _Arrays]:
        """Returns the arrays of the model by quantity and name in PyTorch."""
        conversion, state = self.both.port.conversion, self.both.port.state
        steps = []
        with jax.default_matmul_precision("highest"):
            for _ in range(_STEPS):
                state, found = _train_step(state, self.batch, self.loss_fn)
                steps.append(found)
        loss, predictions, model_state, grads = steps[0]
        tensors = conversion.to_torch(grads, model_state)
        return {
            _EVALUATION: _numbered(jax.tree.leaves(self.outputs)),
            _TRAINING: _numbered(jax.tree.leaves(predictions)),
            _BUFFERS: tensors,
            "loss": {"loss": np.asarray(loss)},
            _GRADIENTS: tensors,
            _LOSSES: {f"step {i}": np.asarray(x[0]) for i, x in enumerate(steps, start=1)},
            _PARAMETERS: conversion.to_torch(state.params, state.model_state),
        }

    def draws(self, theirs: dict[str, _Arrays]) -> bool:
        """Returns whether a side draws random numbers in training, without dropout."""
        again = self.theirs(self.both.reference, seed=1)[0][_TRAINING]
        same = all(np.array_equal(x, again[name]) for name, x in theirs[_TRAINING].items())
        return not same or _depends_on_key(self.both.port.state, self.batch.inputs)


class _Rows(NamedTuple):
    """Compares arrays of PyTorch with those of the model.

    Attributes:
      theirs: those of the module.
      exact: those of the module in float64.
      ours: those of the model.
      skipped: names that are not compared.
    """

    theirs: dict[str, _Arrays]
    exact: dict[str, _Arrays]
    ours: dict[str, _Arrays]
    skipped: Sequence[str]

    def of(self, theirs: dict[str, _Arrays]) -> list[PortDifference]:
        """Returns the differences of all arrays from those of a module, which may be changed."""
        found = []
        for quantity, ours in self.ours.items():
            arrays = theirs.get(quantity, {})
            largest = max(map(_size, arrays.values()), default=0.0)
            for name in arrays.keys() & ours.keys() - set(self.skipped):
                a, b = arrays[name], np.asarray(in_layout(ours[name], arrays[name].shape))
                exact = self.exact[quantity].get(name)
                rounded = self.theirs[quantity].get(name)
                noise = 0.0 if rounded is None else _size(rounded - exact)
                scale = max(_size(a), _SMALLEST * largest, 1e-30)
                difference = _size(np.asarray(a, np.float64) - b) / scale
                difference = math.inf if math.isnan(difference) else difference
                is_exact = quantity in (_EVALUATION, _TRAINING, "loss")
                rounding = _TOLERANCE if is_exact else _LARGER_TOLERANCE
                tolerance = max(rounding, _FACTOR * noise / scale)
                found.append(PortDifference(quantity, difference, tolerance, name))
        return found


def _compared(measure: _Measure) -> Comparison:
    from jaxtrain.inspect import _search

    both, reference = measure.both, measure.both.reference
    try:
        theirs, rates = measure.theirs(reference)
    except InputError:
        raise
    except Exception as error:  # of the module
        raise InputError(
            f"the module cannot be trained on the inputs ({first_line(error)}); expected a batch "
            "as in training",
            argument="inputs",
        ) from error
    try:
        exact = measure.theirs(both.exact)[0]
    except Exception:  # a module that cannot be in float64
        exact = theirs
    ours, draws = measure.ours(), measure.draws(theirs)
    ours = {_EVALUATION: ours[_EVALUATION]} if draws else ours
    compared = _Rows(theirs, exact, ours, list(both.added.values()))

    def rows(changes: Sequence[Change]) -> list[PortDifference] | None:
        """Returns the differences with changes; None if PyTorch fails with them."""
        try:
            return compared.of(measure.theirs(reference, changes)[0] if changes else theirs)
        except Exception:  # such as a shape that does not fit
            return None

    def failing(changes: Sequence[Change]) -> float:
        found = rows(changes)
        return math.inf if found is None else sum(not row.ok for row in found)

    first, sites = None, {}
    found, further = both.module_changes()
    if failing(()) or found:
        pairs = [
            (np.asarray(in_layout(ours[_EVALUATION][name], x.shape)), x)
            for name, x in theirs[_EVALUATION].items()
        ]
        by_example = [np.abs(x - y).reshape(len(x), -1).max(axis=1) for x, y in pairs]
        worst = np.argsort(-np.asarray(sum(by_example)))[:_EXAMPLES].tolist()
        search = both.search([x for x, _ in pairs], worst)
        search.run(found)
        found, sites = search.changes, search.sites
        if search.first is not None:
            first = both.name(search.first) or "the outputs"
        if search.is_done and not draws:
            found = _search.in_training(sites, both.settings(), further, failing, found)
    sites = sites or reference.evaluate(both.inputs).sites
    known = {site for change in found for site in change.calls if change.kind == "epsilon"}
    others = both.other_epsilons({site: x for site, x in sites.items() if site not in known})
    conventions = [change for change in found if change.is_convention]
    causes = both.causes([*(x for x in found if not x.is_convention), *others], list(sites))
    before, after = _largest(rows(conventions)), _largest(rows(found))
    differences = [
        row._replace(
            where=both.name(row.where),
            remaining=after[quantity].difference if causes and quantity in after else None,
        )
        for quantity, row in before.items()
    ]
    causes += both.dropout(rates)
    notes = [*dict.fromkeys(change.ours for change in conventions), *both.initialization()]
    if draws:
        notes.append("a side draws random numbers in training, so only evaluation is compared")
    return Comparison(tuple(differences), tuple(causes), first, None, tuple(notes))


def _largest(rows: Sequence[PortDifference] | None) -> dict[str, PortDifference]:
    """Returns for each quantity the array whose difference is largest relative to its tolerance."""
    found: dict[str, PortDifference] = {}
    for row in rows or ():
        other = found.setdefault(row.quantity, row)
        if row.difference / row.tolerance > other.difference / other.tolerance:
            found[row.quantity] = row
    return found


def _shortened(layer: str, path: str) -> str:
    """Returns the path of an array of a layer without the collection that it is in."""
    name = path.rpartition(".")[2]
    return layer if name.isdigit() else f"{layer}.{name}" if layer else name


def _numbered(arrays: Sequence[Any]) -> _Arrays:
    return {f"output {i}" if i else "output": np.asarray(x) for i, x in enumerate(arrays)}


def _size(array: Any) -> float:
    return float(np.abs(array).max(initial=0.0))
