"""Data sources, which yield an epoch as segments for the compiled loops."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, no_type_check

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from jaxtrain import parallel
from jaxtrain._processes import are_joined, check_same
from jaxtrain.checkpoint import digest
from jaxtrain.data.batches import Batches, Epoch, is_stream, read_ahead
from jaxtrain.data.stream import Stream
from jaxtrain.dataset import Dataset, as_dataset, epoch_order, map_examples
from jaxtrain.errors import InputError
from jaxtrain.training.checks import (
    TargetLimits,
    check_batches,
    check_total_weight,
    checked_data,
)

# A segment of a stream has at most this memory in bytes and this many steps. It ends early after
# this many seconds of reading, so that training does not wait for a slow stream.
_SEGMENT_BYTES, _SEGMENT_STEPS, _SEGMENT_SECONDS = 2**23, 512, 1.0
# Bytes at whose multiples an array starts that XLA uses without copying it.
_ALIGNMENT = 64
Segments = Generator["Segment", None, None]


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive steps of an epoch whose data are on the device; a pytree.

    Attributes:
      data: all examples of a data set in memory, [examples, ...]; or, without `order`, consecutive
        batches, [parts, steps · batch / parts, ...], of which there may be more than are used. Each
        device of a mesh stores one part, with its examples of every batch.
      order: the examples of the steps, [steps · batch]; None if `data` are batches.
      last: index in this segment of the epoch's last step; -1 if that is in another segment.
      batch_size: examples per step (static).
      start: the epoch's step that is the first of this segment, counted from 0.
      steps: number of steps.
      position: a position for `Batches.open`, at or before `start`; None if there is none.

    `start`, `steps` and `position` have their defaults inside `jax.jit`, which receives `first` and
    `stop` instead.
    """

    data: Dataset
    order: Int[Array, "examples"] | None
    last: Any
    batch_size: int
    start: int = 0
    steps: int = 0
    position: Any = None

    def batch(self, index: Any) -> Dataset:
        """Returns the batch of a step, counted from 0 in the segment."""
        if self.order is not None:
            rows = lax.dynamic_slice_in_dim(self.order, index * self.batch_size, self.batch_size)
            return self.data.take(rows)

        def take(leaf: Array) -> Array:
            size = self.batch_size // len(leaf)
            rows = lax.dynamic_slice_in_dim(leaf, index * size, size, axis=1)
            return rows.reshape(self.batch_size, *leaf.shape[2:])

        return map_examples(take, self.data)

    @property
    def capacity(self) -> int:
        """The number of batches in `data`, at least `steps`."""
        if self.order is not None:
            return len(self.order) // self.batch_size
        parts, examples = jax.tree.leaves(self.data)[0].shape[:2]
        return parts * examples // self.batch_size


jax.tree_util.register_dataclass(
    Segment,
    data_fields=("data", "order", "last"),
    meta_fields=("batch_size",),
    drop_fields=("start", "steps", "position"),
)


def segments_in_order(
    dataset: Dataset, order: Int[Array, "examples"], batch_size: int
) -> list[Segment]:
    """Returns an epoch of a data set in memory: one segment, and one for a partial last batch."""
    examples = len(dataset)
    batch_size = min(batch_size, examples)
    steps, rest = divmod(examples, batch_size)
    if dataset.drop_last or not rest:
        order = order[: steps * batch_size]
        return [Segment(dataset, order, steps - 1, batch_size, 0, steps)]
    return [
        Segment(dataset, order[:-rest], -1, batch_size, 0, steps),
        Segment(dataset, order[-rest:], 0, rest, steps, 1),
    ]


class InMemory:
    """A data set in the memory of the device.

    Attributes:
      name: name used in error messages.
      sample: the examples.
      batch_size: examples per step.
      steps: steps per epoch.
      examples: examples per epoch.
      is_seekable: whether a run can resume within an epoch.
    """

    is_seekable = True
    limits: TargetLimits | None = None  # all values are checked before training

    def __init__(self, data: Dataset, name: str, batch_size: int, key: Key[Array, ""] | None):
        self.name, self.sample, self._key, self._requested = name, data, key, batch_size
        self.batch_size = min(batch_size, len(data))
        rest = len(data) % self.batch_size
        self.examples = len(data) - (rest if data.drop_last else 0)
        self.steps = -(-self.examples // self.batch_size)

    def segments(
        self, epoch: int, skip: int = 0, position: Any = None, limit: int | None = None
    ) -> Segments:
        """Yields the segments of an epoch that have steps after the first `skip`."""
        del position, limit  # which only streams need
        order = self._order(epoch)
        for segment in segments_in_order(self.sample, order, self.batch_size):
            if segment.start + segment.steps > skip:
                yield segment

    def _order(self, epoch: int) -> Array:
        key = None if self._key is None else jax.random.fold_in(self._key, epoch)
        order = epoch_order(len(self.sample), key)
        mesh = parallel.current_mesh()
        return order if mesh is None else parallel.replicate(order, mesh)

    def check_division(self) -> None:
        """Raises InputError if there is no complete batch, or the devices do not divide them."""
        if self.sample.drop_last and self._requested > len(self.sample):
            raise InputError(
                f"{self.name} has {len(self.sample)} examples for batches of {self._requested}, "
                "and drop_last is True; expected at least one complete batch: use a smaller "
                "batch_size"
            )
        parallel.check_batch_size(self.batch_size, self.examples)

    def batch_shapes(self) -> Dataset:
        """Returns the shapes and dtypes of a batch."""
        return _shapes(self.sample, self.batch_size)

    def describe(self) -> str:
        """Returns what must be the same for a run to resume: the data and their order."""
        order = self.describe_order()
        return f"{len(self.sample)} examples with the digest {digest(self.sample)}, {order}"

    def describe_reading(self, opaque: set[str]) -> str:
        """Returns an empty string, since `describe` covers the values."""
        del opaque  # which streams fill
        return ""

    def describe_order(self) -> str:
        """Returns what decides the batches besides the values of the data."""
        order = "as stored" if self._key is None else f"shuffled by key {digest(self._key)}"
        return order + (", without a partial last batch" if self.sample.drop_last else "")


class Streamed(Batches):
    """A stream of batches, which a thread reads and stacks while the device trains.

    Attributes:
      sample: the first batch, of this process.
      batch_size: examples per step, of all processes.
      limits: the values that the loss takes as targets; each batch is checked.
      accepts: called with the first batch of each other shape and its name; raises InputError if
        the model does not take it.
    """

    limits: TargetLimits | None = None
    accepts: Callable[[Dataset, str], Any] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        """Reads the first batch; see `Batches`."""
        super().__init__(*args, **options)
        self._mesh = parallel.current_mesh()
        self._processes = jax.process_count() if are_joined() else 1
        self.batch_size = len(self.sample) * self._processes
        shape = {} if self._mesh is None else self._mesh.shape
        self._devices = shape.get(parallel.AXIS, 1) // self._processes  # of this process
        self._accepted = {_shape(self.sample)}
        data, processes = self.data, self._processes
        if isinstance(data, Stream) and data.shard[1] != processes:
            self.close()
            raise InputError(
                f"{self.name} reads the part of process {data.shard[0]} of {data.shard[1]}, but "
                f"the training has {processes}, by its mesh; expected as many: a mesh of the "
                f"devices of all processes, or a stream with shard=(index, {processes})"
            )

    def check_division(self) -> None:
        """Raises InputError if the devices of the mesh do not divide the batches."""
        if self._mesh is None:
            return
        parallel.check_batch_size(self.batch_size, self.batch_size)
        data, processes = self.data, self._processes
        if isinstance(data, Stream) and processes > 1:
            rows, devices = data.examples % data.batch_size // processes, self._devices
            if rows % devices:
                raise InputError(
                    f"the last batch of {self.name} has {rows} examples on each process, for its "
                    f"{devices} devices; expected a multiple of {devices}: pass drop_last=True to "
                    "jaxtrain.data.stream"
                )

    def batch_shapes(self) -> Dataset:
        """Returns the shapes and dtypes of a batch of all processes."""
        return _shapes(self.sample, self.batch_size)

    def describe(self) -> str:
        """Returns what must be the same for a run to resume."""
        return repr(self)

    describe_order = describe

    def segments(
        self, epoch: int, skip: int = 0, position: Any = None, limit: int | None = None
    ) -> Segments:
        """Yields the segments of an epoch after its first `skip` steps.

        `position` is what an earlier run recorded for these steps, or None; and `limit` the step
        of the epoch after which nothing is read.
        """
        opened = self.open(epoch, skip, position, limit)
        with read_ahead(self._stacked(opened), opened.close) as segments:
            if self._processes == 1:
                yield from segments
                return
            for segment in itertools.chain(segments, [None]):
                self._check_same(segment, epoch)
                if segment is not None:
                    yield segment

    def _check_same(self, segment: Segment | None, epoch: int) -> None:
        """Raises InputError unless all processes have read batches of the same shapes."""

        def describe() -> dict[str, str]:
            name = f"what follows in {self.name} in epoch {epoch}"
            if segment is None:
                return {name: "nothing"}
            first, last = segment.start + 1, segment.start + segment.steps
            shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(segment.data))
            size = segment.batch_size
            return {name: f"batches {first} to {last} of {size} examples in {shapes}"}

        check_same(describe, "batches of the same number and shapes in every process")

    def _stacked(self, epoch: Epoch) -> Iterator[Segment]:
        """Yields segments of consecutive batches of the same shapes; runs in the reading thread."""
        # The batches that are skipped, or those of another process, may have one.
        has_weight = epoch.count > 0 or self._processes > 1
        position, batch = epoch.position(), epoch.read()
        while batch is not None:
            shape, size, start = _shape(batch), len(batch), epoch.count - 1
            if self.accepts is not None and shape not in self._accepted:
                self.accepts(batch, f"batch {start + 1} of {self.name}")
                self._accepted.add(shape)
            parts = self._devices if size % self._devices == 0 else 1
            if parts == 1 < self._devices and self._processes > 1:
                raise InputError(
                    f"batch {start + 1} of {self.name} has {size} examples on each process, for "
                    f"its {self._devices} devices; expected a multiple of {self._devices}"
                )
            leaves, structure = jax.tree.flatten(batch)
            # A smaller batch, such as a partial last one, is a segment of its own; so that each
            # shape has one program, all batches are if the examples differ in shape.
            is_usual = size >= len(self.sample) and len(self.shapes) == 1
            capacity = self._capacity(leaves) if is_usual else 1
            shapes = [(parts, capacity, size // parts, *leaf.shape[1:]) for leaf in leaves]
            buffers = [_aligned(s, leaf.dtype) for s, leaf in zip(shapes, leaves, strict=True)]
            next_position, count, started = position, 0, time.monotonic()
            is_full = False
            while batch is not None and _shape(batch) == shape and not is_full:
                for buffer, leaf in zip(buffers, jax.tree.leaves(batch), strict=True):
                    buffer[:, count] = leaf.reshape(parts, -1, *leaf.shape[1:])
                count += 1
                # Several processes must read the same number of batches, however long it takes.
                is_late = time.monotonic() - started > _SEGMENT_SECONDS and self._processes == 1
                is_full = is_late or count == capacity
                if is_full:
                    next_position = epoch.position()
                batch = epoch.read()  # one ahead, to know whether the epoch ends here
            for buffer in buffers:
                buffer[:, count:] = 0  # not used; converting arbitrary bytes may warn
            stacked = jax.tree.unflatten(structure, buffers)
            has_weight |= check_batches(stacked, count, self.name, start, self.limits)
            if batch is None and not has_weight:
                raise InputError(
                    f"{self.name}.weights is 0 in all batches of epoch {epoch.epoch}; expected "
                    "some weights above 0"
                )
            last = count - 1 if batch is None else -1
            placed = jax.tree.map(self._place, stacked)
            yield Segment(placed, None, last, size * self._processes, start, count, position)
            position = next_position

    def _capacity(self, leaves: list[np.ndarray]) -> int:
        size = sum(leaf.nbytes for leaf in leaves)
        most = min(_SEGMENT_STEPS, _SEGMENT_BYTES // max(1, size))
        return max(1, min(most, self.steps or most))

    def _place(self, buffer: np.ndarray) -> Array:
        """Moves batches, [parts, steps, batch / parts, ...], to the devices."""
        parts, _, _, *shape = buffer.shape
        flat = buffer.reshape(parts, -1, *shape)
        if self._mesh is None:
            return jax.device_put(flat)
        is_divided = parts == self._devices and parallel.AXIS in self._mesh.axis_names
        spec = P(parallel.AXIS) if is_divided else P()
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, spec), flat)


class Repeated:
    """A source whose passes over the data are joined and divided into epochs of equal length.

    The order of pass p is that of epoch p of the source. Where the number of steps per pass is
    known, the step of the state determines the pass, so a run may be divided into several calls.

    Attributes:
      name: name used in error messages.
      sample: the examples, or the first batch of a stream.
      batch_size: examples per step.
      steps: steps per epoch.
      examples: examples per epoch; 0 if unknown.
      is_seekable: whether a run can resume within an epoch.
    """

    def __init__(self, source: InMemory | Streamed, steps: int, epochs: int, state: Any) -> None:
        """Divides a source for a run from a state, of `epochs` epochs of `steps` steps."""
        self._source = source
        self._first_step, self._first_epoch = int(state.step), int(state.epoch)
        self._last_step = self._first_step + epochs * steps
        self.name, self.sample, self.steps = source.name, source.sample, steps
        self.batch_size, self.is_seekable = source.batch_size, source.is_seekable
        has_equal_batches = 0 < source.examples == source.steps * source.batch_size
        self.examples = steps * source.batch_size if has_equal_batches else 0
        self._passes: Generator[tuple[int, Segment], None, None] | None = None
        self._unfinished: tuple[int, Segment] | None = None  # its last steps are not yet yielded

    def segments(self, epoch: int, skip: int = 0, position: Any = None) -> Segments:
        """Yields the segments of an epoch after its first `skip` steps, one epoch after another.

        A segment that an epoch shares with the one before it has a negative `start`.
        """
        begun = self._first_step + (epoch - 1 - self._first_epoch) * self.steps
        if self._passes is None:
            self._passes = self._joined(begun + skip, position)
        while skip < self.steps:
            step, segment = self._unfinished or next(self._passes)
            start, steps = step - begun, min(segment.steps, begun + self.steps - step)
            self._unfinished = (step, segment) if steps < segment.steps else None
            # Steps accumulate gradients across epochs and passes, so none is the last.
            yield dataclasses.replace(segment, last=-1, start=start, steps=steps)
            skip = start + steps

    def _joined(
        self, step: int, position: dict[str, Any] | None
    ) -> Generator[tuple[int, Segment], None, None]:
        """Yields the segments from a step of the run on, each with the step at which it starts."""
        if position is not None:
            number, begun = position["pass"], position["begun"]
        elif length := self._source.steps:
            number, begun = step // length + 1, step // length * length
        else:  # read again from the first batch of the run
            number, begun = 1, self._first_step
        while begun < self._last_step:
            # Without a length or a position, a pass may have fewer steps than are to be skipped.
            skip = max(0, step - begun) if position is not None or self._source.steps else 0
            inner = None if position is None else position["of_source"]
            limit, end = self._last_step - begun, begun
            with contextlib.closing(self._source.segments(number, skip, inner, limit)) as segments:
                for segment in segments:
                    end = begun + segment.start + segment.steps
                    if segment.position is not None:
                        found = {"pass": number, "begun": begun, "of_source": segment.position}
                        segment = dataclasses.replace(segment, position=found)
                    if end > step:
                        yield begun + segment.start, segment
            number, begun, position = number + 1, end, None

    def batch_shapes(self) -> Dataset:
        """Returns the shapes and dtypes of a batch."""
        return self._source.batch_shapes()

    def describe(self) -> str:
        """Returns what must be the same for a run to resume."""
        return f"{self._source.describe()}, in epochs of {self.steps} steps"

    def describe_reading(self, opaque: set[str]) -> str:
        """Returns what reads the source."""
        return self._source.describe_reading(opaque)

    def close(self) -> None:
        """Ends the reading of the source."""
        if self._passes is not None:
            self._passes.close()


AnySource = InMemory | Streamed | Repeated


def make_source(
    data: Any,
    name: str,
    batch_size: int,
    key: Key[Array, ""] | None,
    epoch: int,
    stack: contextlib.ExitStack,
    *,
    once: bool = False,
) -> InMemory | Streamed:
    """Returns a data set or a stream as a source; `stack` closes the stream.

    For `once`, without further epochs, a data set stays where it is and only its weights are
    checked, and a source of examples is shuffled by `key` itself.
    """
    if is_stream(data):
        source = Streamed(data, name, batch_size, key, epoch, same_each_epoch=once)
        stack.callback(source.close)
        return source
    if not once:
        return InMemory(checked_data(data, name), name, batch_size, key)
    data = as_dataset(data, name)
    check_total_weight(data.weights, name)
    return InMemory(data, name, batch_size, key)


def _shape(batch: Dataset) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def _shapes(examples: Dataset, batch_size: int) -> Dataset:
    def shape(leaf: Any, *lead: int) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct((*lead, *leaf.shape[len(lead) :]), dtype)

    shapes = map_examples(lambda leaf: shape(leaf, batch_size), examples)
    return shapes.replace(shared=jax.tree.map(shape, examples.shared))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array that JAX uses on a CPU without copying it."""
    size = math.prod(shape) * dtype.itemsize
    content = np.empty(size + _ALIGNMENT, np.uint8)
    start = -content.ctypes.data % _ALIGNMENT
    return content[start : start + size].view(dtype).reshape(shape)
