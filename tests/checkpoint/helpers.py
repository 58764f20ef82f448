"""Helpers of the checkpoint tests: write small checkpoints, and forge their content."""

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


def accept(recorded: dict[str, Any], where: str) -> list[str]:
    """A check that accepts every run."""
    return []


@contextlib.contextmanager
def open_store(
    path: Path, metadata: dict[str, Any] | None = None, **options: Any
) -> Iterator[CheckpointStore]:
    """A store that is closed at the end, as `fit` closes it."""
    store = CheckpointStore(path, metadata or METADATA, **options)
    try:
        yield store
    except BaseException as error:
        store.close(error)
        raise
    store.close()


def make_snapshot(epoch: int, state: Any = None, best: Any = None, **fields: Any) -> Snapshot:
    history = {"epoch": np.arange(1, epoch + 1), "train_loss": np.linspace(2, 1, epoch)}
    state = make_state(epoch) if state is None else state
    losses = np.zeros(4 * epoch, np.float32)
    return Snapshot(epoch, state, history, losses, best, **fields)


def make_state(seed: int = 0) -> dict[str, Any]:
    key = jax.random.key(seed)
    return {"w": jax.random.normal(key, (3, 2)), "step": jnp.int32(seed), "key": key}


def write_three(path: Path) -> None:
    """Writes the checkpoints of epochs 1, 2 and 3."""
    with open_store(path) as store:
        for epoch in (1, 2, 3):
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


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Changes the header and the record of a checkpoint, and updates its checksum."""
    header, data = read_header(path)
    record = json.loads(header["__metadata__"]["record"])
    change(header, record)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] |= {"record": json.dumps(record), "sha256": "0" * 64}
    seal(path, json.dumps(header, separators=(",", ":")).encode(), data)


def seal(path: Path, header: bytes, data: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + data
    digits = hashlib.sha256(content).hexdigest()
    path.write_bytes(re.sub(b'"sha256":"0{64}"', f'"sha256":"{digits}"'.encode(), content, count=1))
