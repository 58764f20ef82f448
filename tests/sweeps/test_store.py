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


def test_a_finished_sweep_is_read_from_its_folder(tmp_path) -> None:
    first = jt.sweep(run, AXES, checkpoint=tmp_path)
    events = []
    second = jt.sweep(run, AXES, at_once=3, checkpoint=tmp_path, callbacks=[events.append])
    assert events == [SweepProgress(6, 6, kind="started")]
    np.testing.assert_array_equal(first["loss"], second["loss"])


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
    jt.sweep(run, AXES, checkpoint=tmp_path)
    with pytest.raises(jt.errors.InputError, match="belongs to another sweep: its axes differ"):
        jt.sweep(run, {"slope": range(7)}, checkpoint=tmp_path)

    def other(slope):
        state, history = run(slope)
        return state, {"loss": 2 * history["loss"]}

    with pytest.raises(jt.errors.InputError, match="another sweep: its run differs in code, data"):
        jt.sweep(other, AXES, checkpoint=tmp_path)


def test_a_run_with_other_data_is_refused(tmp_path) -> None:
    def with_data(data):
        return lambda slope: {"loss": slope * data}

    jt.sweep(with_data(jnp.arange(3.0)), AXES, checkpoint=tmp_path)
    jt.sweep(with_data(jnp.arange(3.0)), AXES, checkpoint=tmp_path)
    with pytest.raises(jt.errors.InputError, match="its run differs"):
        jt.sweep(with_data(jnp.arange(3.0) + 1), AXES, checkpoint=tmp_path)


def test_a_folder_with_an_unreadable_identity_is_refused(tmp_path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(jt.errors.InputError, match=r"sweep\.json cannot be read"):
        jt.sweep(run, AXES, checkpoint=tmp_path)
