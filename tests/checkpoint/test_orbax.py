"""Checkpoints that Orbax writes: the promises of a file, and other numbers of devices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import find_checkpoint, list_checkpoints, list_epochs
from tests.checkpoint.helpers import (
    assert_identical,
    make_snapshot,
    make_state,
    open_store,
    restore,
    write,
)


class StopError(Exception):
    """Ends a run within an epoch."""


def fit(state: Any, data: Any, *callbacks: Any, **options: Any) -> Any:
    return jt.fit(
        state,
        data,
        loss_fn=jt.losses.cross_entropy,
        batch_size=10,
        key=jax.random.key(1),
        callbacks=callbacks,
        **options,
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_stopped_within_an_epoch_ends_in_the_same_bits(
    small_state, small_classes, tmp_path, devices: int
) -> None:
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    options = {"epochs": 3, "mesh": mesh if devices > 1 else None}
    checkpoint = jt.callbacks.checkpoint(
        tmp_path, every_steps=2, keep=2, best="train_loss", store="orbax"
    )

    def stop(run: jt.Run) -> None:
        if (run.epoch, run.step) == (2, 4):
            raise StopError

    stopping = jt.callbacks.every_steps(1, stop)
    with pytest.raises(StopError):
        fit(small_state, small_classes, checkpoint, stopping, **options)
    newest = find_checkpoint(tmp_path, *list_checkpoints(tmp_path)[-1])
    assert newest.name in ("epoch-2-step-2.orbax", "epoch-2-step-4.orbax")
    state, history = fit(small_state, small_classes, checkpoint, **options)
    best = jt.callbacks.early_stopping(9, "train_loss")
    expected, columns = fit(small_state, small_classes, best, **options)
    assert_identical(state.params, expected.params)
    for name in set(columns) - {"seconds"}:
        np.testing.assert_array_equal(history[name], columns[name])
    loaded = jt.load_checkpoint(tmp_path, small_state, best=True)
    assert_identical(loaded.params, jax.device_put(expected.params, jax.devices()[0]))


def test_a_divided_state_is_restored_on_another_number_of_devices(tmp_path: Path) -> None:
    def place(state: Any, devices: int) -> Any:
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])

        def rule(path: str, leaf: Any) -> jax.P:
            return jax.P("data") if path == "w" else jax.P()

        return jt.parallel.replicate(state, mesh, rule)

    state = make_state() | {"w": jax.random.normal(jax.random.key(0), (8, 2))}
    state |= {"empty": jax.numpy.zeros((0, 2))}
    with open_store(tmp_path, orbax=True) as store:
        store.save(make_snapshot(1, place(state, 4)))
    for like in (place(state, 8), place(state, 2), state):
        found = restore(tmp_path, jax.tree.map(jax.numpy.zeros_like, like) | {"key": like["key"]})
        for name, leaf in like.items():
            assert found.state[name].sharding.device_set == leaf.sharding.device_set
            assert jax.device_get(found.state[name] == leaf).all()


def test_the_newest_checkpoints_are_kept_and_incomplete_ones_removed(tmp_path: Path) -> None:
    incomplete = tmp_path / "epoch-9.orbax.orbax-checkpoint-tmp"
    incomplete.mkdir()
    write(tmp_path, 1, 2, 3, keep=2, orbax=True)
    assert not incomplete.exists()
    assert list_epochs(tmp_path) == [2, 3]
    assert_identical(restore(tmp_path).state, make_state(3))


def test_a_run_may_change_its_store(tmp_path: Path) -> None:
    write(tmp_path, 1, orbax=True)
    write(tmp_path, 2)
    assert_identical(restore(tmp_path).state, make_state(2))
    write(tmp_path, 3, orbax=True)
    assert_identical(restore(tmp_path).state, make_state(3))


def test_a_folder_that_orbax_cannot_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, orbax=True)
    for path in (tmp_path / "epoch-1.orbax").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(jt.errors.InputError, match=r"epoch-1\.orbax cannot be read by Orbax \("):
        restore(tmp_path)


def test_a_missing_orbax_is_named(tmp_path: Path, small_state, small_classes, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    checkpoint = jt.callbacks.checkpoint(tmp_path, store="orbax")
    with pytest.raises(jt.errors.MissingExtraError, match=r"orbax.*jaxtrain\[orbax\]"):
        fit(small_state, small_classes, checkpoint, epochs=1)
