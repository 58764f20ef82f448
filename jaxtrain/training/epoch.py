"""train_epoch, evaluate and predict: one pass over a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxtrain import parallel
from jaxtrain._arguments import check_integer, check_key
from jaxtrain.data.stream import Source
from jaxtrain.dataset import Dataset, check_dataset, check_inputs
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.training._batches import Batches, is_stream
from jaxtrain.training._programs import compiled_epoch, compiled_evaluate, compiled_predict
from jaxtrain.training._programs import num_steps as num_steps
from jaxtrain.training._streamed import Streamed, evaluate_batches
from jaxtrain.training._validation import check_line_search, check_targets
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import Metrics, check_loss, metric_items


def train_epoch(
    state: TrainState,
    dataset: Dataset | Iterable[Any] | Source,
    loss_fn: Loss,
    *,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
) -> tuple[TrainState, Float[Array, "steps"]]:
    """Trains on every example once.

    A partial last batch is averaged over its own examples. On a data set in memory the function is
    one compiled program, which may be called under `jit`, scanned over epochs, and vmapped over
    states.

    Args:
      state: where to start; not modified.
      dataset: inputs and targets with leading axis [examples]; or a stream, as for `fit`.
      loss_fn: per-example loss.
      batch_size: examples per step; if larger than the data set, all examples are one batch.
      key: PRNG key of the shuffle; None keeps the stored order.

    Returns:
      The state after the epoch, and the loss of each step before its update, [steps].

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes.
      StreamError: a stream raised an error.

    Example:
      >>> state, losses = jt.train_epoch(state, train, loss_fn, batch_size=16, key=key)
      >>> losses.shape
      (4,)
    """
    check_state_type(state)
    check_loss(loss_fn)
    check_integer(batch_size, "batch_size", minimum=1)
    if key is not None:
        check_key(key)
    if is_stream(dataset):
        with parallel.mesh_of(state):
            batches = Batches(dataset, "dataset", batch_size, key).same_each_epoch()
            with contextlib.closing(batches):
                return _train_on_stream(state, batches, loss_fn)
    check_dataset(dataset, "dataset")
    assert isinstance(dataset, Dataset)
    check_targets(state, dataset, loss_fn, "dataset")
    check_line_search(state, len(dataset), batch_size)
    with parallel.mesh_of(state, dataset):
        parallel.check_batch_size(batch_size, len(dataset))
        return compiled_epoch(state, dataset, loss_fn, batch_size=batch_size, key=key)


def _train_on_stream(
    state: TrainState, batches: Batches, loss_fn: Loss
) -> tuple[TrainState, Array]:
    streamed = Streamed(batches, state, loss_fn)
    losses: list[Array] = []
    steps: list[int] = []
    streamed.choose_group_size(state)
    with streamed.groups(int(state.epoch) + 1) as groups:
        for group in groups:
            # The next group is dispatched while the last one runs; not more, which take memory.
            jax.block_until_ready(losses[-2:-1])
            state, (found, *_) = streamed.run(group, state)
            losses.append(found)
            steps.append(group.steps)
    used = [np.asarray(each)[:count] for each, count in zip(losses, steps, strict=True)]
    return state.replace(epoch=state.epoch + 1), jnp.asarray(np.concatenate(used))


def evaluate(
    state: TrainState,
    dataset: Dataset | Iterable[Any] | Source,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    *,
    batch_size: int = 1000,
) -> Metrics:
    """Returns the mean loss and the metrics of a data set, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      dataset: inputs and targets with leading axis [examples]; or a stream, as for `fit`.
      loss_fn: per-example loss.
      metric_fns: metrics by name.
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      {"loss": (weighted) mean loss over all examples, and each metric by its name}.

    Raises:
      InputError: an argument is out of range; targets are not the labels or probabilities that
        the loss takes.
      StreamError: a stream raised an error.

    Example:
      >>> metrics = jt.evaluate(state, test, loss_fn, {"accuracy": jt.metrics.accuracy})
      >>> sorted(metrics)
      ['accuracy', 'loss']
    """
    check_state_type(state)
    check_integer(batch_size, "batch_size", minimum=1)
    metrics = metric_items(loss_fn, metric_fns)
    if is_stream(dataset):
        with parallel.mesh_of(state):
            batches = Batches(dataset, "dataset", batch_size)
            with contextlib.closing(batches):
                batches.check_model(state, loss_fn, 1)
                return evaluate_batches(state, batches, metrics)
    check_dataset(dataset, "dataset")
    assert isinstance(dataset, Dataset)
    check_targets(state, dataset, loss_fn, "dataset")
    with parallel.mesh_of(state, dataset):
        return compiled_evaluate(state, dataset, metrics, batch_size=batch_size)


def predict(state: TrainState, inputs: PyTree, *, batch_size: int = 1000) -> Any:
    """Returns the model's outputs for many inputs, in evaluation mode.

    May be called under `jax.jit`, and in `jax.export` with a symbolic number of examples, which
    are then evaluated in one batch.

    Args:
      state: the parameters to predict with.
      inputs: array or pytree of arrays, [examples, ...].
      batch_size: examples at a time; changes memory and speed, not the result.

    Returns:
      Predictions [examples, ...].

    Raises:
      InputError: there are no inputs, or the batch size is below 1.

    Example:
      >>> logits = jt.predict(state, test.inputs)
      >>> labels = jnp.argmax(logits, axis=-1)
      >>> labels.shape
      (16,)
    """
    check_state_type(state)
    check_inputs(inputs)
    check_integer(batch_size, "batch_size", minimum=1)
    with parallel.mesh_of(state, inputs):
        return compiled_predict(state, inputs, batch_size=batch_size)
