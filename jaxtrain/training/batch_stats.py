"""update_batch_stats: recomputes the running statistics of batch norm from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Key, PyTree

from jaxtrain import adapters, parallel
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._compiler import bounded
from jaxtrain._placement import to_numpy
from jaxtrain._safetensors import place
from jaxtrain.adapters import BatchStatistics
from jaxtrain.data.stream import Source
from jaxtrain.dataset import Dataset, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.training.checks import check_source
from jaxtrain.training.sources import Segment, make_source
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import Objective, model_inputs

# Initial statistics so large that float32 rounds away those of a batch. The fraction of them that
# remains after a batch is the layer's momentum.
_LARGE = 2.0**40


def update_batch_stats(
    state: TrainState,
    data: Dataset | tuple[Any, ...] | Iterable[Any] | Source,
    *,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
) -> TrainState:
    """Recomputes the running statistics of batch norm for the parameters that are evaluated.

    Same as `torch.optim.swa_utils.update_bn`: the model sees each batch in training mode, and the
    statistics become their means over the batches. The statistics of training belong to the
    parameters of training, not to their average or to parameters that were replaced.

    Args:
      state: the parameters; with `average_parameters`, the average is used.
      data: training data with leading axis [examples], a `Dataset` or a tuple; or a stream, as for
        `fit`. Targets are not used. Inputs of weight 0 that are not finite are replaced by 0, as in
        training.
      batch_size: examples per batch, as in training; a stream of batches has its own.
      key: PRNG key of the shuffle; None keeps the stored order, which must not be sorted by class.

    Returns:
      The state with the new statistics; the rest of it is the same.

    Raises:
      InputError: an argument is out of range, the model does not take the inputs, or it has no
        statistics of batch norm.
      StreamError: a stream raised an error.

    Example:
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, inputs, train: bool = False):
      ...         x = nn.Dense(8)(inputs.reshape(inputs.shape[0], -1))
      ...         return nn.Dense(10)(nn.BatchNorm(use_running_average=not train)(x))
      >>> optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(0.01), 0.9)
      >>> state = jt.init_state(Network(), optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=16)
      >>> state = jt.update_batch_stats(state, train, batch_size=16)
      >>> metrics = jt.evaluate(state, test, loss_fn)  # of the average
    """
    check_arguments(update_batch_stats, locals(), eager="call it outside")
    check_state_type(state)
    check_integer(batch_size, "batch_size", minimum=1)
    layers = adapters.batch_statistics(state.model, state.params, state.model_state)
    if not layers:
        raise InputError(
            "the model has no running statistics of batch norm; expected arrays named mean and "
            "var in state.model_state, as Linen, NNX and Equinox have them",
            argument="state",
        )
    with contextlib.ExitStack() as stack:
        in_memory = data if isinstance(data, Dataset | tuple) else None
        stack.enter_context(parallel.mesh_of(state, in_memory))
        source = make_source(data, "data", batch_size, key, 1, stack)
        check_source(state, source, Objective(None))
        sample = model_inputs(source.sample[:batch_size])
        momentum = _momentum(state, layers, sample)
        updated = {name: layer for name, layer in layers.items() if layer.mean in momentum}
        start = state.replace(model_state=_reset(state.model_state, updated, 0.0))
        sums: dict[str, Any] = {path: np.zeros(x.shape, np.float32) for path, x in momentum.items()}
        batches = 0
        for segment in stack.enter_context(contextlib.closing(source.segments(1))):
            sums = _add(start, sums, segment, segment.steps, batches)
            jax.block_until_ready(sums)  # segments take memory
            batches += segment.steps
    found = {path: to_numpy(sums[path]) / (batches * (1 - momentum[path])) for path in momentum}
    for layer in updated.values():
        if layer.final_count is not None:
            found[layer.counter] = layer.final_count
    return state.replace(model_state=_with_arrays(state.model_state, found))


def _momentum(
    state: TrainState, layers: Mapping[str, BatchStatistics], inputs: PyTree
) -> dict[str, np.ndarray]:
    """Returns the momentum of each array of statistics that training updates, by path.

    A layer keeps momentum · old + (1 − momentum) · batch. Libraries have the momentum in attributes
    of different names, so it is measured. It is a short decimal number, such as 0.99. Its float32
    has a rounding error that 1 − momentum would magnify, so the shortest decimal with the same
    float32 is returned.
    """
    probe = state.replace(model_state=_reset(state.model_state, layers, _LARGE))
    after = jax.jit(_in_training)(probe, inputs, 0)
    found: dict[str, np.ndarray] = {}
    for layer in layers.values():
        for path in (layer.mean, layer.var):
            kept = to_numpy(after[path]).astype(np.float32) / np.float32(_LARGE)
            kept[np.abs(kept) < 1e-7] = 0  # the statistics of the batch themselves
            momentum = np.array([float(str(x)) for x in kept.ravel()]).reshape(kept.shape)
            if (momentum == 1).all():  # a layer that uses its statistics in training as well
                continue
            if not ((momentum >= 0) & (momentum < 1)).all():
                raise InputError(
                    f"{path} is not a running mean: a batch keeps {momentum.max():.3g} of its value"
                    "; expected a layer that keeps momentum · old + (1 − momentum) · batch",
                    argument="state",
                )
            found[path] = momentum
    return found


def _in_training(state: TrainState, inputs: PyTree, number: Any) -> dict[str, Array]:
    """Returns the model state after a batch in training mode, by path."""
    key = jax.random.fold_in(state.key, number)
    outputs = state.model.apply(
        state.evaluation_params, state.model_state, inputs, train=True, key=key
    )
    return dict(named_arrays(outputs[1], "model_state"))


@bounded
@jax.jit
def _add(
    state: TrainState, sums: dict[str, Array], segment: Segment, stop: Any, number: Any
) -> dict[str, Array]:
    """Adds the statistics after each batch of a segment; `number` is that of its first batch."""

    def run(state: TrainState, sums: dict[str, Array], segment: Segment) -> dict[str, Array]:
        def add(index: Any, sums: dict[str, Array]) -> dict[str, Array]:
            inputs = model_inputs(parallel.divide(segment.batch(index)))
            after = _in_training(state, inputs, number + index)
            return {path: total + after[path].astype(total.dtype) for path, total in sums.items()}

        return lax.fori_loop(0, stop, add, sums)

    return parallel.on_auto_axes(run, state, sums, segment)


def _reset(model_state: PyTree, layers: Mapping[str, BatchStatistics], value: float) -> PyTree:
    """Returns a model state whose statistics are `value`, after no update."""
    leaves = dict(named_arrays(model_state, "model_state"))
    found: dict[str, np.ndarray] = {}
    for layer in layers.values():
        found |= {path: np.full(leaves[path].shape, value) for path in (layer.mean, layer.var)}
        if layer.counter:  # a count, or whether no update has been made
            is_flag = leaves[layer.counter].dtype == bool
            found[layer.counter] = np.full(leaves[layer.counter].shape, is_flag)
    return _with_arrays(model_state, found)


def _with_arrays(tree: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    leaves = [
        place(arrays[path].astype(leaf.dtype), leaf) if path in arrays else leaf
        for path, leaf in named_arrays(tree, "model_state")
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
