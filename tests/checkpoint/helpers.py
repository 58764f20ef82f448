"""Helpers of the checkpoint tests: write small checkpoints, and change their records."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint import CheckpointStore, Snapshot

COLUMNS = ["epoch", "train_loss"]
METADATA = {"run": "a"}


def accept(recorded: dict[str, Any], where: str) -> None:
    """A check that accepts every run."""


@contextlib.contextmanager
def open_store(path: Path, **options: Any) -> Iterator[CheckpointStore]:
    """A store that is closed at the end, as `fit` closes it."""
    store = CheckpointStore(path, METADATA, **options)
    try:
        yield store
    except BaseException as error:
        store.close(error)
        raise
    store.close()


def restore(path: Path, like: Any = None, columns: Any = COLUMNS, check=accept, **options: Any):
    with open_store(path) as store:
        return store.restore(make_state() if like is None else like, columns, check, **options)


def make_snapshot(epoch: int, state: Any = None, best: Any = None, **fields: Any) -> Snapshot:
    history = {"epoch": np.arange(1, epoch + 1), "train_loss": np.linspace(2, 1, epoch)}
    state = make_state(epoch) if state is None else state
    losses = np.zeros(4 * epoch, np.float32)
    return Snapshot(epoch, state, history, losses, best, **fields)


def make_state(seed: int = 0) -> dict[str, Any]:
    key = jax.random.key(seed)
    return {"w": jax.random.normal(key, (3, 2)), "step": jnp.int32(seed), "key": key}


def write(path: Path, *epochs: int, **options: Any) -> None:
    """Writes the checkpoints of some epochs, 1 to 3 without any."""
    with open_store(path, **options) as store:
        for epoch in epochs or (1, 2, 3):
            store.save(make_snapshot(epoch))


def assert_identical(ours: Any, theirs: Any) -> None:
    """Compares structures, types and every bit, including those of NaN."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(one) == jax.random.key_impl(other)
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], data=None) -> None:
    """Changes the header, the record or the data of a checkpoint, and updates its checksum."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    record = json.loads(header["__metadata__"]["record"])
    change(header, record)
    header["__metadata__"] |= {"record": json.dumps(record), "sha256": "0" * 64}
    text = json.dumps(header, separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text + (content[start:] if data is None else data)
    digits = hashlib.sha256(content).hexdigest()
    path.write_bytes(re.sub(b'"sha256":"0{64}"', f'"sha256":"{digits}"'.encode(), content, count=1))
