"""Plan: what stays the same from epoch to epoch of a run, and the programs compiled from it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxtrain import parallel
from jaxtrain._arguments import check_integer, check_key
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import current_learning_rate, skipped_steps
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._validation import check_line_search, checked_data
from jaxtrain.training.epoch import (
    compiled_evaluate,
    epoch_order,
    mean_step_loss,
    num_steps,
    train_steps,
)
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import MetricItems, metric_items


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size", "measure"))
def compiled_steps(
    state: TrainState,
    dataset: Dataset,
    order: Array,
    loss_fn: Loss,
    start: int | Array,
    stop: int | Array,
    *,
    batch_size: int,
    measure: str,
) -> tuple[TrainState, tuple[Array, Array]]:
    """Returns the same as `train_steps`, compiled."""

    def run(
        state: TrainState, dataset: Dataset, order: Array, start: Array, stop: Array
    ) -> tuple[TrainState, tuple[Array, Array]]:
        state, losses, norms = train_steps(
            state, dataset, order, loss_fn, start, stop, batch_size=batch_size, measure=measure
        )
        return state, (losses, norms)

    return parallel.on_auto_axes(run, state, dataset, order, start, stop, returns_state=True)


class Plan(NamedTuple):
    """The data, functions and options of a run.

    Attributes:
      train_data: the training data.
      held_out: data to evaluate after each epoch, under the names "test" and "validation".
      loss_fn: per-example loss.
      metrics: the loss and the metrics by name.
      state_metrics: further columns of the history, functions of the state.
      batch_size: examples per step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle; None keeps the stored order.
      measure: which steps' gradient norms to compute, "last" or "every".
    """

    train_data: Dataset
    held_out: dict[str, Dataset]
    loss_fn: Loss
    metrics: MetricItems
    state_metrics: Mapping[str, Callable[[TrainState], float]]
    batch_size: int
    test_batch_size: int
    key: Key[Array, ""] | None
    measure: str

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return num_steps(len(self.train_data), self.batch_size)

    def order(self, epoch: int) -> Array:
        """Returns the order of the examples in an epoch."""
        key = None if self.key is None else jax.random.fold_in(self.key, epoch)
        order = epoch_order(len(self.train_data), key)
        mesh = parallel.current_mesh()
        return order if mesh is None else parallel.replicate(order, mesh)

    def mean_step_loss(self, losses: np.ndarray, order: Array, *, skip_nonfinite: bool) -> float:
        """Returns the mean over an epoch's examples of the loss before each update."""
        mean = mean_step_loss(
            losses,
            self.train_data.weights,
            order,
            batch_size=self.batch_size,
            skip_nonfinite=skip_nonfinite,
        )
        return float(mean)

    def run_steps(
        self, state: TrainState, order: Array, start: int, stop: int, measure: str | None = None
    ) -> tuple[TrainState, np.ndarray, np.ndarray]:
        """Returns the state after some steps of an epoch, their losses and gradient norms."""
        with self._memory_advice(state):
            state, (losses, norms) = compiled_steps(
                state,
                self.train_data,
                order,
                self.loss_fn,
                start,
                stop,
                batch_size=self.batch_size,
                measure=measure or self.measure,
            )
            return state, np.asarray(losses)[start:stop], np.asarray(norms)[start:stop]

    def _memory_advice(self, state: TrainState) -> contextlib.AbstractContextManager[None]:
        return memory_advice(self.batch_size, functools.partial(self.lower_steps, state))

    def trace(self, state: TrainState) -> dict[str, jax.stages.Traced]:
        """Traces the training steps and the evaluations; returns them by name."""
        return {"training step (model, loss and optimizer)": self.trace_steps(state)} | {
            f"{part} evaluation": self.trace_evaluation(state, part) for part in self.held_out
        }

    def compile(self, state: TrainState) -> dict[str, jax.stages.Lowered]:
        """Compiles the training steps and the evaluations; returns the lowered programs by name."""
        with self._memory_advice(state):
            lowered = {name: program.lower() for name, program in self.trace(state).items()}
            for program in lowered.values():
                program.compile()
        return lowered

    def abstract(self) -> Plan:
        """Returns the plan with shapes in place of data, for traces that no device affects."""
        return self._replace(
            train_data=to_shapes(self.train_data), held_out=to_shapes(self.held_out)
        )

    def trace_steps(self, state: TrainState) -> jax.stages.Traced:
        """Traces the training steps, for any part of an epoch."""
        examples = len(self.train_data)
        order = jax.ShapeDtypeStruct(
            (examples,),
            jnp.int32,
            sharding=parallel.replicated_like(jax.tree.leaves(self.train_data)[0]),
        )
        return compiled_steps.trace(
            state,
            self.train_data,
            order,
            self.loss_fn,
            0,
            self.steps,
            batch_size=self.batch_size,
            measure=self.measure,
        )

    def trace_evaluation(self, state: TrainState, part: str) -> jax.stages.Traced:
        """Traces the evaluation of the test or validation data."""
        return compiled_evaluate.trace(
            state, self.held_out[part], self.metrics, batch_size=self.test_batch_size
        )

    def lower_steps(self, state: TrainState, batch_size: int) -> jax.stages.Lowered:
        """Lowers the training steps at another batch size."""
        return self._replace(batch_size=batch_size).trace_steps(state).lower()

    def lower_evaluation(self, state: TrainState, part: str, size: int) -> jax.stages.Lowered:
        """Lowers the evaluation of the test or validation data at another batch size."""
        return self._replace(test_batch_size=size).trace_evaluation(state, part).lower()

    def columns(self, state: TrainState) -> list[str]:
        """Returns the names of the history's columns.

        Raises:
          InputError: a state metric has the name of another column.
        """
        columns = [
            *("epoch", "train_loss"),
            *(f"{part}_{name}" for part in self.held_out for name, _ in self.metrics),
            *self.state_metrics,
            "gradient_norm",
            *([] if skipped_steps(state.opt_state) is None else ["skipped_steps"]),
            *([] if current_learning_rate(state.opt_state) is None else ["learning_rate"]),
            "seconds",
        ]
        reserved = {"step_losses", "skipped_steps", "learning_rate"}
        for name, metric in self.state_metrics.items():
            if not callable(metric):
                raise InputError(
                    f"the state metric {name} is {metric!r}; expected a function of the state"
                )
            if name in reserved or columns.count(name) > 1:
                raise InputError(
                    f"state_metrics has a metric named {name!r}, which the history already "
                    "has as a column; rename it"
                )
        return columns


def make_plan(
    state: TrainState,
    data: dict[str, Dataset | None],
    *,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None,
    state_metrics: Mapping[str, Callable[[TrainState], float]] | None,
    batch_size: int,
    test_batch_size: int,
    key: Key[Array, ""] | None,
    measure: str,
) -> Plan:
    """Returns the plan of a run, its arguments checked and its data on the device.

    Args:
      state: where to start.
      data: "train", and "test" and "validation" or None.
      loss_fn: per-example loss.
      metric_fns: metrics by name.
      state_metrics: further columns of the history by name.
      batch_size: examples per step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle.
      measure: which steps' gradient norms to compute, "last" or "every".

    Raises:
      InputError: an argument is out of range, or the data do not fit the model or the loss.
      OutOfMemoryError: the data do not fit on the device.
    """
    check_integer(batch_size, "batch_size", minimum=1)
    check_integer(test_batch_size, "test_batch_size", minimum=1)
    if key is not None:
        check_key(key)
    metrics = metric_items(loss_fn, metric_fns)
    with memory_advice(batch_size):  # the data are moved to the device here
        checked = {
            name: checked_data(part, f"{name}_data", state, loss_fn)
            for name, part in data.items()
            if part is not None
        }
    train_data = checked.pop("train", None)
    if train_data is None:
        raise InputError("train_data is None; expected a jaxtrain.Dataset(inputs, targets)")
    check_line_search(state, len(train_data), batch_size)
    parallel.check_batch_size(batch_size, len(train_data))
    return Plan(
        train_data=train_data,
        held_out=checked,
        loss_fn=loss_fn,
        metrics=metrics,
        state_metrics=dict(state_metrics or {}),
        batch_size=min(batch_size, len(train_data)),
        test_batch_size=test_batch_size,
        key=key,
        measure=measure,
    )


def to_shapes(tree: PyTree) -> PyTree:
    """Returns shapes and dtypes in place of arrays, without their placement."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def learning_rate(state: TrainState) -> float | None:
    """Returns the learning rate of the latest step, if the optimizer records one."""
    rate = current_learning_rate(state.opt_state)
    # float32 has seven digits: 0.01, not 0.009999999776.
    return None if rate is None else float(f"{float(rate):.7g}")
