"""jt.data.stream: the batches of data on disk, in order, in parts, transformed and resumed."""

from __future__ import annotations

import functools
import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.dataset import epoch_order
from jaxtrain.errors import InputError, MissingExtraError
from tests.test_tfds import prepare

KEY = jax.random.key(3)
INPUTS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
LABELS = np.arange(50, dtype=np.int32) % 3
DATA = jt.Dataset(INPUTS, LABELS)


class Examples:
    """Random access to examples, which records what is read."""

    def __init__(self, *columns: np.ndarray) -> None:
        self.columns = columns or (INPUTS, LABELS)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        self.read.append(index)
        return tuple(column[index] for column in self.columns)


class Named(Examples):
    """Examples that are dicts with other names."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


class InBatches(Examples):
    """Examples that are read several at a time, as those of Hugging Face and TFDS."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the examples are read one by one")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [super(InBatches, self).__getitem__(index) for index in indices]


class Damaged(Examples):
    """Examples of which one cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == 33:
            raise OSError("the disk is gone\nand more lines")
        return super().__getitem__(index)


class DamagedInBatches(Damaged):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def add_noise(example: Any, rng: np.random.Generator) -> Any:
    inputs, *rest = example
    return (inputs + rng.normal(size=inputs.shape).astype(np.float32), *rest)


def expected_batches(data: jt.Dataset, size: int, epoch: int, key: Any = KEY) -> list[Any]:
    """The batches that `jt.fit` makes of data in memory."""
    key = None if key is None else jax.random.fold_in(key, epoch)
    order = np.asarray(epoch_order(len(data), key))
    return [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[order[i : i + size]], data)
        for i in range(0, len(data), size)
    ]


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def mapped(tmp_path: Path) -> jt.Dataset:
    """The data with inputs that stay in a file, after 5000 other bytes."""
    path = tmp_path / "inputs.bin"
    path.write_bytes(bytes(5000) + INPUTS.tobytes())
    return jt.Dataset(np.memmap(path, np.float32, "r", 5000, INPUTS.shape), LABELS)


def test_batches_are_those_of_data_in_memory_with_the_same_key() -> None:
    stream = jt.data.stream(DATA, 16, KEY)
    assert (len(stream), stream.examples, stream.batch_size) == (4, 50, 16)
    for epoch in (1, 2, 7):
        assert_same(stream.epoch(epoch), expected_batches(DATA, 16, epoch))
    assert_same(stream, stream.epoch(1))
    assert not (next(stream.epoch(2)).targets == next(stream.epoch(1)).targets).all()


def test_the_stored_order_without_a_key_and_without_the_partial_batch() -> None:
    batches = list(jt.data.stream(DATA, 16))
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    assert_same(batches, expected_batches(DATA, 16, 1, key=None))
    stream = jt.data.stream(DATA, 16, drop_last=True)
    assert (len(stream), stream.examples) == (3, 48)
    assert_same(stream, batches[:3])
    assert_same(jt.data.stream(DATA, 64), [DATA])


TREE = {"left": INPUTS, "right": (LABELS,)}
WEIGHTED = DATA.replace(weights=np.arange(50, dtype=np.float32))
ROWS = zip(WEIGHTED.inputs, WEIGHTED.targets, WEIGHTED.weights, strict=True)
KINDS = {
    "arrays of JAX": (jax.tree.map(jnp.asarray, DATA), DATA),
    "pytrees": (jt.Dataset(TREE, LABELS), jt.Dataset(TREE, LABELS)),
    "tuples": (Examples(INPUTS, LABELS, WEIGHTED.weights), WEIGHTED),
    "dicts": ([{"inputs": x, "targets": y, "weights": w} for x, y, w in ROWS], WEIGHTED),
    "in batches": (InBatches(), DATA),
    "Grain": (grain.MapDataset.source(Examples()), DATA),
}


@pytest.mark.parametrize("kind", [*KINDS, "mapped"])
def test_every_source_gives_the_same_batches(mapped: jt.Dataset, kind: str) -> None:
    source, data = KINDS.get(kind, (mapped, DATA))
    batches = list(jt.data.stream(source, 16, KEY).epoch(2))
    assert_same(batches, expected_batches(data, 16, 2))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batches))


def test_rows_of_an_array_that_is_not_contiguous_are_read_alone(tmp_path: Path) -> None:
    """NumPy's `take` would copy all 32 MiB for each batch."""
    images = np.arange(2**18, dtype=np.float32).reshape(-1, 1, 1) + np.zeros((1, 2, 16))
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r").transpose(0, 2, 1)
    batches = jt.data.stream(jt.Dataset(mapped), 16, KEY).epoch(1)
    next(batches)
    tracemalloc.start()
    batch = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    order = epoch_order(2**18, jax.random.fold_in(KEY, 1))[16:32]
    np.testing.assert_array_equal(batch.inputs, images.transpose(0, 2, 1)[np.asarray(order)])


def test_data_sets_of_tfds_are_sources(tmp_path: Path, monkeypatch) -> None:
    import tensorflow_datasets as tfds

    prepare(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    batches = list(jt.data.stream("tfds:little", 5, KEY))
    assert sorted(np.concatenate([batch.targets for batch in batches])) == list(range(12))
    assert batches[0].inputs.shape == (5, 8, 8, 1)
    assert_same(jt.data.stream(jt.data.open_tfds("little"), 5, KEY), batches)
    raw = tfds.data_source("little", split="train", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"example.* is a dict of .*; expected \(inputs, targets"):
        next(iter(jt.data.stream(raw, 5)))
    stream = jt.data.stream(raw, 5, KEY, transform=lambda each, _: (each["image"], each["label"]))
    assert_same(stream, batches)


def test_a_transform_depends_on_the_key_and_the_epoch_alone() -> None:
    zeros = DATA.replace(inputs=np.zeros((50, 6), np.float32))

    def noise(key: Any, epoch: int, source: Any = zeros) -> np.ndarray:
        stream = jt.data.stream(source, 16, key, transform=add_noise)
        return np.concatenate([batch.inputs for batch in stream.epoch(epoch)])

    keys = KEY, jax.random.key(4), None
    noises = [noise(key, epoch) for key in keys for epoch in (1, 2, 3)]
    # Different for each key, epoch, batch, example and pixel.
    assert len(np.unique(np.round(noises, 5))) > 0.97 * 9 * 50 * 6
    assert 0.8 < np.std(noises) < 1.2
    np.testing.assert_array_equal(noise(KEY, 2), noises[1])
    np.testing.assert_array_equal(noise(KEY, 2, Examples(zeros.inputs, LABELS)), noises[1])


def test_a_transform_may_change_the_form_of_an_example() -> None:
    def crop(example: Any, rng: np.random.Generator) -> Any:
        start = rng.integers(3)
        part = {"part": example["image"][start : start + 4], "start": start}
        return {"inputs": part, "targets": example["label"]}

    (batch,) = jt.data.stream(Named(), 50, transform=crop)
    np.testing.assert_array_equal(batch.targets, LABELS)
    assert set(batch.inputs["start"]) == {0, 1, 2}
    for row, part, start in zip(INPUTS, *batch.inputs.values(), strict=True):
        np.testing.assert_array_equal(part, row[start : start + 4])


def test_a_transform_receives_the_fields_of_a_dataset() -> None:
    for fields in (1, 2, 3):
        data = jt.Dataset(*(INPUTS, LABELS, np.ones(50, np.float32))[:fields])
        seen = []

        def note(example: Any, rng: np.random.Generator, seen: Any = seen) -> Any:
            seen.append(len(example))
            return example[0], 0

        list(jt.data.stream(data, 50, transform=note))
        assert seen == [fields] * 50


@pytest.mark.parametrize(("count", "transform"), [(2, None), (4, add_noise)])
def test_the_parts_of_a_batch_are_the_batch(count: int, transform: Any) -> None:
    data = DATA[:44]
    whole = jt.data.stream(data, 16, KEY, transform=transform)
    parts = [
        jt.data.stream(data, 16, KEY, transform=transform, shard=(i, count)) for i in range(count)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    together = [
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        for batches in zip(*(part.epoch(2) for part in parts), strict=True)
    ]
    assert_same(together, whole.epoch(2))


def test_no_part_of_a_partial_batch_is_larger_or_empty() -> None:
    """The sizes are equal, since the processes train on the parts at once."""
    for examples in (33, 35, 36, 38, 47, 48):
        sizes = [
            [len(batch) for batch in jt.data.stream(DATA[:examples], 16, shard=(i, 4))]
            for i in range(4)
        ]
        assert sizes == [sizes[0]] * 4
        assert min(sizes[0]) > 0, examples
        assert 0 <= examples - 4 * sum(sizes[0]) < 4


def test_workers_read_and_transform_the_same_batches(mapped: jt.Dataset) -> None:
    """The file is opened again in a worker; its content is not sent."""
    stream = jt.data.stream(mapped[3:], 16, KEY, transform=add_noise, workers=2)
    expected = list(jt.data.stream(DATA[3:], 16, KEY, transform=add_noise).epoch(2))
    batches = stream.epoch(2, start=1)
    assert_same(batches, expected[1:])
    batches.close()


@pytest.mark.parametrize("transform", [None, add_noise], ids=["as stored", "transformed"])
def test_an_epoch_starts_at_any_batch_and_continues_at_its_position(transform: Any) -> None:
    source = Examples()
    stream = jt.data.stream(source, 16, KEY, transform=transform)
    order = np.asarray(epoch_order(50, jax.random.fold_in(KEY, 2)))
    expected = list(stream.epoch(2))
    for start in range(5):
        source.read.clear()
        assert_same(stream.epoch(2, start), expected[start:])
        assert source.read == order[16 * start :].tolist()  # and no other example
    for taken in range(4):
        batches, again = stream.epoch(2), stream.epoch(2)
        for _ in range(taken):
            next(batches)
        again.set_state(json.loads(json.dumps(batches.get_state())))
        assert_same(again, expected[taken:])


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_outside_the_epoch_is_named(start: int) -> None:
    message = f"start is {start}; expected an integer of at least 0 and at most 4"
    with pytest.raises(InputError, match=message):
        jt.data.stream(DATA, 16).epoch(1, start)


def shift(example: Any, rng: np.random.Generator, size: float) -> Any:
    return (example[0] + size * rng.normal(), *example[1:])


def test_its_text_tells_what_is_read() -> None:
    text = str(jt.data.stream(DATA, 16, KEY))
    assert text.startswith("Stream(50 examples in batches of 16, shuffled by key ")
    # A run may resume with another number of processes.
    assert str(jt.data.stream(DATA, 16, KEY, shard=(1, 2))) == text
    assert str(jt.data.stream(DATA)) == "Stream(50 examples in batches of 64, as stored)"
    assert str(jt.data.stream(DATA, 16, jax.random.key(4))) != text
    one, same, other = (
        str(jt.data.stream(DATA, 16, KEY, transform=functools.partial(shift, size=size)))
        for size in (0.1, 0.1, 0.3)
    )
    assert one == same != other
    assert re.search(r", transformed by shift \([0-9a-f]{16}\)\)$", one)


UNTYPED = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first"
)


@pytest.mark.parametrize(
    ("arguments", "message", "argument"),
    [
        ({"batch_size": 0}, "batch_size is 0", "batch_size"),
        ({"workers": -1}, "workers is -1", "workers"),
        pytest.param({"key": 3}, "key is 3; expected a PRNG key", "key", marks=UNTYPED),
        pytest.param(
            {"source": iter([])},
            "source is a list_iterator; expected a jaxtrain.Dataset, an object",
            "source",
            marks=UNTYPED,
        ),
        ({"source": []}, "source has 0 examples for batches of 16; expected at least 1", "source"),
        (
            {"source": DATA[:15], "drop_last": True},
            "source has 15 examples for batches of 16; expected at least 16",
            "source",
        ),
        ({"source": jt.Dataset(INPUTS, LABELS[:9])}, "source.inputs has 50 examples and", None),
        ({"shard": (2, 2)}, r"shard\[0\] is 2", "shard[0]"),
        pytest.param({"shard": 3}, "shard is 3", "shard", marks=UNTYPED),
        ({"shard": (0, 3)}, "batch_size is 16 for 3 processes; expected a mult", "batch_size"),
        ({"source": "tfds:Unknown"}, "the data set Unknown is not prepared in", "name"),
        ({"source": "mnist"}, "source is a str|source is 'mnist'", "source"),
    ],
)
def test_mistakes_are_named_when_the_stream_is_made(
    tmp_path: Path, monkeypatch, arguments, message, argument
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=message) as raised:
        jt.data.stream(**{"source": DATA, "batch_size": 16, **arguments})
    assert raised.value.argument == argument


def fail(example: Any, rng: np.random.Generator) -> Any:
    raise KeyError("no such field")


@pytest.mark.parametrize(
    ("source", "transform", "message"),
    [
        (Damaged(), None, r"^example 33 of .* cannot be read \(OSError: the disk is gone\); fix"),
        (DamagedInBatches(), None, r"example 33 of .* cannot be read \(OSError: the disk is gone"),
        (Named(), None, r"an example of the source is a dict of image, label; expected \(inputs"),
        (Examples(), lambda each, _: each[0], "is a ndarray; expected"),
        (Examples(), lambda each, _: (*each, 1, 2), "is a tuple of 4; expected"),
        (
            Examples(),
            lambda each, rng: (each[0][: rng.integers(2, 5)], each[1]),
            "examples of one batch differ: .* pass a transform",
        ),
    ],
)
def test_examples_that_cannot_be_used_are_named(source, transform, message) -> None:
    stream = jt.data.stream(source, 16, transform=transform)
    with pytest.raises(InputError, match=message) as raised:
        list(stream)
    assert "\n" not in str(raised.value)
    assert r"\n" not in str(raised.value)


def test_an_error_of_a_transform_is_its_own() -> None:
    with pytest.raises(KeyError, match="no such field"):
        list(jt.data.stream(DATA, 16, transform=fail))


def test_a_missing_package_names_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MissingExtraError, match=r"grain is not installed.*'jaxtrain\[stream\]'"):
        jt.data.stream(DATA)
