"""profile: a trace of exactly the steps that were asked for, which changes no bit of the run."""

from __future__ import annotations

import collections
import contextlib
import gzip
import itertools
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


def annotations(folder: Path) -> list[tuple[int, int]]:
    """The ranges of steps that are annotated in a trace, in their order."""
    found = [re.fullmatch(r"train steps (\d+) to (\d+)", event["name"]) for event in events(folder)]
    return sorted((int(each[1]), int(each[2])) for each in found if each)


def counts(folder: Path, program: str) -> collections.Counter[str]:
    """How often each operation of a compiled program ran."""
    return collections.Counter(
        event["args"]["hlo_op"]
        for event in events(folder)
        if event.get("args", {}).get("hlo_module") == program
    )


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
        "train_data": small_classes,
        "test_data": small_classes,
        "loss_fn": LOSS,
        "epochs": 3,
        "batch_size": BATCH_SIZE,
        "key": jax.random.key(1),
    }


def test_the_trace_has_the_steps_of_its_range_and_the_run_the_same_bits(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Steps 2 to 5 of the seven of the first epoch; the last step is a loop of its own."""
    found = jt.fit(**arguments, profile=tmp_path, profile_steps=(2, 6))
    check_same(found, jt.fit(**arguments))
    ranges = annotations(tmp_path)
    assert (ranges[0][0], ranges[-1][1]) == (2, 5)
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(ranges))
    # The products run once per step, other operations once per call, or not in this loop.
    ran = counts(tmp_path, "jit_compiled_steps")
    products = {name: count for name, count in ran.items() if "dot" in name}
    assert products
    assert set(products.values()) == {4}


def test_both_viewers_find_their_files(arguments: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "trace"
    jt.fit(**arguments, profile=str(folder), profile_steps=(1, 3))
    (plane,) = folder.glob("plugins/profile/*/*.xplane.pb")  # TensorBoard
    perfetto = json.loads(gzip.decompress((plane.parent / "perfetto_trace.json.gz").read_bytes()))
    assert any(
        event.get("name", "").startswith("train steps 1 ") for event in perfetto["traceEvents"]
    )
    data = jax.profiler.ProfileData.from_file(str(plane))
    names = {event.name for each in data.planes for line in each.lines for event in line.events}
    assert any(name.startswith("train steps 1 ") for name in names)


def test_a_range_over_the_end_of_an_epoch_includes_the_evaluation(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    found = jt.fit(**arguments, profile=tmp_path, profile_steps=(5, 10))
    check_same(found, jt.fit(**arguments))
    ranges = annotations(tmp_path)
    assert (ranges[0][0], ranges[-1][1]) == (5, 9)
    assert counts(tmp_path, "jit_compiled_evaluate")
    assert sum(stop - start + 1 for start, stop in ranges) == 5


def test_a_stream_is_traced(arguments: dict[str, Any], tmp_path: Path) -> None:
    batches = [arguments["train_data"][at : at + BATCH_SIZE] for at in range(0, 48, BATCH_SIZE)]
    arguments |= {"train_data": [jax.tree.map(np.asarray, batch) for batch in batches]}
    del arguments["key"], arguments["batch_size"]
    found = jt.fit(**arguments, profile=tmp_path, profile_steps=(7, 11))
    check_same(found, jt.fit(**arguments))
    ranges = annotations(tmp_path)
    assert (ranges[0][0], ranges[-1][1]) == (7, 10)
    products = {
        name: count for name, count in counts(tmp_path, "jit_train_group").items() if "dot" in name
    }
    assert products
    assert set(products.values()) == {4}


def test_steps_are_those_of_the_call_if_a_run_resumes(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    options = jt.CheckpointOptions(tmp_path / "checkpoints", every_steps=3)

    def stop(event: Any) -> None:
        if isinstance(event, jt.events.StepsDone) and event.step == 3 and event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jt.fit(**arguments, checkpoint=options, on_event=jt.events.every_steps(3, stop))
    folder = tmp_path / "trace"
    found = jt.fit(**arguments, checkpoint=options, profile=folder, profile_steps=(0, 2))
    check_same(found, jt.fit(**arguments))
    ranges = annotations(folder)
    assert (ranges[0][0], ranges[-1][1]) == (0, 1)


@pytest.mark.parametrize("cause", ["error", "callback", "early stopping", "last epoch"])
def test_a_run_that_ends_within_the_range_writes_its_trace(
    arguments: dict[str, Any], tmp_path: Path, cause: str
) -> None:
    def on_event(event: Any) -> bool:
        if cause == "error" and isinstance(event, jt.events.StepsDone) and event.step == 4:
            raise RuntimeError("the callback's own")
        return cause == "callback" and isinstance(event, jt.events.EpochDone)

    arguments["on_event"] = jt.events.every_steps(2, on_event)
    if cause == "early stopping":
        arguments["early_stopping"] = jt.EarlyStopping(1, monitor="test_loss", mode="max")
    is_error = cause == "error"
    with pytest.raises(RuntimeError, match="own") if is_error else contextlib.nullcontext():
        jt.fit(**arguments, profile=tmp_path, profile_steps=(1, 1000))
    last = {"error": 3, "callback": 6, "early stopping": 13, "last epoch": 20}[cause]
    ranges = annotations(tmp_path)
    assert (ranges[0][0], ranges[-1][1]) == (1, last)
    jax.profiler.start_trace(tmp_path / "another")  # none is running
    jax.profiler.stop_trace()


def test_a_range_that_is_never_reached_gives_a_warning(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"\(21, 30\).* took 21 steps") as caught:
        jt.fit(**arguments, profile=tmp_path, profile_steps=(21, 30))
    if not hasattr(jt.init_state, "__wrapped__"):  # the check of types adds frames
        assert caught[0].filename == __file__
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", "a\0b"):
        with pytest.raises(jt.InputError, match=r"the profile folder .* cannot be written"):
            jt.fit(**arguments, profile=folder)


def test_a_folder_that_disappears_ends_the_run_with_its_progress(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "trace"

    def replace(event: Any) -> None:
        if isinstance(event, jt.events.EpochDone) and event.epoch == 1:
            shutil.rmtree(folder)
            folder.write_text("")

    with pytest.raises(jt.StorageError, match=re.escape(str(folder))) as caught:
        jt.fit(**arguments, profile=folder, profile_steps=(5, 10), on_event=replace)
    assert len(caught.value.history["epoch"]) == 1
    jt.fit(**arguments, profile=tmp_path / "next", profile_steps=(0, 1))  # still possible
    assert annotations(tmp_path / "next") == [(0, 0)]


def test_another_trace_is_refused_and_continues(arguments: dict[str, Any], tmp_path: Path) -> None:
    jax.profiler.start_trace(tmp_path / "other")
    try:
        with pytest.raises(jt.InputError, match=r"cannot be started .*jax\.profiler\.stop_trace"):
            jt.fit(**arguments, profile=tmp_path / "own")
    finally:
        jax.profiler.stop_trace()
    assert list(tmp_path.glob("other/plugins/profile/*/*.xplane.pb"))


@pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the types are checked at run time"
)
@pytest.mark.parametrize("steps", [5, (1,), (3, 3), (-1, 4), (1.5, 3), "ab", (4, 2)])
def test_a_range_that_is_not_valid_is_refused(arguments: dict[str, Any], steps: Any) -> None:
    with pytest.raises(jt.InputError, match="profile_steps"):
        jt.fit(**arguments, profile_steps=steps)
    with pytest.raises(jt.InputError, match="profile is 3"):
        jt.fit(**arguments, profile=3)
