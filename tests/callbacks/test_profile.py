"""profile: a trace of exactly the steps that were asked for, which changes no bit of the run."""

from __future__ import annotations

import collections
import contextlib
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxtrain as jt

LOSS = jt.losses.cross_entropy
BATCH_SIZE = 8  # seven steps per epoch of `small_classes`


def events(folder: Path) -> list[dict[str, Any]]:
    """The events of the only trace in a folder."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    if path.name == "perfetto_trace.json.gz":
        raise AssertionError(path)
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def annotations(folder: Path) -> list[int]:
    """The first steps of the blocks that are annotated in a trace, in their order."""
    found = [re.fullmatch(r"train steps from (\d+)", event["name"]) for event in events(folder)]
    return sorted(int(each[1]) for each in found if each)


def counts(folder: Path, program: str) -> collections.Counter[str]:
    """How often each operation of a compiled program ran."""
    return collections.Counter(
        event["args"]["hlo_op"]
        for event in events(folder)
        if program in event.get("args", {}).get("hlo_module", "")
    )


def steps_traced(folder: Path) -> set[int]:
    """How often the products of a training step ran, which run once per step."""
    # Other operations run once per call, or not in this loop.
    found = {count for name, count in counts(folder, "jit_compiled_steps").items() if "dot" in name}
    assert found
    return found


def fit(arguments: dict[str, Any], *callbacks: Any) -> Any:
    return jt.fit(**arguments, callbacks=list(callbacks))


def check_same(found: Any, expected: Any) -> None:
    (state, history), (other, others) = found, expected
    assert np.array_equal(history.step_losses, others.step_losses)
    leaves = zip(*map(jax.tree.leaves, (state.params, other.params)), strict=True)
    assert all(np.array_equal(one, two) for one, two in leaves)
    for name in set(history) - {"seconds"}:
        assert np.array_equal(history[name], others[name])


@pytest.fixture
def arguments(small_state: jt.TrainState, small_classes: jt.Dataset) -> dict[str, Any]:
    return {
        "state": small_state,
        "train": small_classes,
        "test": small_classes,
        "loss_fn": LOSS,
        "epochs": 3,
        "batch_size": BATCH_SIZE,
        "key": jax.random.key(1),
    }


def test_the_trace_has_the_steps_of_its_range_and_the_run_the_same_bits(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Steps 2 to 5 of the seven of the first epoch; the last step is a loop of its own."""
    folder = tmp_path / "runs" / "trace"
    profile = jt.callbacks.profile(str(folder), steps=(2, 6))
    for _ in range(2):  # it may be used again
        shutil.rmtree(folder, ignore_errors=True)
        check_same(fit(arguments, profile), fit(arguments))
        starts = annotations(folder)
        assert starts[0] == 2
        assert starts[-1] < 6
        assert steps_traced(folder) == {4}
    # For TensorBoard, and for Perfetto.
    (plane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    perfetto = json.loads(gzip.decompress((plane.parent / "perfetto_trace.json.gz").read_bytes()))
    assert any(event.get("name") == "train steps from 2" for event in perfetto["traceEvents"])
    data = jax.profiler.ProfileData.from_file(str(plane))
    names = {event.name for each in data.planes for line in each.lines for event in line.events}
    assert "train steps from 2" in names


def test_a_range_over_the_end_of_an_epoch_includes_the_evaluation(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    found = fit(arguments, jt.callbacks.profile(tmp_path, steps=(5, 10)))
    check_same(found, fit(arguments))
    starts = annotations(tmp_path)
    assert starts[0] == 5
    assert 7 in starts
    assert starts[-1] < 10
    assert counts(tmp_path, "evaluate")


def test_a_stream_is_traced(arguments: dict[str, Any], tmp_path: Path) -> None:
    batches = [arguments["train"][at : at + BATCH_SIZE] for at in range(0, 48, BATCH_SIZE)]
    arguments |= {"train": [jax.tree.map(np.asarray, batch) for batch in batches]}
    del arguments["key"], arguments["batch_size"]
    found = fit(arguments, jt.callbacks.profile(tmp_path, steps=(7, 11)))
    check_same(found, fit(arguments))
    assert annotations(tmp_path)[0] == 7
    assert steps_traced(tmp_path) == {4}


def test_steps_are_those_of_the_call_if_a_run_resumes(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    def checkpoint() -> Any:
        return jt.callbacks.checkpoint(tmp_path / "checkpoints", every_steps=3)

    def stop(run: jt.Run) -> None:
        if run.step == 3 and run.epoch == 1:
            raise KeyboardInterrupt

    class StopAfterSaving(jt.callbacks.Callback):
        saves = True  # called after the checkpoint

        def on_steps(self, run: jt.Run) -> None:
            stop(run)

    with pytest.raises(KeyboardInterrupt):
        fit(arguments, checkpoint(), StopAfterSaving())
    folder = tmp_path / "trace"
    found = fit(arguments, jt.callbacks.profile(folder, steps=(0, 2)), checkpoint())
    check_same(found, fit(arguments))
    assert annotations(folder)[0] == 0
    assert steps_traced(folder) == {2}


@pytest.mark.parametrize("cause", ["error", "early stopping", "last epoch"])
def test_a_run_that_ends_within_the_range_writes_its_trace(
    arguments: dict[str, Any], tmp_path: Path, cause: str
) -> None:
    def fail(run: jt.Run) -> None:
        if run.step == 4:
            raise RuntimeError("the callback's own")

    other, last_epoch = {
        "error": (jt.callbacks.every_steps(2, fail), 0),
        "early stopping": (jt.callbacks.early_stopping(1, "test_loss", "max"), 1),
        "last epoch": (lambda run: False, 2),
    }[cause]
    profile = jt.callbacks.profile(tmp_path, steps=(1, 1000))
    is_error = cause == "error"
    with pytest.raises(RuntimeError, match="own") if is_error else contextlib.nullcontext():
        fit(arguments, profile, other)
    starts = annotations(tmp_path)
    assert (starts[0], starts[-1] // 7) == (1, last_epoch)
    jax.profiler.start_trace(tmp_path / "another")  # none is running
    jax.profiler.stop_trace()


@pytest.mark.parametrize("first", [21, 22])
def test_a_range_that_is_never_reached_gives_a_warning(
    arguments: dict[str, Any], tmp_path: Path, first: int
) -> None:
    profile = jt.callbacks.profile(tmp_path, steps=(first, 30))
    with pytest.warns(UserWarning, match=rf"\({first}, 30\).* took 21 steps") as caught:
        jt.fit(**arguments, callbacks=[profile])
    if not hasattr(jt.init_state, "__wrapped__"):  # the check of types adds frames
        assert caught[0].filename == __file__
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        profile = jt.callbacks.profile(folder)
        with pytest.raises(jt.errors.InputError, match=r"the profile folder .* cannot be written"):
            fit(arguments, profile)


def test_a_folder_that_disappears_ends_the_run_with_its_progress(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "trace"

    def replace(run: jt.Run) -> None:
        if run.epoch == 1:
            shutil.rmtree(folder)
            folder.write_text("")

    with pytest.raises(jt.errors.StorageError, match=re.escape(str(folder))) as caught:
        fit(arguments, jt.callbacks.profile(folder, steps=(5, 10)), replace)
    assert len(caught.value.history["epoch"]) == 1
    fit(arguments, jt.callbacks.profile(tmp_path / "next", steps=(0, 1)))  # still possible
    assert annotations(tmp_path / "next") == [0]


def test_another_trace_is_refused_and_continues(arguments: dict[str, Any], tmp_path: Path) -> None:
    message = r"cannot be started .*jax\.profiler\.stop_trace"
    jax.profiler.start_trace(tmp_path / "other")
    try:
        with pytest.raises(jt.errors.InputError, match=message):
            fit(arguments, jt.callbacks.profile(tmp_path / "own"))
    finally:
        jax.profiler.stop_trace()
    assert list(tmp_path.glob("other/plugins/profile/*/*.xplane.pb"))


@pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the types are checked at run time"
)
@pytest.mark.parametrize("steps", [5, (1,), (3, 3), (-1, 4), (1.5, 3), "ab", (4, 2)])
def test_a_range_that_is_not_valid_is_refused(tmp_path: Path, steps: Any) -> None:
    with pytest.raises(jt.errors.InputError, match="steps"):
        jt.callbacks.profile(tmp_path, steps=steps)
    with pytest.raises(jt.errors.InputError, match="folder is 3"):
        jt.callbacks.profile(3)
