"""summary: the layers of a network with their shapes, and the cost of one training step."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxtrain import adapters, parallel
from jaxtrain._arguments import check_arguments
from jaxtrain.dataset import (
    Dataset,
    check_dataset,
    check_inputs,
    describe_array,
    join_inputs,
    named_arrays,
)
from jaxtrain.errors import InputError, first_line
from jaxtrain.inspect._flops import count_flops
from jaxtrain.losses import Loss
from jaxtrain.training.state import TrainState, check_state_type, to_shapes
from jaxtrain.training.step import check_loss, update

if TYPE_CHECKING:
    from rich.console import Group


class Layer(NamedTuple):
    """A layer of a network; the numbers leave out the layers nested in it, so that columns add up.

    Attributes:
      path: where the layer is in the network, such as "encoder/Dense_0"; "" is the network itself.
      type: name of its class.
      inputs: shape and dtype of each array that it is first called with, without PRNG keys.
      outputs: those of its results.
      parameters: number of parameters.
      flops: floating-point operations of all its calls in a forward pass on the batch; None if they
        are not known.
    """

    path: str
    type: str
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    parameters: int
    flops: int | None


class StepMemory(NamedTuple):
    """Memory of a compiled training step on one device, in bytes.

    Attributes:
      arguments: the state and the batch.
      outputs: the next state and the loss.
      temporaries: intermediate results, such as activations.
      total: all of these at once.
    """

    arguments: int
    outputs: int
    temporaries: int
    total: int


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The layers of a network, and the cost of a training step; prints as a table.

    Attributes:
      layers: in the order of their first calls.
      batch_size: examples of the batch.
      parameters: number of parameters.
      parameter_bytes: their memory.
      model_state_bytes: memory of the model state, such as batch statistics.
      optimizer_bytes: memory of the optimizer's state.
      forward_flops: floating-point operations of a forward pass in training mode; None if they are
        not known.
      step_flops: those of a training step: forward, backward and the optimizer.
      memory: memory of the compiled step; None if the backend does not report it.
    """

    layers: tuple[Layer, ...]
    batch_size: int
    parameters: int
    parameter_bytes: int
    model_state_bytes: int
    optimizer_bytes: int
    forward_flops: int | None
    step_flops: int | None
    memory: StepMemory | None

    def __rich__(self) -> Group:
        """Returns the table, for rich."""
        from rich.console import Group
        from rich.table import Table

        memory = "unknown" if self.memory is None else _bytes(self.memory.total)
        lines = [
            f"parameters: {self.parameters:,} ({_bytes(self.parameter_bytes)}), model state: "
            f"{_bytes(self.model_state_bytes)}, optimizer state: {_bytes(self.optimizer_bytes)}",
            f"a step on {self.batch_size:,} examples: {_si(self.step_flops)}FLOPs "
            f"({_si(self.forward_flops)}FLOPs forward), {memory} of memory",
        ]
        table = Table()
        for heading in ("layer", "type", "inputs", "outputs"):
            table.add_column(heading)
        for heading in ("parameters", "FLOPs"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            table.add_row(
                *(layer.path, layer.type, _shapes(layer.inputs), _shapes(layer.outputs)),
                *(f"{layer.parameters:,}", _si(layer.flops).strip()),
            )
        return Group(table, *lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=1000, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    __repr__ = __str__


def summary(
    state: TrainState,
    inputs: PyTree,
    targets: PyTree = None,
    *,
    loss_fn: Loss | None = None,
) -> Summary:
    """Returns the layers of a network, its size, and the FLOPs and memory of a training step.

    The step is compiled for one device, but nothing is computed. FLOPs are counted in the traced
    program, the same on every backend: two per multiplication and addition of a matrix product or
    a convolution, with its padding; one per element of other arithmetic on floating numbers; all
    steps of a loop. They are None where they are not known, as in a loop whose length depends on
    data. Integer arithmetic, such as that of random numbers, is not counted.

    The layers are the modules that the network calls. Those that JAX rebuilds inside a
    transformation, such as the cell of `nnx.RNN`, are part of the layer around them, and a `Model`
    of plain functions is one row. An Equinox module is written for one example, so the shapes of
    its layers have no batch axis; their FLOPs are those of the batch.

    Args:
      state: the network and its optimizer, as `init_state` returns them.
      inputs: a batch as in training, [batch, ...], or a `Dataset`; its values are not used, and
        objects of `jax.ShapeDtypeStruct` are accepted.
      targets: the targets of the batch, as `loss_fn` takes them.
      loss_fn: per-example loss; None takes the mean of the outputs, which costs about as much.

    Raises:
      InputError: an argument has the wrong type, or the network does not take the inputs.

    Example:
      >>> summary = jt.summary(state, train.inputs[:32])
      >>> summary.parameters  # 64 · 8 + 8 + 8 · 10 + 10
      610
      >>> table = str(summary)  # print(summary) shows it
    """
    check_arguments(summary, locals(), eager="call it outside")
    check_state_type(state)
    check_loss(_mean_output if loss_fn is None else loss_fn)
    if loss_fn is None and targets is not None:
        raise InputError(
            "targets is given without loss_fn; expected both, such as "
            "loss_fn=jaxtrain.losses.cross_entropy"
        )
    batch, abstract = _abstract_batch(inputs, targets), to_shapes(state)
    with parallel.without_mesh():
        layers = _layers(state, abstract, join_inputs(batch))
        traced = jax.jit(lambda state, batch: update(state, batch, loss_fn or _mean_output)[:2])
        program = traced.trace(abstract, batch)
        step_flops = _known(count_flops(program.jaxpr).values())
        analysis = program.lower().compile().memory_analysis()
    flops = [layer.flops for layer in layers]
    return Summary(
        layers=layers,
        batch_size=len(batch),
        parameters=_size(state.params),
        parameter_bytes=_nbytes(state.params),
        model_state_bytes=_nbytes(state.model_state),
        optimizer_bytes=_nbytes(state.opt_state),
        forward_flops=None if None in flops else sum(filter(None, flops)),
        step_flops=step_flops,
        memory=None if analysis is None else _memory(analysis),
    )


def _layers(state: TrainState, abstract: TrainState, inputs: PyTree) -> tuple[Layer, ...]:
    def forward(params: PyTree, model_state: PyTree, inputs: PyTree, key: Array) -> Any:
        return state.model.apply(params, model_state, inputs, train=True, key=key)

    arguments = abstract.params, abstract.model_state, inputs, abstract.key
    with adapters.recording(state.model, state.params, state.model_state) as recorder:
        try:
            program, shapes = jax.make_jaxpr(forward, return_shape=True)(*arguments)
        except InputError:
            raise
        except Exception as error:  # networks raise different types for a wrong shape
            found = ", ".join(
                f"{path} is {describe_array(x)}" for path, x in named_arrays(inputs, "inputs")
            )
            reason = first_line(error)
            raise InputError(
                f"the model does not take the inputs ({found}): {reason}; expected a batch as in "
                "training"
            ) from error
    outputs = jax.tree.leaves(shapes[0])
    calls = recorder.calls or [
        adapters.Call((), "Model", tuple(jax.tree.leaves(inputs)), tuple(outputs), {})
    ]
    flops = count_flops(program, recorder.layer_of)
    parameters = [0] * len(calls)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        # A parameter belongs to the innermost layer around it, or to the network.
        within = [len(call.path) if names[: len(call.path)] == call.path else -1 for call in calls]
        parameters[within.index(max(within))] += leaf.size
    flops[0] = flops.get(0, 0) + flops.pop(None, 0)  # outside of all layers
    return tuple(
        Layer("/".join(path), kind, inputs, outputs, parameters[n], _known([flops.get(n, 0)]))
        for n, (path, kind, inputs, outputs, _) in enumerate(calls)
    )


def _mean_output(predictions: PyTree, targets: PyTree) -> Float[Array, "batch"]:
    """Returns the mean of the outputs of each example."""
    leaves = jax.tree.leaves(predictions)
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        raise InputError(
            f"the outputs of the model are {_shapes(leaves) or 'empty'}; expected floating-point "
            "outputs, or the loss of the model as loss_fn"
        )
    return sum((jnp.mean(x.reshape(len(x), -1), axis=1) for x in floats), jnp.zeros(()))


def _abstract_batch(inputs: PyTree, targets: PyTree) -> Dataset:
    """Returns a batch with shapes in place of arrays, checked like one with arrays."""

    def with_values(leaf: Any) -> Any:  # which use no memory
        is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if is_abstract else leaf

    shared = None
    if isinstance(inputs, Dataset):
        inputs, shared = inputs.inputs, inputs.shared
    batch = Dataset(*jax.tree.map(with_values, (inputs, targets)), shared=shared)
    check_inputs(batch.inputs)
    check_dataset(batch, "batch")
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)),
        batch,
    )


def _memory(analysis: Any) -> StepMemory:
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    total = arguments + outputs + temporaries - analysis.alias_size_in_bytes
    return StepMemory(arguments, outputs, temporaries, total)


def _known(flops: Iterable[float]) -> int | None:
    total = sum(flops)
    return None if math.isnan(total) else round(total)


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _nbytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(leaves: Iterable[Any]) -> str:
    return ", ".join(map(describe_array, leaves))


def _si(value: int | None) -> str:
    """Returns three digits with a prefix of the SI, such as "1.23 M"."""
    if value is None:
        return "unknown "
    power = max(0, min(5, (len(str(value)) - 1) // 3))
    return f"{value:,} " if power == 0 else f"{value / 1000**power:.3g} {' kMGTP'[power]}"


def _bytes(count: int) -> str:
    power = max(0, min(4, (count.bit_length() - 1) // 10))
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.3g} {' KMGT'[power]}iB"
