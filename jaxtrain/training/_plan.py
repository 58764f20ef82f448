"""Plan: what stays the same from epoch to epoch of a run, and the programs compiled from it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_integer, check_key
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.optimizers import current_learning_rate, skipped_steps
from jaxtrain.training._batches import Batches, is_stream
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._programs import compiled_evaluate
from jaxtrain.training._resident import Resident, to_shapes
from jaxtrain.training._streamed import Streamed, compile_evaluation, evaluate_batches
from jaxtrain.training._validation import check_line_search, checked_data
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import MetricItems, metric_items

_STEP = "training step (model, loss and optimizer)"


class Plan(NamedTuple):
    """The data, functions and options of a run.

    Attributes:
      train: the training data.
      held_out: data to evaluate after each epoch, under the names "test" and "validation".
      loss_fn: per-example loss.
      metrics: the loss and the metrics by name.
      state_metrics: further columns of the history, functions of the state.
      test_batch_size: examples at a time in evaluation.
    """

    train: Resident | Streamed
    held_out: dict[str, Dataset | Batches]
    loss_fn: Loss
    metrics: MetricItems
    state_metrics: Mapping[str, Callable[[TrainState], float]]
    test_batch_size: int

    def trace(self, state: TrainState) -> dict[str, jax.stages.Traced]:
        """Traces the training steps and the evaluations; returns them by name."""
        return {_STEP: self.train.trace(state)} | {
            f"{part} evaluation": compiled_evaluate.trace(
                state, data, self.metrics, batch_size=self.test_batch_size
            )
            for part, data in self.held_out.items()
            if isinstance(data, Dataset)
        }

    def compile(self, state: TrainState) -> dict[str, jax.stages.Lowered]:
        """Compiles the training steps and the evaluations; returns the lowered programs by name."""
        programs = {_STEP: self.train.compile(state)}
        for part, data in self.held_out.items():
            if isinstance(data, Batches):
                with memory_advice(len(data.example)):
                    compile_evaluation(state, data, self.metrics)
            else:
                with self._memory_advice(state, data):
                    programs[f"{part} evaluation"] = self._lower(state, data, self.test_batch_size)
                    programs[f"{part} evaluation"].compile()
        return programs

    def evaluate(self, state: TrainState, part: str, epoch: int) -> dict[str, float]:
        """Returns the mean loss and the metrics of the test or validation data."""
        data = self.held_out[part]
        if isinstance(data, Dataset):
            with self._memory_advice(state, data):
                values = compiled_evaluate(
                    state, data, self.metrics, batch_size=self.test_batch_size
                )
                return {name: float(value) for name, value in values.items()}
        values = evaluate_batches(state, data, self.metrics, epoch)
        return {name: float(value) for name, value in values.items()}

    def _memory_advice(
        self, state: TrainState, data: Dataset
    ) -> contextlib.AbstractContextManager[None]:
        lower = functools.partial(self._lower, state, data)
        return memory_advice(self.test_batch_size, lower, "test_batch_size")

    def _lower(self, state: TrainState, data: Dataset, size: int) -> jax.stages.Lowered:
        return compiled_evaluate.lower(state, data, self.metrics, batch_size=size)

    def abstract(self) -> Plan:
        """Returns the plan with shapes in place of data, for traces that no device affects."""
        held_out = {
            part: to_shapes(data) if isinstance(data, Dataset) else data
            for part, data in self.held_out.items()
        }
        return self._replace(train=self.train.abstract(), held_out=held_out)

    def close(self) -> None:
        """Ends the workers of the streams."""
        if isinstance(self.train, Streamed):
            self.train.batches.close()
        for data in self.held_out.values():
            if isinstance(data, Batches):
                data.close()

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
    data: dict[str, Any],
    *,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None,
    state_metrics: Mapping[str, Callable[[TrainState], float]] | None,
    batch_size: int,
    test_batch_size: int,
    key: Key[Array, ""] | None,
    measure: str,
    streams: bool = False,
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
      streams: whether the data may be streams.

    Raises:
      InputError: an argument is out of range, or the data do not fit the model or the loss.
      OutOfMemoryError: the data do not fit on the device.
    """
    check_integer(batch_size, "batch_size", minimum=1)
    check_integer(test_batch_size, "test_batch_size", minimum=1)
    if key is not None:
        check_key(key)
    metrics = metric_items(loss_fn, metric_fns)
    if data["train"] is None:
        raise InputError(
            "train_data is None; expected a jaxtrain.Dataset(inputs, targets), or a stream"
        )
    orders = {"train": (batch_size, key)}
    with memory_advice(batch_size):  # the data are moved to the device here
        checked: dict[str, Dataset | Batches] = {
            part: Batches(each, f"{part}_data", *orders.get(part, (test_batch_size, None)))
            if streams and is_stream(each)
            else checked_data(each, f"{part}_data", state, loss_fn)
            for part, each in data.items()
            if each is not None
        }
    train_data = checked.pop("train")
    for held_out in checked.values():
        if isinstance(held_out, Batches):
            held_out.check_model(state, loss_fn, int(state.epoch) + 1)
            held_out.close()  # its workers would run until the first evaluation
    if isinstance(train_data, Batches):
        train: Resident | Streamed = Streamed(train_data, state, loss_fn, measure)
        check_line_search(state, train.batch_size * (train.steps or 2), train.batch_size)
    else:
        check_line_search(state, len(train_data), batch_size)
        parallel.check_batch_size(batch_size, len(train_data))
        size = min(batch_size, len(train_data))
        train = Resident(train_data, loss_fn, size, key, measure)
    return Plan(train, checked, loss_fn, metrics, dict(state_metrics or {}), test_batch_size)


def learning_rate(state: TrainState) -> float | None:
    """Returns the learning rate of the latest step, if the optimizer records one."""
    rate = current_learning_rate(state.opt_state)
    # float32 has seven digits: 0.01, not 0.009999999776.
    return None if rate is None else float(f"{float(rate):.7g}")
