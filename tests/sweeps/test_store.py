"""The checkpoint folder of a sweep: interruption, resuming, damage, another sweep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.callbacks import SweepProgress

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
