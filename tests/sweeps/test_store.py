"""The checkpoint folder of a sweep: interruption, resuming, damage, another sweep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.callbacks import SweepProgress
from tests.checkpoint.helpers import forge

AXES = {"slope": range(6)}


def run(slope):
    state = {"weight": jnp.arange(3.0) * slope, "key": jax.random.key(slope)}
    return state, {"loss": slope / jnp.arange(1.0, 4.0)}


class Stop(Exception):
    """Interrupts a sweep."""


def stop_after(done: int):
    def stop(progress) -> None:
        if progress.done == done:
            raise Stop

    return stop


def test_an_interrupted_sweep_trains_only_the_rest(tmp_path) -> None:
    with pytest.raises(Stop):
        jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path, callbacks=[stop_after(4)])
    events = []
    result = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path, callbacks=[events.append])
    assert events[0] == SweepProgress(4, 6, kind="started")
    assert [event.done for event in events[1:]] == [6]
    expected = jt.sweep(run, AXES, at_once=2)
    np.testing.assert_array_equal(result["loss"], expected["loss"])
    state, _ = result.outputs
    np.testing.assert_array_equal(state["weight"], expected.outputs[0]["weight"])
    assert (state["key"] == expected.outputs[0]["key"]).all()
    events.clear()  # complete now
    again = jt.sweep(run, AXES, at_once=3, checkpoint=tmp_path, callbacks=[events.append])
    assert events == [SweepProgress(6, 6, kind="started")]
    np.testing.assert_array_equal(again["loss"], expected["loss"])


def test_a_damaged_file_is_trained_again_with_a_warning(tmp_path) -> None:
    expected = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)
    file = tmp_path / "runs-0-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    events = []
    with pytest.warns(UserWarning, match="wrong checksum; its runs are trained again"):
        result = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path, callbacks=[events.append])
    assert events[0] == SweepProgress(4, 6, kind="started")
    np.testing.assert_array_equal(result["loss"], expected["loss"])


def test_the_folder_of_another_sweep_is_refused(tmp_path) -> None:
    def with_data(data, power=1):
        return lambda slope: {"loss": slope * data**power}

    jt.sweep(with_data(jnp.arange(3.0)), AXES, checkpoint=tmp_path)
    jt.sweep(with_data(jnp.arange(3.0)), AXES, checkpoint=tmp_path)
    for other, axes, reason in (
        (with_data(jnp.arange(3.0)), {"slope": range(7)}, "its axes differ"),
        (with_data(jnp.arange(3.0) + 1), AXES, "its run differs in code, data or settings"),
        (with_data(jnp.arange(3.0), power=2), AXES, "its run differs in code, data or settings"),
    ):
        with pytest.raises(jt.errors.InputError, match=f"belongs to another sweep: {reason}"):
            jt.sweep(other, axes, checkpoint=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        *({"positions": [2, 6]}, {"positions": [-1, 2]}, {"positions": [2, 2]}, {"positions": [2]}),
        *({"positions": "23"}, {"positions": None}, {"positions": [[2], [3]]}),
        *({"group": 1}, {"group": -1}, {"group": None}, {"group": False}, {"identity": 3}),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_the_sweep_is_trained_again(tmp_path, changes) -> None:
    """Its checksum is correct."""
    expected = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)
    file = tmp_path / "runs-0-2.safetensors"
    forge(file, lambda _, record: record["metadata"].update(changes))
    with pytest.warns(UserWarning, match="is malformed: .*; its runs are trained again"):
        result = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)
    np.testing.assert_array_equal(result["loss"], expected["loss"])
    assert jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)["loss"].shape == (6, 3)


def test_arrays_of_other_shapes_or_dtypes_are_trained_again(tmp_path) -> None:
    expected = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)

    def reshape(header, record) -> None:
        header["0"]["shape"] = [3, 2]

    def recast(header, record) -> None:
        header["0"]["dtype"] = "I32"

    for change in (reshape, recast, lambda header, record: record.pop("metadata")):
        forge(tmp_path / "runs-0-4.safetensors", change)
        with pytest.warns(UserWarning, match="is malformed: .*; its runs are trained again"):
            result = jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path)
        np.testing.assert_array_equal(result["loss"], expected["loss"])


def test_runs_of_two_sweeps_are_not_mixed(tmp_path) -> None:
    """Each file says which sweep it belongs to."""
    jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path / "a")
    jt.sweep(lambda slope: run(2 * slope), AXES, at_once=2, checkpoint=tmp_path / "b")
    name = "runs-0-2.safetensors"
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(jt.errors.InputError, match="belongs to another sweep: its run differs"):
        jt.sweep(run, AXES, at_once=2, checkpoint=tmp_path / "a")
