"""stream: shuffled batches of a data set that stays on disk, read by Grain."""

from __future__ import annotations

import copy
import functools
import mmap
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxtrain._arguments import check_arguments, check_integer, check_shard
from jaxtrain._extras import needs_extra
from jaxtrain.checkpoint import describe_function, digest
from jaxtrain.data.tfds import TFDS_PREFIX, open_tfds
from jaxtrain.dataset import Dataset, check_array, check_dataset, epoch_order, named_arrays
from jaxtrain.errors import InputError, first_line


@runtime_checkable
class Source(Protocol):
    """Examples that are read by their index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Transform = Callable[[Any, np.random.Generator], Any]
# The pages of larger files are dropped from the memory of the process after each batch.
_LARGE_BYTES = 2**26
# How far memory-mapped arrays are looked for in a source: nested objects, and entries of each.
_SEARCHED_DEPTH, _SEARCHED_LENGTH = 5, 100
_FIELDS = ("inputs", "targets", "weights")


class Stream:
    """The batches of a data set on disk, in a new order in each epoch; created by `stream`.

    `len(stream)` is the number of batches per epoch, and `for batch in stream` reads those of the
    first epoch.

    Attributes:
      batch_size: examples per batch, of all processes.
      examples: examples per epoch, of all processes.
      shard: the number of this process, and the number of processes.

    Example:
      >>> stream = jt.data.stream(train, batch_size=16, key=jax.random.key(0))
      >>> len(stream)
      4
      >>> for batch in stream.epoch(2):
      ...     state, metrics = jt.train_step(state, batch, loss_fn)
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        key: Key[Array, ""] | None,
        transform: Transform | None,
        workers: int,
        drop_last: bool,
        replacement: bool,
        shard: tuple[int, int],
    ) -> None:
        self.batch_size = batch_size
        self._replacement = replacement
        self._source = source
        self._key = key
        self._transform = transform
        self._workers = workers
        self.shard = shard
        self._folds_epoch = True
        size = batch_size if drop_last else 1
        self._length = len(source)
        examples = self._length // size * size
        self.examples = examples - examples % batch_size % shard[1]

    def __len__(self) -> int:
        full, rest = divmod(self.examples, self.batch_size)
        return full + (rest >= self.shard[1])  # no part of a batch is empty

    def __repr__(self) -> str:
        # Without the shard: several processes train on the same batches as one.
        drawn = "drawn with replacement" if self._replacement else "shuffled"
        order = "as stored" if self._key is None else f"{drawn} by key {digest(self._key)}"
        if self._transform is not None:
            order += f", transformed by {describe_function(self._transform)}"
        return f"Stream({self.examples} examples in batches of {self.batch_size}, {order})"

    def __iter__(self) -> Iterator[Dataset]:
        return self.epoch(1)

    def _reads(self) -> tuple[Any, Any]:
        """Returns what decides the examples of a run that resumes: the source and the transform."""
        source = self._source
        arrays = jax.tree.leaves(source) if isinstance(source, Dataset) else source
        return arrays, self._transform

    def same_each_epoch(self) -> Stream:
        """Returns this stream with the same order in every epoch, that of `jt.train_epoch`."""
        other = copy.copy(self)
        other._folds_epoch = False
        return other

    def epoch(self, number: int, start: int = 0) -> Iterator[Dataset]:
        """Returns the batches of an epoch, as an iterator of Grain with its position.

        Args:
          number: the epoch, counted from 1. Its order is that of `jt.fit` on a data set in memory
            with the same key.
          start: number of batches to leave out at the beginning of the epoch, without reading
            them. The others are the same for every start and every number of workers.

        Raises:
          InputError: `start` is negative or larger than the number of batches.
        """
        check_integer(start, "start", minimum=0, maximum=len(self))
        with needs_extra("stream"):
            import grain
            from absl import flags

        key = self._key
        if key is not None and self._folds_epoch:
            key = jax.random.fold_in(key, number)
        count = len(self._source)
        if count != self._length:
            raise InputError(
                f"the source of the stream has {count} examples, and had {self._length} when the "
                "stream was made; expected a source that does not change: make a new stream"
            )
        if key is not None and self._replacement:
            order = np.asarray(jax.random.randint(key, (count,), 0, count))
        else:
            order = np.asarray(epoch_order(count, key))
        seed = number if key is None else int(jax.random.bits(key))
        reader = _Reader(
            self._source, order, self.batch_size, len(self), self.shard, self._transform, seed
        )
        batches = grain.MapDataset.source(reader)[start:]
        # `fit` reads ahead in a thread of its own.
        here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        if not self._workers:
            return iter(batches.to_iter_dataset(here))
        if not flags.FLAGS.is_parsed():  # which Grain reads in its workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(batches.to_iter_dataset(here).mp_prefetch(options))


def stream(
    source: Dataset | Source | str,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
    *,
    transform: Transform | None = None,
    workers: int = 0,
    drop_last: bool = False,
    replacement: bool = False,
    shard: tuple[int, int] | None = None,
) -> Stream:
    """Returns shuffled batches of a data set that stays on disk, for `fit` or a loop of your own.

    Without `replacement`, every example is used once in each epoch, in the order in which `jt.fit`
    would use a data set in memory with the same key: both train to the same numbers. The order
    takes 4 bytes of memory per example.

    Args:
      source: a `Dataset` of arrays, such as `np.memmap`; a name such as "tfds:mnist" of a data set
        that TFDS has prepared (its split "train"; `open_tfds` opens others); or any object with
        `len(source)` and `source[index]`, such as a PyTorch data set. An example is
        `(inputs, targets)`, `(inputs, targets, weights)`, or a dict with these names.
      batch_size: examples per batch.
      key: PRNG key of the shuffle; None keeps the stored order.
      transform: `transform(example, rng) -> example` is applied to each example, with a
        `np.random.Generator` for augmentation. It may turn an example of any form into one of the
        above.
      workers: number of processes that read and transform; with 0, `fit` reads in a thread. They
        are new processes of Python, since a process that is forked after JAX has started its
        threads may hang. Each imports the program and receives a pickled copy of the source.
      drop_last: leaves out the last batch of an epoch if it is smaller than the others, as does
        `drop_last` of a `Dataset`.
      replacement: draws as many examples per epoch at random, of which some occur several times
        and others not at all; needs a key.
      shard: `(index, count)` reads the rows of process `index` of `count` processes, an equal
        part of each batch. None takes both numbers from JAX.

    Returns:
      The stream: an iterable of batches, each a `Dataset` of NumPy arrays.

    Raises:
      InputError: an argument is out of range, or the source has no examples.
      MissingExtraError: `jaxtrain[stream]` is not installed.

    Example:
      >>> np.asarray(images).tofile("images.bin")
      >>> mapped = np.memmap("images.bin", np.float32, mode="r", shape=(80, 8, 8))
      >>> train = jt.data.stream(jt.Dataset(mapped, labels), batch_size=16, key=jax.random.key(0))
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn)
    """
    check_arguments(stream, locals(), eager="call it before")
    if isinstance(source, str) and source.startswith(TFDS_PREFIX):
        source = open_tfds(source.removeprefix(TFDS_PREFIX))
    check_integer(batch_size, "batch_size", minimum=1)
    check_integer(workers, "workers", minimum=0)
    if key is None and replacement:
        raise InputError(
            "key is None with replacement=True; expected a PRNG key, by which examples are drawn",
            argument="key",
        )
    with needs_extra("stream"):
        import grain  # noqa: F401
    if isinstance(source, Dataset):
        check_dataset(source, "source")
        _check_not_shared(source, "source")
        drop_last = drop_last or source.drop_last
        # Memory-mapped arrays stay as they are.
        source = jax.tree.map(
            lambda array: array if isinstance(array, np.ndarray) else np.asarray(array), source
        )
    elif isinstance(source, str) or not isinstance(source, Source):
        shown = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
        raise InputError(
            f"source is {shown}; expected a jaxtrain.Dataset, an object with len(source) and "
            "source[index], or a name such as 'tfds:mnist'",
            argument="source",
        )
    if len(source) == 0 or (drop_last and len(source) < batch_size):
        raise InputError(
            f"source has {len(source)} examples for batches of {batch_size}; expected at least "
            f"{batch_size if drop_last else 1}",
            argument="source",
        )
    if shard is None:
        shard = (jax.process_index(), jax.process_count())
    index, count = check_shard(shard)
    if batch_size % count:
        raise InputError(
            f"batch_size is {batch_size} for {count} processes; expected a multiple of {count}",
            argument="batch_size",
        )
    return Stream(
        *(source, batch_size, key, transform, workers, drop_last, replacement, (index, count))
    )


def is_on_disk(dataset: Any) -> bool:
    """Returns whether a data set has memory-mapped arrays."""
    leaves = jax.tree.leaves(dataset.replace(shared=None)) if isinstance(dataset, Dataset) else []
    return any(_mapping(leaf) is not None for leaf in leaves)


def to_batch(batch: Any, name: str) -> Dataset:
    """Returns a batch, or an example, as a `Dataset` of NumPy arrays.

    Args:
      batch: a `Dataset`, a tuple or list of two or three, or a dict with the same names.
      name: name used in error messages, such as "batch 3 of train".

    Raises:
      InputError: it is something else.
    """
    if isinstance(batch, Mapping) and "inputs" in batch and set(batch) <= set(_FIELDS):
        batch = Dataset(**batch)
    elif isinstance(batch, tuple | list) and len(batch) in (2, 3):
        batch = Dataset(*batch)
    elif not isinstance(batch, Dataset):
        found = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found = f"a dict of {', '.join(map(str, batch))}"
        elif isinstance(batch, tuple | list):
            found += f" of {len(batch)}"
        raise InputError(
            f"{name} is {found}; expected (inputs, targets), (inputs, targets, weights), a dict "
            "with these names, or a jaxtrain.Dataset, such as jaxtrain.Dataset(inputs) where there "
            "are no targets"
        )
    _check_not_shared(batch, name)
    if all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch)):
        return batch
    for path, leaf in named_arrays(batch, name):
        if isinstance(leaf, np.ma.MaskedArray):
            check_array(leaf, path)
    return jax.tree.map(np.asarray, batch)


def _check_not_shared(data: Dataset, name: str) -> None:
    if data.shared is not None:
        raise InputError(
            f"{name} has shared arrays, which a stream does not take; expected data in memory, "
            "such as numpy.asarray(memmap), or a model that has these arrays itself"
        )


class _Reader:
    """Random access to the batches of one epoch, as Grain expects it."""

    def __init__(
        self,
        source: Any,
        order: np.ndarray,
        size: int,
        batches: int,
        shard: tuple[int, int],
        transform: Transform | None,
        seed: int,
    ) -> None:
        self._source, self._order, self._size, self._batches = source, order, size, batches
        self._shard, self._transform, self._seed = shard, transform, seed
        self._large_files: list[mmap.mmap] | None = None

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, batch: int) -> Dataset:
        start = batch * self._size
        index, count = self._shard
        # Up to count - 1 examples of a partial batch are left out.
        part = (min(start + self._size, len(self._order)) - start) // count
        start += index * part
        examples = _read(self._source, self._order[start : start + part])
        if self._transform is not None:
            # The random numbers of an example depend on its position in the epoch alone, also in
            # a shard.
            examples = [
                self._transform(example, np.random.default_rng([self._seed, start + row]))
                for row, example in enumerate(_separate(examples))
            ]
        stacked = _stack(examples)  # a copy, also of rows of a memory-mapped array
        if self._large_files is None:  # a source may open its files when it reads the first example
            self._large_files = _large_files(self._source)
        for file in self._large_files:
            file.madvise(mmap.MADV_DONTNEED)
        return stacked

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the content of a memory-mapped array, so pickle how to open it.
        is_array = isinstance(self._source, Dataset)
        source = jax.tree.map(_opener, self._source) if is_array else self._source
        return self.__dict__ | {"_source": source, "_large_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if isinstance(self._source, Dataset):
            self._source = jax.tree.map(
                lambda leaf: leaf() if isinstance(leaf, functools.partial) else leaf, self._source
            )


def _read(source: Any, indices: np.ndarray) -> Any:
    """Returns some examples: a `Dataset` of arrays, or a list of what the source returns."""
    if isinstance(source, Dataset):
        return jax.tree.map(lambda array: _take(array, indices), source)
    if hasattr(source, "__getitems__"):
        try:
            examples = list(source.__getitems__(indices.tolist()))
        except Exception:
            for index in indices.tolist():
                _example(source, index)  # raises an error that names the example
            raise
        if len(examples) != len(indices):
            raise InputError(
                f"the __getitems__ of a {type(source).__name__} returned {len(examples)} examples "
                f"for {len(indices)} indices; expected one for each index, in their order"
            )
        return examples
    return [_example(source, index) for index in indices.tolist()]


def _example(source: Any, index: int) -> Any:
    try:
        return source[index]
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"example {index} of {source!r} cannot be read ({type(error).__name__}: "
            f"{first_line(error)}); fix the source, or leave the example out"
        ) from error


def _large_files(source: Any) -> list[mmap.mmap]:
    """Returns the large files that a source has mapped, whose pages in memory can be dropped."""
    roots = map(_root, _arrays(source))
    # The pages of a mapping in the mode "c" may have been changed.
    files = [root.base for root in roots if getattr(root, "mode", "c") != "c"]
    return [file for file in files if isinstance(file, mmap.mmap) and len(file) > _LARGE_BYTES]


def _arrays(
    value: Any, depth: int = _SEARCHED_DEPTH, seen: set[int] | None = None
) -> Iterator[np.ndarray]:
    """Yields the arrays among the attributes of a source, and of the sources that it wraps."""
    seen = set() if seen is None else seen
    if isinstance(value, np.ndarray):
        yield value
    elif depth and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            value = list(value.values())
        elif not isinstance(value, list | tuple):
            value = list(getattr(value, "__dict__", {}).values())
        for each in value[:_SEARCHED_LENGTH]:
            yield from _arrays(each, depth - 1, seen)


def _take(array: Any, indices: np.ndarray) -> np.ndarray:
    file = _mapping(array)
    if file is not None:
        page = mmap.ALLOCATIONGRANULARITY
        needed, size = _root(array).offset // page * page + len(file), file.size()
        if size < needed:  # reading past the end of a file would end the process
            raise InputError(
                f"the file {array.filename} has {size} bytes, and had {needed} when it was opened; "
                "expected a file that does not change while it is read"
            )
    values = np.asarray(array)
    # `take` would first copy all of an array that is not contiguous.
    return values.take(indices, axis=0) if values.flags.c_contiguous else values[indices]


def _stack(examples: Any) -> Dataset:
    """Returns examples as one batch; arrays that were read together are one already."""
    if isinstance(examples, Dataset):
        return examples
    rows = [to_batch(example, "an example of the source") for example in examples]
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    except ValueError as error:
        other = next((row for row in rows if repr(row) != repr(rows[0])), rows[0])
        raise InputError(
            f"examples of one batch differ: {rows[0]!r} and {other!r}; expected arrays of the same "
            "shape: pass a transform that makes them so",
            argument="transform",
        ) from error


def _separate(examples: Any) -> list[Any]:
    """Returns the examples of arrays that were read together, as tuples of their fields."""
    if not isinstance(examples, Dataset):
        return examples
    columns = tuple(getattr(examples, name) for name in _FIELDS)
    while columns[-1] is None:
        columns = columns[:-1]
    return [jax.tree.map(operator.itemgetter(row), columns) for row in range(len(examples))]


def _opener(array: Any) -> Any:
    """Returns a function that opens a memory-mapped array again; other arrays as they are."""
    if _mapping(array) is None:
        return array
    root = _root(array)
    start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    if not array.flags.c_contiguous:
        raise InputError(
            f"the array of shape {array.shape} in {array.filename} is not contiguous; expected a "
            "complete memory-mapped array, or consecutive rows of one, to read it in workers",
            argument="workers",
        )
    offset = root.offset + start
    return functools.partial(np.memmap, array.filename, array.dtype, "r", offset, array.shape)


def _mapping(array: Any) -> mmap.mmap | None:
    """Returns the memory map that an array is a view of; None for an array in memory.

    `memmap.astype` and `memmap.copy` return an `np.memmap` that is in memory.
    """
    base = _root(array).base if isinstance(array, np.memmap) else None
    return base if isinstance(base, mmap.mmap) else None


def _root(array: np.ndarray) -> Any:
    """Returns the array of which an array is a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
