"""Batches: a stream, epoch by epoch, with each batch checked against the first."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtrain import parallel
from jaxtrain._processes import are_joined
from jaxtrain.data.stream import Source, Stream, is_on_disk, stream, to_batch
from jaxtrain.dataset import Dataset, check_dataset
from jaxtrain.errors import InputError, StreamError
from jaxtrain.losses import Loss
from jaxtrain.training._validation import (
    TargetLimits,
    check_limits,
    check_model_inputs,
    target_limits,
)
from jaxtrain.training.state import TrainState

_END = object()


def is_stream(data: Any) -> bool:
    """Returns whether data arrive in batches or are on disk, unlike a `Dataset` in memory."""
    if isinstance(data, Dataset):
        return is_on_disk(data)
    if isinstance(data, tuple | str | bytes | Mapping | np.ndarray | jax.Array):
        return False  # arrays, or a pair of them, that should be in a Dataset
    return isinstance(data, Iterable | Source)


class Batches:
    """A stream of batches, epoch by epoch.

    Attributes:
      name: what the stream is to the user, such as "train_data".
      length: batches per epoch, or None if unknown.
      examples: examples per epoch, of all processes, or None if unknown.
      limits: the targets that the loss takes, or None for any; known after `check_model`.
      has_position: whether it can resume within an epoch; known after `first`.
      mesh: the devices over which each batch is divided, or None.
      processes: how many processes each read a part of every batch.
      example: the first batch; known after `first`.
    """

    def __init__(
        self, data: Any, name: str, batch_size: int = 64, key: Key[Array, ""] | None = None
    ) -> None:
        """Accepts what `fit` accepts as a stream.

        Args:
          data: an iterable of batches, or a random-access source of examples.
          name: what it is to the user.
          batch_size: examples per batch, of a random-access source.
          key: PRNG key of the shuffle, of a random-access source.

        Raises:
          InputError: the stream never ends, or has an order of its own and a key is given.
        """
        is_examples = not isinstance(data, Iterable) or hasattr(data, "__getitems__")
        is_examples &= isinstance(data, Source) and not isinstance(data, Stream)
        self._is_source = is_examples or is_on_disk(data)
        if self._is_source:
            data = stream(data, batch_size, key)
        elif key is not None:
            raise InputError(
                f"key is given, but {name} is a {type(data).__name__}, which decides the order of "
                "its batches; expected key=None: pass the key to jaxtrain.data.stream",
                argument="key",
            )
        self.name = name
        self.mesh = parallel.current_mesh()
        self.processes = jax.process_count() if are_joined() else 1
        if isinstance(data, Stream) and data.shard[1] != self.processes:
            raise InputError(
                f"{name} reads the part of process {data.shard[0]} of {data.shard[1]}, but the "
                f"training has {self.processes}, by its mesh; expected as many: a mesh of the "
                f"devices of all processes, or a stream with shard=(index, {self.processes})"
            )
        self.length = _length(data, name)
        self.examples = data.examples if isinstance(data, Stream) else None
        self._data = data
        self.has_position = False
        self.limits: TargetLimits | None = None
        self._one_shot = data if isinstance(data, Iterator) else None
        self._peeked: Reader | None = None
        self._spec: Any = None
        self.example: Any = None

    def __repr__(self) -> str:
        if isinstance(self._data, Stream):
            return repr(self._data)
        return f"{type(self._data).__name__} of {self.length or 'unknown'} batches"

    def same_each_epoch(self) -> Batches:
        """Orders a source's examples as `train_epoch` orders data in memory; returns itself."""
        if self._is_source:
            self._data = self._data.same_each_epoch()
        return self

    def first(self, epoch: int) -> Dataset:
        """Returns the first batch of an epoch, which `open` will return again."""
        self._peeked = Reader(self, epoch, self._iterator(epoch), 0)
        self.has_position = self._peeked.position() is not None
        return self._peeked.peek()

    def check_model(self, state: TrainState, loss_fn: Loss, epoch: int) -> Dataset:
        """Returns the first batch, checked against the model and the loss."""
        first = self.first(epoch)
        check_model_inputs(state, first, self.name)
        self.limits = target_limits(state, first, loss_fn)
        check_limits(first, self.limits, self.name)
        return first

    def check_last_batch(self) -> None:
        """Raises InputError if the last batch cannot be divided over several processes."""
        data, mesh = self._data, self.mesh
        if not isinstance(data, Stream) or mesh is None or self.processes == 1:
            return
        rows = data.examples % data.batch_size // self.processes
        devices = mesh.shape[parallel.AXIS] // self.processes
        if rows % devices:
            raise InputError(
                f"the last batch of {self.name} has {rows} examples on each process, for its "
                f"{devices} devices; expected a multiple of {devices}: pass drop_last=True to "
                "jaxtrain.data.stream"
            )

    def close(self) -> None:
        """Closes what `first` has opened, unless `open` has returned it."""
        if self._peeked is not None and self._one_shot is None:
            self._peeked.close()
            self._peeked = None

    def open(self, epoch: int, start: int = 0, position: Any = None) -> Reader:
        """Returns a reader of an epoch.

        Args:
          epoch: the epoch, counted from 1.
          start: number of batches that an earlier run has read.
          position: the position of the stream after these, or None.
        """
        peeked, self._peeked = self._peeked, None
        is_same = peeked is not None and (peeked.epoch == epoch or self._one_shot is not None)
        if peeked is not None and is_same and position is None:
            peeked.epoch = epoch
            return peeked
        if peeked is not None:
            peeked.close()
        iterator = self._iterator(epoch)
        if position is not None:
            iterator.set_state(_from_json(position))
        return Reader(self, epoch, iterator, start)

    def _iterator(self, epoch: int) -> Any:
        if self._one_shot is not None:
            return self._one_shot
        try:
            return self._data.epoch(epoch) if isinstance(self._data, Stream) else iter(self._data)
        except InputError:
            raise
        except Exception as error:
            raise StreamError(self.name, epoch, 1, error) from error

    def check(self, batch: Dataset, name: str) -> None:
        """Raises InputError unless a batch has the shapes and dtypes of the first one."""
        leaves, structure = jax.tree.flatten(batch)
        spec = structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        if self.example is None:
            check_dataset(batch, name)
            self._spec, self.example = spec, batch
        length = len(leaves[0]) if leaves and leaves[0].ndim else 0
        largest = len(self.example)
        if (
            spec != self._spec
            or any(x.shape[:1] != (length,) for x in leaves)
            or not 0 < length <= largest
        ):
            raise InputError(
                f"{name} is {batch!r}; expected the shapes and dtypes of the first batch, "
                f"{self.example!r}, and at most {len(self.example)} examples"
            )


class Reader:
    """The batches of one epoch.

    Attributes:
      epoch: the epoch, counted from 1.
      count: batches read so far in this epoch.
    """

    def __init__(self, batches: Batches, epoch: int, iterator: Any, start: int) -> None:
        self.epoch, self.count = epoch, start
        self._batches, self._iterator = batches, iterator
        self._next: Dataset | None = None

    def peek(self) -> Dataset:
        """Returns the next batch, which `read` will return again."""
        batch = self.read()
        assert batch is not None  # an empty epoch is an error
        self.count, self._next = self.count - 1, batch
        return batch

    def read(self) -> Dataset | None:
        """Returns the next batch, or None at the end of the epoch.

        Raises:
          InputError: the batch differs from the first one, or the epoch has another number of
            batches than the stream has told.
          StreamError: the stream raised an error.
        """
        if self._next is not None:
            batch, self._next, self.count = self._next, None, self.count + 1
            return batch
        name, length = self._batches.name, self._batches.length
        try:
            found = next(self._iterator, _END)
        except InputError:
            raise
        except Exception as error:
            raise StreamError(name, self.epoch, self.count + 1, error) from error
        if found is _END:
            self._check_end(name, length)
            return None
        if length is not None and self.count >= length:
            raise InputError(
                f"{name} has more than {length} batches in epoch {self.epoch}; expected {length}, "
                "its len()"
            )
        self.count += 1
        batch_name = f"batch {self.count} of {name}"
        batch = to_batch(found, batch_name)
        self._batches.check(batch, batch_name)
        return batch

    def _check_end(self, name: str, length: int | None) -> None:
        if self.count == 0:
            raise InputError(
                f"{name} has no batches in epoch {self.epoch}; expected an iterable that starts "
                "again in each epoch, such as a list, a DataLoader or jaxtrain.data.stream, but "
                "not a generator"
            )
        if length is not None and self.count < length:
            raise InputError(
                f"{name} ended after {self.count} batches in epoch {self.epoch}; expected "
                f"{length}, its len()"
            )

    def position(self) -> Any:
        """Returns the position of the stream, JSON-serializable; None if it cannot tell."""
        return _to_json(self._iterator)

    def close(self) -> None:
        """Ends the workers of the stream."""
        if self._batches._one_shot is None and hasattr(self._iterator, "close"):
            self._iterator.close()


def _length(data: Any, name: str) -> int | None:
    try:
        length = len(data)
    except (TypeError, NotImplementedError):
        return None
    except OverflowError:
        length = sys.maxsize
    if length >= sys.maxsize:
        raise InputError(
            f"{name} is a {type(data).__name__} that never ends; expected one epoch of batches: "
            "leave out its repeat()"
        )
    return length


def _to_json(iterator: Any) -> Any:
    """Returns the position of an iterator of Grain, or None of any other."""
    if not (hasattr(iterator, "get_state") and hasattr(iterator, "set_state")):
        return None
    state = iterator.get_state()
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        return {"json": json.loads(json.dumps(state))}
    except (TypeError, ValueError):
        return None


def _from_json(position: dict[str, Any]) -> Any:
    return base64.b64decode(position["bytes"]) if "bytes" in position else position["json"]
