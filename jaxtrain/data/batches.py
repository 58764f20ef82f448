"""Batches: any stream of batches, epoch by epoch, each batch checked against the first."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtrain.checkpoint import digest_function
from jaxtrain.data.stream import Source, Stream, is_on_disk, stream, to_batch
from jaxtrain.dataset import Dataset, check_dataset
from jaxtrain.errors import InputError, StreamError, first_line

_END = object()
# A stream without a length that has yielded so many batches in one epoch may never end.
_MANY_BATCHES = 10_000
# Each shape of a batch has a compiled program of its own.
_MAX_SHAPES = 8


def is_stream(data: Any) -> bool:
    """Returns whether data arrive in batches or are on disk, unlike a `Dataset` in memory."""
    if isinstance(data, Dataset):
        return is_on_disk(data)
    if isinstance(data, tuple | str | bytes | Mapping | np.ndarray | jax.Array):
        return False  # a tuple (inputs, targets), or arrays that should be in one
    return isinstance(data, Iterable | Source)


class Batches:
    """A stream of batches, of which each process of several reads its part.

    A `jt.data.stream` resumes at any batch of an epoch. An iterator of Grain resumes at a position,
    {"batches": count, "state": ...}; the batches between it and where the run resumes are read
    again. Other iterables resume at the start of an epoch.

    Attributes:
      name: name used in error messages.
      data: the iterable.
      sample: the first batch, to which the others are compared.
      steps: batches per epoch; 0 if unknown.
      examples: examples per epoch, of all processes; 0 if unknown.
      is_one_shot: whether the data are an iterator, which is read once; other iterables start again
        in each epoch.
      is_seekable: whether a run can resume within an epoch.
      is_endless: whether the batches never end, as far as their `len()` tells.
      shapes: the shapes of the examples so far.
      sizes: the numbers of examples of the batches so far.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        batch_size: int,
        key: Key[Array, ""] | None = None,
        epoch: int = 1,
        *,
        same_each_epoch: bool = False,
    ) -> None:
        """Accepts what `fit` accepts as a stream, and reads its first batch.

        Args:
          data: an iterable of batches, or a random-access source of examples.
          name: name used in error messages.
          batch_size: examples per batch, of a random-access source.
          key: PRNG key of the shuffle, of a random-access source.
          epoch: the epoch whose first batch is read; `open` does not read it again.
          same_each_epoch: order the examples of a source as `train_epoch` does in memory.

        Raises:
          InputError: the stream has an order of its own and a key is given.
          StreamError: the stream raised an error.
        """
        is_source = not isinstance(data, Iterable) or hasattr(data, "__getitems__")
        is_source &= isinstance(data, Source) and not isinstance(data, Stream)
        if is_source or is_on_disk(data):
            data = stream(data, batch_size, key)
            data = data.same_each_epoch() if same_each_epoch else data
        elif key is not None:
            raise InputError(
                f"key is given, but {name} is a {type(data).__name__}, which decides the order of "
                "its batches; expected key=None: pass the key to jaxtrain.data.stream",
                argument="key",
            )
        self.name, self.data = name, data
        self.sample: Any = None
        self.shapes, self.sizes = set[Any](), set[int]()
        length = _length(data)
        self.is_endless = length is not None and length >= sys.maxsize
        self.steps = 0 if self.is_endless else length or 0
        self.examples = data.examples if isinstance(data, Stream) else 0
        self.is_one_shot = isinstance(data, Iterator)
        self._peeked: Epoch | None = None
        self._peeked = self.open(epoch)
        self.is_seekable = isinstance(data, Stream) or self._peeked.position() is not None
        try:
            self.sample = self._peeked.peek()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        if isinstance(self.data, Stream):
            return repr(self.data)
        return f"{type(self.data).__name__} of {self.steps or 'unknown'} batches"

    def describe_reading(self, opaque: set[str]) -> str:
        """Returns what decides the batches, by its code and values, or "" without positions.

        `opaque` receives the types of values that cannot be compared.
        """
        if not self.is_seekable:
            return ""
        reads = self.data._reads() if isinstance(self.data, Stream) else self.data
        return f"{type(self.data).__name__} {digest_function(reads, opaque)}"

    def open(
        self, epoch: int, skip: int = 0, position: Any = None, limit: int | None = None
    ) -> Epoch:
        """Returns the batches of an epoch after its first `skip`.

        Args:
          epoch: the epoch, counted from 1.
          skip: batches that an earlier run has read.
          position: a position that the earlier run recorded at or before these, or None.
          limit: the number of batches, counted with `skip`, after which nothing is read.

        Raises:
          InputError: the batches never end, and there is no limit.
          StreamError: the stream raised an error.
        """
        if limit is None and self.sample is not None:
            self.check_ends()
        peeked, self._peeked = self._peeked, None
        if peeked is not None:
            if skip == 0 and (peeked.epoch == epoch or self.is_one_shot):
                peeked.epoch, peeked.limit = epoch, limit
                return peeked
            peeked.close()
        count = skip
        try:
            if isinstance(self.data, Stream):
                iterator: Any = self.data.epoch(epoch, start=skip)
            else:
                iterator = self.data if self.is_one_shot else iter(self.data)
                if position is not None:
                    self._restore(iterator, position, epoch)
                    count = position["batches"]
        except InputError:
            raise
        except Exception as error:
            raise StreamError(self.name, epoch, 1, error, _unit(limit)) from error
        opened = Epoch(self, epoch, iterator, count, limit)
        while opened.count < skip:
            if opened.read() is None:
                opened.close()
                raise InputError(
                    f"{self.name} has {opened.count} batches in {_unit(limit)} {epoch}; expected "
                    f"more than {skip}, after which the run resumes"
                )
        return opened

    def _restore(self, iterator: Any, position: Any, epoch: int) -> None:
        """Moves an iterator to a position.

        Raises:
          InputError: the iterator does not take the position.
        """
        try:
            iterator.set_state(_from_json(position["state"]))
        except Exception as error:
            raise InputError(
                f"the checkpoint has a position in epoch {epoch} that {self.name} does not take "
                f"({type(error).__name__}: {first_line(error)}); "
                "expected an iterator with the same transformations and number of workers: or "
                "delete the checkpoint to resume from the previous one, such as that of the "
                "epoch's start"
            ) from error

    def check_ends(self, epochs: int = 1) -> None:
        """Raises InputError if the batches never end, or can be read once and are needed again."""
        if self.is_endless:
            raise InputError(
                f"{self.name} is a {type(self.data).__name__} that never ends; expected one epoch "
                "of batches: leave out its repeat(), or, for the training data of fit, pass "
                "steps=..."
            )
        if epochs > 1 and isinstance(self.data, types.GeneratorType):
            by_count = ", or steps=... if it does not end" if self.name == "train" else ""
            raise InputError(
                f"{self.name} is a generator, which is read once, and there are {epochs} epochs; "
                "expected an iterable that starts again in each epoch, such as a list, a "
                f"DataLoader or jaxtrain.data.stream{by_count}",
                argument=self.name,
            )

    def close(self) -> None:
        """Closes the epoch that was opened for the first batch, if it is not in use."""
        if self._peeked is not None and not self.is_one_shot:
            self._peeked.close()
            self._peeked = None


class Epoch:
    """The batches of one epoch of a stream, each checked against the first of the stream.

    Attributes:
      epoch: the epoch, counted from 1.
      count: batches read so far in this epoch.
      limit: the number of batches after which nothing is read, or None.
    """

    def __init__(
        self,
        batches: Batches,
        epoch: int,
        iterator: Any,
        count: int,
        limit: int | None = None,
    ) -> None:
        self.epoch, self.count, self.limit = epoch, count, limit
        self._batches, self._iterator = batches, iterator
        self._next: Dataset | None = None
        self._before_next: Any = None  # the position

    @property
    def _place(self) -> str:
        return f"{_unit(self.limit)} {self.epoch}"

    def peek(self) -> Dataset:
        """Returns the next batch, which `read` will return again."""
        self._before_next = self.position()
        batch = self.read()
        assert batch is not None  # an empty epoch is an error
        self.count, self._next = self.count - 1, batch
        return batch

    def read(self) -> Dataset | None:
        """Returns the next batch, or None at the end of the epoch or at the limit."""
        if self._next is not None:
            batch, self._next, self.count = self._next, None, self.count + 1
            return batch
        if self.count == self.limit:
            return None
        name, length = self._batches.name, self._batches.steps
        try:
            found = next(self._iterator, _END)
        except InputError:
            raise
        except Exception as error:
            unit = _unit(self.limit)
            raise StreamError(name, self.epoch, self.count + 1, error, unit) from error
        if found is _END:
            self._check_end(name, length)
            return None
        if length and self.count >= length:
            raise InputError(
                f"{name} has more than {length} batches in {self._place}; expected {length}, "
                "its len()"
            )
        self.count += 1
        if self.count == _MANY_BATCHES and not length and self.limit is None:
            warnings.warn(
                f"{name} has no len() and has returned {_MANY_BATCHES} batches in epoch "
                f"{self.epoch}; if it never ends, interrupt the run and count steps: "
                "jaxtrain.fit(..., steps=10_000, evaluate_every=1_000)",
                stacklevel=2,
            )
        batch = to_batch(found, f"batch {self.count} of {name}")
        self._check_batch(batch, f"batch {self.count} of {name}")
        return batch

    def _check_batch(self, batch: Dataset, name: str) -> None:
        first, shapes = self._batches.sample, self._batches.shapes
        leaves = jax.tree.leaves(batch)
        shape = tuple(leaf.shape[1:] for leaf in leaves)
        if first is None:
            check_dataset(batch, name)
            shapes.add(shape)
            self._batches.sizes.add(len(batch))
            return
        structure: Any = jax.tree.structure(first)
        length = len(leaves[0]) if leaves and leaves[0].ndim else 0
        expected = [(leaf.ndim, leaf.dtype) for leaf in jax.tree.leaves(first)]
        if (
            jax.tree.structure(batch) != structure
            or length == 0
            or any(leaf.shape[:1] != (length,) for leaf in leaves)
            or [(leaf.ndim, leaf.dtype) for leaf in leaves] != expected
        ):
            raise InputError(
                f"{name} is {batch!r}; expected at least one example, and the dtypes and numbers "
                f"of axes of the first batch, {first!r}"
            )
        shapes.add(shape)
        if len(shapes) > _MAX_SHAPES:
            raise InputError(
                f"{name} is {batch!r}, whose examples have the {_MAX_SHAPES + 1}th shape in this "
                f"stream; expected at most {_MAX_SHAPES}, since each is compiled separately: pad "
                "the examples to a few shapes, and give the padding the weight 0"
            )
        sizes = self._batches.sizes
        if length not in sizes and len(sizes) == _MAX_SHAPES:
            warnings.warn(
                f"{name} has {length} examples, the {_MAX_SHAPES + 1}th size of a batch in this "
                "stream, and each size is compiled separately; expected a few sizes: pad the "
                "batches, and give the padding the weight 0",
                stacklevel=2,
            )
        sizes.add(length)

    def _check_end(self, name: str, length: int) -> None:
        if self.count == 0:
            raise InputError(
                f"{name} has no batches in {self._place}; expected an iterable that starts "
                "again in each epoch, such as a list, a DataLoader or jaxtrain.data.stream, but "
                "not a generator"
            )
        if self.count < length:
            raise InputError(
                f"{name} ended after {self.count} batches in {self._place}; expected "
                f"{length}, its len()"
            )

    def position(self) -> Any:
        """Returns the position of an iterator of Grain, JSON-serializable; None of any other."""
        if self._next is not None:
            return self._before_next
        if isinstance(self._batches.data, Stream):
            return None  # which starts at any batch
        if not (hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")):
            return None
        state = self._iterator.get_state()
        try:
            return {"batches": self.count, "state": _to_json(state)}
        except (TypeError, ValueError):
            return None

    def close(self) -> None:
        """Ends the workers of the stream."""
        if not self._batches.is_one_shot and hasattr(self._iterator, "close"):
            self._iterator.close()


def _unit(limit: int | None) -> str:
    """Names a pass over the data: in a run by steps, which sets a limit, epochs are others."""
    return "epoch" if limit is None else "pass"


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
    except OverflowError:
        return sys.maxsize


def _to_json(state: Any) -> Any:
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"json": json.loads(json.dumps(state))}


def _from_json(state: dict[str, Any]) -> Any:
    return base64.b64decode(state["bytes"]) if "bytes" in state else state["json"]


@contextlib.contextmanager
def read_ahead(items: Iterator[Any], close: Callable[[], None]) -> Iterator[Iterator[Any]]:
    """Yields an iterator over the same items, of which a thread holds up to two in advance."""
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
            put(_END)
        except BaseException as error:
            put(None, error)
        finally:
            close()

    def received() -> Iterator[Any]:
        while True:
            item, error = done.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    # A daemon thread: it must not keep the process alive if a source never returns.
    thread = threading.Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        yield received()
    finally:
        closed.set()
        thread.join(timeout=1.0)  # not longer: a source may never return
