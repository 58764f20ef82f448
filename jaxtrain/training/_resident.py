"""Resident: training data in the memory of the device."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._placement import to_numpy
from jaxtrain._processes import agree
from jaxtrain.checkpoint import PartOfEpoch, digest
from jaxtrain.dataset import Dataset, epoch_order
from jaxtrain.losses import Loss
from jaxtrain.training._chunk import CHUNK_SECONDS, Chunk, next_end
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._programs import num_steps, step_weights, train_steps
from jaxtrain.training.state import TrainState


class Resident(NamedTuple):
    """Training data in the memory of the device, and how to train on them.

    Attributes:
      data: the data.
      loss_fn: per-example loss.
      batch_size: examples per step.
      key: PRNG key of the shuffle; None keeps the stored order.
      measure: which steps' gradient norms to compute, "last" or "every".
    """

    data: Dataset
    loss_fn: Loss
    batch_size: int
    key: Key[Array, ""] | None
    measure: str

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return num_steps(len(self.data), self.batch_size)

    @property
    def examples(self) -> int:
        """Examples per epoch."""
        return len(self.data)

    def identity(self) -> dict[str, str]:
        """Returns what describes the data and their order, which must agree for a run to resume."""
        return {
            "training data": f"{len(self.data)} examples with the digest {digest(self.data)}",
            "order of the examples": "as stored"
            if self.key is None
            else f"by key {digest(self.key)}",
        }

    def order(self, epoch: int) -> Array:
        """Returns the order of the examples in an epoch."""
        key = None if self.key is None else jax.random.fold_in(self.key, epoch)
        order = epoch_order(len(self.data), key)
        mesh = parallel.current_mesh()
        return order if mesh is None else parallel.replicate(order, mesh)

    def step_weights(self, epoch: int) -> Array:
        """Returns the total weight of the examples of each step of an epoch."""
        weights = self.data.weights
        order = np.arange(len(self.data)) if weights is None else self.order(epoch)
        return step_weights(weights, order, batch_size=self.batch_size)

    @contextlib.contextmanager
    def chunks(
        self,
        epoch: int,
        part: PartOfEpoch | None,
        interval: int,
        every_steps: int | None,
        ends: tuple[int, ...] = (),
    ) -> Iterator[Iterator[Chunk]]:
        """Yields the chunks of an epoch, as long as `CHUNK_SECONDS` allow.

        Args:
          epoch: the epoch, counted from 1.
          part: the steps that an earlier call has taken, or None.
          interval: steps between two events, at whose multiples a chunk ends; 0 for none.
          every_steps: steps between two checkpoints, the same; None for none.
          ends: further steps at which a chunk ends.
        """
        start = 0 if part is None else part.step
        yield self._chunks(self.order(epoch), start, (interval, every_steps), ends)

    def _chunks(
        self, order: Array, start: int, intervals: tuple[int | None, ...], ends: tuple[int, ...]
    ) -> Iterator[Chunk]:
        seconds = 0.0

        def run(
            begin: int,
            end: int,
            state: TrainState,
            stop: int | None = None,
            measure: str | None = None,
        ) -> tuple[TrainState, np.ndarray, np.ndarray, np.ndarray]:
            nonlocal seconds
            started = time.perf_counter()
            state, losses, norms = self._run_steps(
                state, order, begin, stop or end, measure or self.measure
            )
            seconds = time.perf_counter() - started
            return state, losses, norms, np.empty(0, np.float32)

        def batch(step: int) -> tuple[Dataset, Callable[[int], str]]:
            rows = np.asarray(order)[step * self.batch_size :][: self.batch_size]
            # On the host: the devices of several processes may each have a part of the data.
            found = jax.tree.map(lambda leaf: to_numpy(leaf)[rows], self.data)
            return found, lambda row: f"example {rows[row]}"

        length = 1
        while start < self.steps:
            end = next_end(start, intervals, ends) or self.steps
            stop = min(start + length, end, self.steps)
            stop = agree(stop)  # all processes take the same steps at once
            seen = min(stop * self.batch_size, len(self.data))
            steps = functools.partial(run, start, stop)
            yield Chunk(start, stop, seen, steps, batch, None, ends_epoch=stop == self.steps)
            length = max(1, int(CHUNK_SECONDS / (seconds / (stop - start))))
            start = stop

    def _run_steps(
        self, state: TrainState, order: Array, start: int, stop: int, measure: str
    ) -> tuple[TrainState, np.ndarray, np.ndarray]:
        with self._memory_advice(state):
            state, (losses, norms) = compiled_steps(
                state,
                self.data,
                order,
                self.loss_fn,
                start,
                stop,
                batch_size=self.batch_size,
                measure=measure,
            )
            return state, np.asarray(losses)[start:stop], np.asarray(norms)[start:stop]

    def _memory_advice(self, state: TrainState) -> contextlib.AbstractContextManager[None]:
        return memory_advice(self.batch_size, functools.partial(self.lower, state))

    def compile(self, state: TrainState) -> jax.stages.Lowered:
        """Compiles the training steps; returns the lowered program."""
        with self._memory_advice(state):
            lowered = self.trace(state).lower()
            lowered.compile()
            return lowered

    def trace(self, state: TrainState) -> jax.stages.Traced:
        """Traces the training steps, for any part of an epoch."""
        order = jax.ShapeDtypeStruct(
            (len(self.data),),
            jnp.int32,
            sharding=parallel.replicated_like(jax.tree.leaves(self.data)[0]),
        )
        return compiled_steps.trace(
            state,
            self.data,
            order,
            self.loss_fn,
            0,
            self.steps,
            batch_size=self.batch_size,
            measure=self.measure,
        )

    def lower(self, state: TrainState, batch_size: int) -> jax.stages.Lowered:
        """Lowers the training steps at another batch size."""
        return self._replace(batch_size=batch_size).trace(state).lower()

    def abstract(self) -> Resident:
        """Returns a copy with shapes in place of data, to trace programs without their devices."""
        return self._replace(data=to_shapes(self.data))


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

    return parallel.on_auto_axes(run, state, dataset, order, start, stop, like=(state, None))


def to_shapes(tree: Any) -> Any:
    """Returns shapes and dtypes in place of arrays, without their placement."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
