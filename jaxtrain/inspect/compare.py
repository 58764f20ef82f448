"""compare: whether a JAX port computes and trains like its PyTorch module, and if not, why."""

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
from jaxtrain._arguments import check_arguments
from jaxtrain._compiler import bounded
from jaxtrain._differences import difference, differences, explained, largest
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError, first_line
from jaxtrain.inspect._port import (
    MisfitError,
    Port,
    as_arrays,
    axis_orders,
    check_module,
    evaluate,
    without_dropout,
)
from jaxtrain.inspect._port import (
    port as port_of,
)
from jaxtrain.losses import Loss, context_parameters
from jaxtrain.model import Model
from jaxtrain.training.state import TrainState, with_optimizer
from jaxtrain.training.step import (
    LossContext,
    apply_gradients,
    check_loss,
    gradients,
    mean_loss,
)

if TYPE_CHECKING:
    from jaxtrain.inspect._search import Search
    from jaxtrain.inspect._torch_calls import Change, Reference, Site

_STEPS, _RATE = 5, 0.1
# In which the search runs, those that differ most.
_EXAMPLES = 4
# The rounding of float32.
_TOLERANCE = 1e-5
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
      difference: the largest difference of the array that differs most, relative to its largest
        entry.
      tolerance: the difference that rounding explains.
      where: the array, with its names in PyTorch and in the model.
      remaining: the difference after the causes are removed; None without causes.
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
      kind: the kind of difference, such as "padding".
      where: the layers, with their names in PyTorch and in the model.
      theirs: the setting or function in PyTorch.
      ours: the setting or function in the model, or one with the same results.
      fix: the code to write in the model.
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
    """Whether a JAX port computes and trains like its PyTorch module; prints as a table.

    Attributes:
      differences: the largest difference of each quantity; () with a mismatch.
      causes: the causes that were found.
      first_layer: the first layer whose output differs in evaluation, in both names; None without
        one.
      mismatch: why the weights or the shapes of the outputs do not fit; None if they do.
      notes: differences that a right port may have, and quantities that were not compared.

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
    first_layer: str | None
    mismatch: str | None
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether rounding explains all differences; `notes` says what was not compared."""
        return not self.mismatch and not self.causes and all(each.ok for each in self.differences)

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
        if self.mismatch:
            lines.append(f"the two do not fit: {self.mismatch}")
        if self.first_layer is not None:
            lines.append(f"first layer that differs: {self.first_layer}")
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
            textwrap.fill(line, 96, subsequent_indent="   ") if " " * 3 not in line else line
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
    """Checks that a JAX port computes and trains like its PyTorch module, and finds the causes.

    The weights and buffers of the module are loaded into the model, as by
    `jaxtrain.export.load_torch`. Compared are the outputs in evaluation and, without dropout, those
    in training, the buffers after a training pass, the loss, the gradients, and the losses and
    parameters of five steps. PyTorch runs unmodified; neither argument is changed.

    Rounding in float32 explains differences up to 1e-5 of the largest entry of the outputs and of
    the loss, and up to 1e-4 of the largest entry of an array of gradients, buffers or parameters.
    Where rounding has more effect, eight times the difference between PyTorch in float32 and in
    float64 is explained.

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
      model_inputs: the batch in the model's layout. None takes the inputs unchanged or, if the
        weights fit only then, with the channels last.

    Returns:
      The differences and their causes; `report.ok` says whether the port is right. If the weights
      or the shapes of the outputs do not fit, `report.mismatch` says why, and nothing is compared.

    Raises:
      InputError: an argument has the wrong type, the module does not take the inputs, the loss
        takes more than predictions, targets and inputs, `mapping` names a layer that does not
        exist, or layers of equal shapes are used in another order and need a `mapping`.
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
    check_arguments(compare, locals(), eager="call it outside")
    check_module(module)
    loss_fn = _check_loss(loss_fn, targets)
    make_theirs, optimizer = _optimizers(optimizer)
    inputs = as_arrays(inputs)
    options = {"mapping": mapping, "model_inputs": model_inputs, "any_biases": True}
    with parallel.without_mesh(), jax.default_matmul_precision("highest"):
        try:
            port = port_of(module, model, inputs, None, key=jax.random.key(0), **options)
        except MisfitError as error:
            return Comparison((), (), None, str(error), ())
        state = with_optimizer(port.state, optimizer)
        port = port._replace(state=state.replace(model=without_dropout(state.model)))
        batch = Dataset(port.inputs, as_arrays(targets))
        both = _Both(module, model, port, inputs, batch, loss_fn, make_theirs)
        if both.mismatch is not None:
            return Comparison((), (), None, both.mismatch, ())
        return _compared(both)


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
    kind = type(optimizer)
    options = {name: x for name, x in groups[0].items() if name not in ("params", "param_names")}

    def make(copy: Any) -> Any:
        try:
            return kind([{**options, "params": list(copy.parameters())}])
        except TypeError as error:
            raise InputError(
                f"the optimizer {kind.__name__} takes other arguments than parameters and "
                f"options ({first_line(error)}); expected an optimizer of torch.optim, such as SGD",
                argument="optimizer",
            ) from error

    # Stands for all parameters, so that from_torch's size check passes.
    large = torch.nn.ParameterList([torch.empty(2**50, device="meta")])
    return make, optimizers.from_torch(make(large))


@functools.cache
def _sgd() -> Any:
    """Returns the default optimizer, always the same, so that a step is compiled once."""
    return optimizers.sgd(_RATE)


def _projection(predictions: PyTree, targets: PyTree) -> Float[Array, "batch"]:
    """Returns for each example a random combination of its outputs."""
    leaves = [
        jnp.where(jnp.isinf(x), 0.0, jnp.asarray(x, jnp.float32))  # without masked logits
        for x in jax.tree.leaves(predictions)
    ]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    means = [
        jnp.mean((x * jax.random.normal(key, x.shape[1:])[None]).reshape(len(x), -1), axis=1)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return functools.reduce(jnp.add, means)


@bounded
@functools.partial(jax.jit, static_argnames="loss_fn")
def _train_step(state: TrainState, batch: Dataset, loss_fn: Loss) -> Any:
    """Returns the next state; and the loss, the predictions, the model state and the gradients."""
    (loss, aux), grads = gradients(state, batch, loss_fn)
    after = apply_gradients(state, grads, model_state=aux.model_state)
    return after, (loss, aux.predictions, aux.model_state, grads)


@bounded
@functools.partial(jax.jit, static_argnames="loss_fn")
def _loss_and_gradients(predictions: PyTree, batch: Dataset, loss_fn: Loss) -> Any:
    """Returns the mean loss of predictions, and its gradients with respect to them."""
    loss_fn = LossContext({}, {}, batch, lambda: None).bind(loss_fn)
    return jax.value_and_grad(lambda x: mean_loss(loss_fn, x, batch)[0])(predictions)


class _Both:
    """A module, a port that has its weights, and how both are trained."""

    def __init__(
        self,
        module: Any,
        model: Any,
        port: Port,
        inputs: PyTree,
        batch: Dataset,
        loss_fn: Loss,
        optimizer: Callable[[Any], Any],
    ) -> None:
        from jaxtrain.inspect._torch_calls import Reference

        self.batch, self._loss_fn, self._optimizer = batch, loss_fn, optimizer
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
        self.outputs = evaluate(port.state, port.inputs)
        theirs = self.reference.evaluate(inputs).outputs or []
        self._orders = axis_orders(theirs, jax.tree.leaves(self.outputs))
        self.mismatch = self._mismatch([x.shape for x in theirs])

    def _mismatch(self, theirs: Sequence[tuple[int, ...]]) -> str | None:
        """Returns why the shapes of the outputs cannot be compared."""
        ours = [x.shape for x in jax.tree.leaves(self.outputs)]
        examples = len(jax.tree.leaves(self.inputs)[0])
        if any(shape[:1] != (examples,) for shape in theirs):
            return (
                f"the module returns outputs of {list(map(list, theirs))} for {examples} examples; "
                "expected the batch as the first axis of each"
            )
        if self._orders is None:
            return (
                f"the module returns outputs of {list(map(list, theirs))}, and the model of "
                f"{list(map(list, ours))}; expected equal shapes, apart from the channels' axis"
            )
        return None

    def to_ours(self, outputs: Sequence[np.ndarray]) -> PyTree:
        """Returns outputs of PyTorch in the model's layout and structure."""
        pairs = zip(outputs, self._orders or (), strict=True)
        structure = jax.tree.structure(self.outputs)
        return jax.tree.unflatten(structure, [x.transpose(order) for x, order in pairs])

    def to_theirs(self, outputs: PyTree) -> list[np.ndarray]:
        """Returns outputs of the model, or their gradients, in PyTorch's layout."""
        pairs = zip(jax.tree.leaves(outputs), self._orders or (), strict=True)
        return [np.asarray(x).transpose(np.argsort(order)) for x, order in pairs]

    def theirs(
        self, reference: Reference, changes: Sequence[Change] = ()
    ) -> tuple[dict[str, _Arrays], list[tuple[str, float]]]:
        """Returns the arrays of PyTorch by quantity and name, and the rates of dropout."""
        outputs = reference.evaluate(self.inputs, changes).outputs
        if outputs is None:
            raise InputError("the changed module fails")
        found = reference.train(self.inputs, self._loss, self._optimizer, _STEPS, changes)
        parameters, losses = dict(found.parameters), dict(enumerate(found.losses, start=1))
        for name, added in self.added.items():
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
        predictions = self.to_ours(outputs)
        value, grads = _loss_and_gradients(predictions, self.batch, self._loss_fn)
        return float(value), self.to_theirs(grads)

    def ours(self) -> dict[str, _Arrays]:
        """Returns the arrays of the model by quantity and name in PyTorch."""
        conversion, state = self.port.conversion, self.port.state
        steps = []
        for _ in range(_STEPS):
            state, found = _train_step(state, self.batch, self._loss_fn)
            steps.append(found)
        loss, predictions, model_state, grads = steps[0]
        tensors = conversion.to_torch(grads, model_state)
        return {
            _EVALUATION: _numbered(self.to_theirs(self.outputs)),
            _TRAINING: _numbered(self.to_theirs(predictions)),
            _BUFFERS: tensors,
            "loss": {"loss": np.asarray(loss)},
            _GRADIENTS: tensors,
            _LOSSES: {f"step {i}": np.asarray(x[0]) for i, x in enumerate(steps, start=1)},
            _PARAMETERS: conversion.to_torch(state.params, state.model_state),
        }

    def draws(self, theirs: dict[str, _Arrays]) -> bool:
        """Returns whether a side draws random numbers in training, without dropout."""
        arguments = self.inputs, self._loss, self._optimizer
        again = self.reference.train(*arguments, steps=1, seed=1).outputs
        pairs = zip(again, theirs[_TRAINING].values(), strict=True)
        same = all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
        return not same or _depends_on_key(self.port.state, self.batch.inputs)

    def name(self, layer: str) -> str:
        """Returns the name of a layer, or of an array, in PyTorch and in the model."""
        ours = self._path_of.get(layer) or self._arrays_of.get(layer)
        return f"{layer} ({ours})" if ours else layer

    def numbers(self, sites: Mapping[Site, Mapping[str, Any]]) -> list[Change]:
        """Returns the changes of calls whose layer in the model has another epsilon or momentum."""
        from jaxtrain.inspect import _causes

        found: list[Change] = []
        for site, arguments in sites.items():
            path = self._path_of.get(site.layer)
            given = self._calls[path].settings if path in self._calls else {}
            layer = self.module.get_submodule(site.layer)
            found += _causes.other_numbers(site, arguments, given, layer)
        return found

    def search(self, theirs: Sequence[np.ndarray]) -> Search:
        """Returns the search for what differs in evaluation, in the examples that differ most.

        Args:
          theirs: the outputs of the module.
        """
        from jaxtrain.inspect._search import Search

        outputs = self.to_theirs(self.outputs)
        distances = [
            differences(x, y).reshape(len(x), -1).max(axis=1, initial=0.0)
            for x, y in zip(theirs, outputs, strict=True)
        ]
        examples = np.argsort(-np.asarray(sum(distances)))[:_EXAMPLES]
        given, ours = (
            jax.tree.map(lambda leaf: leaf[examples], tree)
            for tree in (self.inputs, self.port.inputs)
        )
        layers = self.port.conversion.layer_outputs(self.port.state, ours)
        # The two sides may call a layer last in different ways if others have its weights.
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        counts = Counter(map(id, tensors.values()))
        tied = {name.rpartition(".")[0] for name, x in tensors.items() if counts[id(x)] > 1}
        layers = {name: x for name, x in layers.items() if name not in tied}
        some = [x[examples] for x in outputs]
        arguments = self.reference, self.exact, given, layers, some
        return Search(*arguments, _TOLERANCE)

    def module_changes(self) -> tuple[list[Change], list[Change]]:
        """Returns the changes of the module that are known, and others to try in training."""
        from jaxtrain.inspect import _causes

        tensors = self.port.conversion.tensors
        known = [
            _causes.with_bias(name.removesuffix(".bias"), tensors[name].size)
            for name in self.port.biases
        ]
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
        order = list(sites)
        changes = sorted(changes, key=lambda x: min(map(order.index, x.calls), default=-1))
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

    def tied(self) -> list[Cause]:
        """Returns the tensors that PyTorch shares between layers, and the model does not."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.module.named_parameters(remove_duplicate=False):
            if name in self._arrays_of:
                names.setdefault(id(tensor), []).append(name)
        return [
            Cause(
                *("tied weights", ", ".join(map(self.name, each)), "one tensor", "separate arrays"),
                "one parameter that both layers use, such as attend of flax.linen.Embed",
            )
            for each in names.values()
            if len({self._arrays_of[name] for name in each}) > 1
        ]

    def initialization(self) -> list[str]:
        """Returns a note if the model's own initial weights have another deviation."""
        port = self.port
        initial = port.conversion.to_torch(port.initial.params, port.initial.model_state)
        for name, tensor in port.conversion.tensors.items():
            if name in initial and tensor.ndim > 1 and tensor.size >= 64:
                theirs, ours = float(tensor.std()), float(initial[name].std())
                if not 0.8 < ours / max(theirs, 1e-30) < 1.25:
                    return [
                        f"the initial weights of {self.name(name)} have a standard deviation of "
                        f"{ours:.2g}, and {theirs:.2g} in PyTorch; it matters for training from "
                        "scratch"
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


def _rows(
    theirs: dict[str, _Arrays],
    ours: dict[str, _Arrays],
    noise: dict[str, dict[str, float]],
    skipped: Sequence[str],
) -> list[PortDifference]:
    """Returns the differences of all arrays of the model from those of a module.

    Args:
      theirs: the arrays of the module, which may be changed, by quantity and name.
      ours: the arrays of the model.
      noise: the effect of rounding in the module.
      skipped: names that are not compared.
    """
    found = []
    for quantity, own in ours.items():
        arrays = theirs.get(quantity, {})
        smallest = max(_SMALLEST * max(map(largest, arrays.values()), default=0.0), 1e-30)
        is_exact = quantity in (_EVALUATION, _TRAINING, "loss")
        rounding = _TOLERANCE if is_exact else _LARGER_TOLERANCE
        for name, array in arrays.items():
            if name in own and name not in skipped:
                scale = max(largest(array), smallest)
                tolerance = explained(scale, rounding, noise[quantity].get(name, 0.0)) / scale
                distance = difference(array, own[name]) / scale
                found.append(PortDifference(quantity, distance, tolerance, name))
    return found


def _compared(both: _Both) -> Comparison:
    from jaxtrain.inspect._search import SECONDS

    reference = both.reference
    try:
        theirs, rates = both.theirs(reference)
    except InputError:
        raise
    except Exception as error:  # of the module
        raise InputError(
            f"the module cannot be trained on the inputs ({first_line(error)}); expected a batch "
            "as in training",
            argument="inputs",
        ) from error
    try:
        exact = both.theirs(both.exact)[0]
    except Exception:  # a module that cannot be in float64
        exact = theirs
    noise = {
        quantity: {name: difference(x, exact[quantity][name]) for name, x in arrays.items()}
        for quantity, arrays in theirs.items()
    }
    ours, draws = both.ours(), both.draws(theirs)
    ours = {_EVALUATION: ours[_EVALUATION]} if draws else ours

    def rows(changes: Sequence[Change]) -> list[PortDifference] | None:
        """Returns the differences with changes; None if PyTorch fails with them."""
        try:
            found = both.theirs(reference, changes)[0] if changes else theirs
        except Exception:  # such as a shape that does not fit
            return None
        return _rows(found, ours, noise, list(both.added.values()))

    def failing(changes: Sequence[Change]) -> float:
        found = rows(changes)
        return math.inf if found is None else sum(not row.ok for row in found)

    first_layer, notes = None, []
    sites = reference.evaluate(both.inputs).sites
    numbers = both.numbers(sites)
    biases, further = both.module_changes()
    found = [*biases, *numbers]
    if failing(()) or found:
        search = both.search(list(theirs[_EVALUATION].values()))
        search.run(found)
        if search.first is not None:
            first_layer = both.name(search.first) or "the outputs"
        if search.is_done and not draws:
            search.run_training(further, failing)
        found = search.changes
        if search.is_stopped:
            notes.append(f"the search ended after {SECONDS} s")
    conventions = [change for change in found if change.is_convention]
    causes = both.causes([x for x in found if not x.is_convention], list(sites))
    before, after = _largest(rows(conventions)), _largest(rows(found))
    compared = [
        row._replace(
            where=both.name(row.where),
            remaining=after[quantity].difference if causes and quantity in after else None,
        )
        for quantity, row in before.items()
    ]
    causes += [*both.dropout(rates), *both.tied()]
    notes = [*dict.fromkeys(change.ours for change in conventions), *both.initialization(), *notes]
    if draws:
        notes.append("a side draws random numbers in training, so only evaluation is compared")
    return Comparison(tuple(compared), tuple(causes), first_layer, None, tuple(notes))


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
