"""Streamed: training data that arrive in batches, read while the device trains."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxtrain import parallel
from jaxtrain._placement import to_numpy
from jaxtrain._processes import agree, are_joined
from jaxtrain.checkpoint import PartOfEpoch
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.training._batches import Batches, Reader
from jaxtrain.training._chunk import Chunk, next_end
from jaxtrain.training._memory import memory_advice
from jaxtrain.training._programs import batch_sums, train_group
from jaxtrain.training._validation import check_limits
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import MetricItems, Metrics, finish_metrics

# The batches of one compiled call, a group, take about this time in seconds, so that calling it
# costs little, and at most this memory in bytes.
_GROUP_SECONDS, _GROUP_BYTES, _LARGEST_GROUP = 0.25, 2**23, 512
_MEASURED_STEPS = 8  # to choose the size of a group
# Bytes at whose multiples an array starts that XLA uses without copying it.
_ALIGNMENT = 64
# Group sizes that were measured, by model, optimizer, loss, shapes and mesh.
_measured: dict[Any, int] = {}
_MOST_MEASURED = 64


class Group(NamedTuple):
    """Consecutive batches, stacked.

    Attributes:
      stacked: the batches on the device, [steps, batch, ...]; there may be more than are used.
      start: the first batch, counted from 0 in the epoch.
      steps: how many batches are used.
      examples: examples of the epoch up to the end of the group, of all processes.
      ends_epoch: whether the last batch ends the epoch.
      position: of the stream after the last batch, or None.
    """

    stacked: Dataset
    start: int
    steps: int
    examples: int
    ends_epoch: bool
    position: Any


class Streamed:
    """Training data that arrive in batches, and how to train on them.

    Attributes:
      batches: the stream.
      batch_size: examples per step, of all processes.
      steps: steps per epoch; 0 if unknown.
      examples: examples per epoch; 0 if unknown.
    """

    def __init__(
        self, batches: Batches, state: TrainState, loss_fn: Loss, measure: str = "none"
    ) -> None:
        self.batches = batches
        self.steps, self.examples = batches.length or 0, batches.examples or 0
        self._loss_fn, self._measure = loss_fn, measure
        self._first = batches.check_model(state, loss_fn, int(state.epoch) + 1)
        self._rows = len(self._first)  # of this process
        self.batch_size = self._rows * batches.processes
        if batches.mesh is not None:
            parallel.check_batch_size(self.batch_size, self.batch_size)
        batches.check_last_batch()
        self._group_size = 1

    def identity(self) -> dict[str, str]:
        """Returns what describes the data and their order, which must agree for a run to resume."""
        return {"training data": repr(self.batches)}

    @contextlib.contextmanager
    def chunks(
        self,
        epoch: int,
        part: PartOfEpoch | None,
        interval: int,
        every_steps: int | None,
        ends: tuple[int, ...] = (),
    ) -> Iterator[Iterator[Chunk]]:
        """Yields the chunks of an epoch, one group of batches each.

        A thread reads the next group while the device trains on the last one.

        Args:
          epoch: the epoch, counted from 1.
          part: the steps that an earlier call has taken, or None.
          interval: steps between two events, at whose multiples a chunk ends; 0 for none.
          every_steps: steps between two checkpoints, the same; None for none. The chunks that end
            there have the position of the stream.
          ends: further steps at which a chunk ends.
        """
        with self.groups(epoch, part, interval, every_steps, ends) as groups:
            yield map(self._chunk, groups)

    @contextlib.contextmanager
    def groups(
        self,
        epoch: int,
        part: PartOfEpoch | None = None,
        interval: int = 0,
        every_steps: int | None = None,
        ends: tuple[int, ...] = (),
    ) -> Iterator[Iterator[Group]]:
        """Yields the groups of an epoch; see `chunks`."""
        start = 0 if part is None else part.step
        reader = self.batches.open(epoch, start, _own_position(part))
        seen = 0 if part is None else part.examples
        found = self._groups(reader, seen, interval, every_steps, ends)
        with _read_ahead(found, reader) as groups:
            yield groups

    def run(
        self, group: Group, state: TrainState, stop: int | None = None, measure: str | None = None
    ) -> tuple[TrainState, tuple[Array, Array, Array]]:
        """Takes the steps of a group, or those before `stop`; returns before they are done."""
        count = group.steps if stop is None else stop - group.start
        return train_group(
            state,
            group.stacked,
            self._loss_fn,
            count,
            group.ends_epoch and stop is None,
            measure=measure or self._measure,
        )

    def _groups(
        self,
        reader: Reader,
        seen: int,
        interval: int,
        every_steps: int | None,
        ends: tuple[int, ...],
    ) -> Iterator[Group]:
        batch, is_first = reader.read(), True
        while batch is not None:
            size, start = len(batch), reader.count - 1
            capacity = self._group_size if size == self._rows else 1
            # The first group is small, so that the training starts soon.
            wanted = max(1, capacity // 8) if is_first else capacity
            end = next_end(start, (interval, every_steps), ends) or start + wanted
            limit, is_first = min(wanted, end - start), False
            leaves, structure = jax.tree.flatten(batch)
            buffers = [_aligned((capacity, *leaf.shape), leaf.dtype) for leaf in leaves]
            count, position = 0, None
            while batch is not None and len(leaves[0]) == size and count < limit:
                for buffer, leaf in zip(buffers, leaves, strict=True):
                    buffer[count] = leaf
                count += 1
                if every_steps is not None and (start + count) % every_steps == 0:
                    position = reader.position()
                batch = reader.read()  # one ahead, to know whether the epoch ends here
                leaves = jax.tree.leaves(batch)
            for buffer in buffers:
                buffer[count:] = 0  # not used; converting arbitrary bytes may warn
            stacked = jax.tree.unflatten(structure, buffers)
            check_limits(_flat(stacked, count), self.batches.limits, self.batches.name)
            seen += count * size * self.batches.processes
            yield Group(self._place(stacked), start, count, seen, batch is None, position)

    def _place(self, buffers: Dataset) -> Dataset:
        """Moves stacked batches to the device, or divides each batch over those of the mesh."""
        mesh = self.batches.mesh
        if mesh is None:
            return jax.device_put(buffers)
        return jax.tree.map(lambda leaf: _divide(leaf, mesh, axis=1), buffers)

    def _chunk(self, group: Group) -> Chunk:
        def run(
            state: TrainState, stop: int | None = None, measure: str | None = None
        ) -> tuple[TrainState, np.ndarray, np.ndarray, np.ndarray]:
            with memory_advice(self.batch_size):
                state, vectors = self.run(group, state, stop, measure)
                count = group.steps if stop is None else stop - group.start
                losses, norms, weights = (np.asarray(vector)[:count] for vector in vectors)
                return state, losses, norms, weights

        def batch(step: int) -> tuple[Dataset, Callable[[int], str]]:
            # On the host: the devices of several processes may each have a part of the batch.
            found = jax.tree.map(lambda leaf: to_numpy(leaf)[step - group.start], group.stacked)
            return found, lambda row: f"row {row} of batch {step + 1}"

        stop = group.start + group.steps
        return Chunk(
            group.start, stop, group.examples, run, batch, group.position, group.ends_epoch
        )

    def compile(self, state: TrainState) -> jax.stages.Lowered:
        """Compiles the training steps; returns the lowered program of one step."""
        self.choose_group_size(state)
        return self.trace(state).lower()

    def choose_group_size(self, state: TrainState) -> None:
        """Takes as many batches per call as `_GROUP_SECONDS` allow, and compiles their program."""
        spec = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self._first))
        mesh = self.batches.mesh
        known = (state.model, state.optimizer, self._loss_fn, self._measure, spec, mesh)
        if known not in _measured:
            if len(_measured) >= _MOST_MEASURED:
                _measured.clear()
            with memory_advice(self.batch_size):
                _measured[known] = self._measure_group_size(state)
                self._run(state, self._stacked(_measured[known]), 0)  # compiles it
        self._group_size = _measured[known]

    def _measure_group_size(self, state: TrainState) -> int:
        group = self._stacked(_MEASURED_STEPS)

        def seconds(count: int) -> float:
            started = time.perf_counter()
            self._run(state, group, count)
            return time.perf_counter() - started

        seconds(0)  # compiles it
        one = min(seconds(1) for _ in range(3))
        per_step = one
        if one < _GROUP_SECONDS:  # without the time of the call itself
            per_step = max(1e-6, (seconds(_MEASURED_STEPS) - one) / (_MEASURED_STEPS - 1))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._first))
        largest = min(_GROUP_SECONDS / per_step, _GROUP_BYTES / size, _LARGEST_GROUP)
        return agree(2 ** int(np.log2(largest)) if largest >= 1 else 1)

    def _run(self, state: TrainState, batches: Dataset, count: int) -> None:
        jax.block_until_ready(
            train_group(state, batches, self._loss_fn, count, False, measure=self._measure)
        )

    def _stacked(self, count: int) -> Dataset:
        """Returns a group of copies of the first batch."""
        return self._place(
            jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), self._first)
        )

    def trace(self, state: TrainState) -> jax.stages.Traced:
        """Traces one training step."""
        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (1, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)
            ),
            self._first,
        )
        return train_group.trace(state, one, self._loss_fn, 1, False, measure=self._measure)

    def abstract(self) -> Streamed:
        """Returns itself: a trace depends on shapes alone."""
        return self


def compile_evaluation(state: TrainState, batches: Batches, metrics: MetricItems) -> None:
    """Compiles the evaluation of a stream, for batches of the size of the first one."""
    jax.block_until_ready(batch_sums(state, _placed(batches.example, batches.mesh), metrics))


def evaluate_batches(
    state: TrainState, batches: Batches, metrics: MetricItems, epoch: int = 1
) -> Metrics:
    """Returns the mean loss and the metrics of a stream, with the model in evaluation mode."""
    reader = batches.open(epoch)

    def placed() -> Iterator[tuple[int, Dataset]]:
        while (batch := reader.read()) is not None:
            check_limits(batch, batches.limits, batches.name)
            # A copy: the stream may fill the same arrays again while the device still reads them.
            copied = jax.tree.map(np.array, batch)
            yield len(batch), _placed(copied, batches.mesh)

    sums, examples = None, 0
    with _read_ahead(placed(), reader) as ahead:
        for count, batch in ahead:
            found = batch_sums(state, batch, metrics)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
            examples += count
    assert sums is not None  # the reader refuses an empty epoch
    return finish_metrics(sums, metrics, examples * batches.processes)


def _placed(batch: Dataset, mesh: jax.sharding.Mesh | None) -> Dataset:
    """Moves a batch to the device, or divides it over those of a mesh."""
    if mesh is None:
        return jax.device_put(batch)
    return jax.tree.map(lambda leaf: _divide(leaf, mesh), batch)


def _own_position(part: PartOfEpoch | None) -> Any:
    """Returns the position of this process in its stream.

    Raises:
      InputError: the checkpoint was written by another number of processes.
    """
    if part is None or part.positions is None:
        return None
    processes = jax.process_count() if are_joined() else 1
    if len(part.positions) != processes:
        raise InputError(
            f"the checkpoint after step {part.step} of an epoch was written by "
            f"{len(part.positions)} processes, and this run has {processes}; expected "
            f"{len(part.positions)}: start as many, or delete the checkpoint to resume from the "
            "previous one"
        )
    return json.loads(part.positions[jax.process_index() if processes > 1 else 0])


def _divide(array: np.ndarray, mesh: jax.sharding.Mesh, axis: int = 0) -> Array:
    """Divides a batch over the devices of a mesh; undivided if its size is not a multiple."""
    processes = jax.process_count() if mesh.is_multi_process else 1
    is_divisible = array.shape[axis] % (mesh.shape[parallel.AXIS] // processes) == 0
    spec = P(*[None] * axis, parallel.AXIS) if is_divisible else P()
    return jax.make_array_from_process_local_data(
        NamedSharding(mesh, spec), np.ascontiguousarray(array)
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array that JAX uses on a CPU without copying it."""
    size = math.prod(shape) * dtype.itemsize
    content = np.empty(size + _ALIGNMENT, np.uint8)
    start = -content.ctypes.data % _ALIGNMENT
    return content[start : start + size].view(dtype).reshape(shape)


def _flat(batches: Dataset, count: int) -> Dataset:
    """Returns stacked batches as one, [examples, ...]."""
    return jax.tree.map(lambda leaf: leaf[:count].reshape(-1, *leaf.shape[2:]), batches)


@contextlib.contextmanager
def _read_ahead(items: Iterator[Any], reader: Reader) -> Iterator[Iterator[Any]]:
    """Yields an iterator over the same items, which a thread reads one item ahead."""
    done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                done.put((item, error), timeout=0.1)
                return

    def read() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)
        finally:
            reader.close()

    def received() -> Iterator[Any]:
        while True:
            item, error = done.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    # A daemon thread: it must not keep the process alive if a source never returns.
    thread = threading.Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        yield received()
    finally:
        closed.set()
        thread.join(timeout=1.0)  # not longer: a source may never return
