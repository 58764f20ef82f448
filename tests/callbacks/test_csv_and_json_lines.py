"""CSV and JSON lines, read by Python's own parsers; runs that resume, repeat or are killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jaxtrain as jt
from tests.callbacks.helpers import STEPS, fit, interrupt_at, make_state


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loggers(folder: Path) -> list[jt.callbacks.Callback]:
    return [
        jt.callbacks.csv(folder / "log.csv", steps=folder / "steps.csv"),
        jt.callbacks.json_lines(folder / "log.jsonl"),
    ]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_csv_has_the_history_and_the_loss_of_every_step(tmp_path: Path) -> None:
    log = jt.callbacks.csv(tmp_path / "new" / "log.csv", steps=tmp_path / "steps.csv")
    _, history = fit([log], epochs=3)
    rows = read_csv(tmp_path / "new" / "log.csv")
    assert list(rows[0]) == ["epoch", "step", *list(history)[1:]]
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    for name, values in history.items():
        assert [float(row[name]) for row in rows] == values.tolist(), name
    steps = read_csv(tmp_path / "steps.csv")
    assert list(steps[0]) == ["step", "epoch", "loss"]
    assert [int(row["step"]) for row in steps] == list(range(1, 3 * STEPS + 1))
    assert [row["epoch"] for row in steps[4:6]] == ["1", "2"]
    assert [float(row["loss"]) for row in steps] == history.step_losses.tolist()


def test_json_lines_have_the_history_and_the_loss_of_every_step(tmp_path: Path) -> None:
    _, history = fit([jt.callbacks.json_lines(str(tmp_path / "log.jsonl"))], epochs=3)
    rows = read_lines(tmp_path / "log.jsonl")
    steps = [row for row in rows if row["event"] == "step"]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["step"] for row in steps] == list(range(1, 3 * STEPS + 1))
    assert [row["loss"] for row in steps] == history.step_losses.tolist()
    assert steps[STEPS - 1]["learning_rate"] == 0.1  # the last step of an epoch is a report
    assert [row["step"] for row in epochs] == [5, 10, 15]
    for name, values in history.items():
        assert [row[name] for row in epochs] == values.tolist(), name
    assert rows[STEPS]["event"] == "epoch"  # in the order of the calls


def test_arrays_are_nested_lists(tmp_path: Path) -> None:
    metric_fns = {"confusion": jt.metrics.confusion_matrix}
    _, history = fit(loggers(tmp_path), metric_fns=metric_fns)
    expected = history["test_confusion"].tolist()
    assert np.shape(expected) == (2, 3, 3)
    rows = read_csv(tmp_path / "log.csv")
    assert [json.loads(row["test_confusion"]) for row in rows] == expected
    lines = [row for row in read_lines(tmp_path / "log.jsonl") if row["event"] == "epoch"]
    assert [row["test_confusion"] for row in lines] == expected


def test_lines_are_on_disk_as_soon_as_they_are_reported(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.jsonl", []

    def count(run: jt.Run) -> None:
        seen.append((int(run.state.step), len(read_lines(path))))

    log = jt.callbacks.json_lines(path)
    fit([log, jt.callbacks.every_steps(1, count), count], epochs=1)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6)]


def test_a_value_that_is_not_finite_is_null_in_json_and_nan_in_csv(tmp_path: Path) -> None:
    row = {"epoch": 1, "train_loss": float("nan"), "array": np.float32([1, np.inf])}
    run = SimpleNamespace(
        state=make_state().replace(step=2),
        epoch=1,
        rows=(row,),
        losses=np.float32([np.nan, np.inf]),
        resumed=False,
    )
    for log in loggers(tmp_path):
        log.on_start(run)
        log.on_steps(run)
        log.on_epoch(run)
        log.on_end(run, None)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    rows = read_lines(tmp_path / "log.jsonl")
    assert [row.get("loss", row.get("train_loss")) for row in rows] == [None, None, None]
    assert rows[-1]["array"] == [1.0, None]
    (epoch,) = read_csv(tmp_path / "log.csv")
    assert (epoch["train_loss"], epoch["array"]) == ("nan", "[1.0, null]")
    assert [row["loss"] for row in read_csv(tmp_path / "steps.csv")] == ["nan", "inf"]


@pytest.mark.parametrize("stop", [(2, 3), (2, 5), (3, 1)])
def test_a_run_that_resumes_continues_its_files(tmp_path: Path, stop: tuple[int, int]) -> None:
    """Interrupted within an epoch or at its end; checkpoints every 2 steps and after epochs."""

    def train(folder: Path, stop: tuple[int, int]) -> None:
        checkpoint = jt.callbacks.checkpoint(folder / "checkpoints", every_steps=2)
        fit([*loggers(folder), interrupt_at(*stop), checkpoint], epochs=4)

    never = (0, 0)
    train(tmp_path / "once", never)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "twice", stop)
    train(tmp_path / "twice", never)
    for name, read in (("log.csv", read_csv), ("steps.csv", read_csv), ("log.jsonl", read_lines)):
        once, twice = read(tmp_path / "once" / name), read(tmp_path / "twice" / name)
        assert without_seconds(twice) == without_seconds(once), name


def test_steps_are_logged_before_a_checkpoint_within_an_epoch(tmp_path: Path) -> None:
    """Otherwise a run that is killed after it would never log them."""
    path, checkpoint = tmp_path / "steps.csv", jt.callbacks.checkpoint(tmp_path, every_steps=2)
    log, saved, save = jt.callbacks.csv(tmp_path / "log.csv", steps=path), [], checkpoint.on_steps

    def on_steps(run: jt.Run) -> None:
        save(run)
        saved.append((run.step, len(read_csv(path))))

    checkpoint.on_steps = on_steps
    fit([checkpoint, log], epochs=1)
    assert {(2, 2), (4, 4), (5, 5)} <= set(saved)


def test_calling_fit_again_with_the_returned_state_continues_the_files(tmp_path: Path) -> None:
    state, first = fit(loggers(tmp_path), 1)
    _, second = fit(loggers(tmp_path), 2, state)
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1", "2", "3"]
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "steps.csv")]
    assert losses == [*first.step_losses, *second.step_losses]
    fit(loggers(tmp_path), 1)  # from the start: another run
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1"]
    assert len(read_csv(tmp_path / "steps.csv")) == STEPS


def test_one_logger_serves_several_calls_of_fit(tmp_path: Path) -> None:
    callbacks = loggers(tmp_path)
    steps = [1, 2, 3, 4, 5, 5]
    state, _ = fit(callbacks, 1)
    fit(callbacks, 1, state)
    found = [row["step"] for row in read_lines(tmp_path / "log.jsonl")]
    assert found == [*steps, 6, 7, 8, 9, 10, 10]
    fit(callbacks, 1, state)  # the same epoch again
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1", "2"]
    fit(callbacks, 1)
    assert [row["step"] for row in read_lines(tmp_path / "log.jsonl")] == steps
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1"]


def test_a_run_that_fails_before_its_first_step_keeps_the_earlier_log(tmp_path: Path) -> None:
    def fails(predictions: Any, targets: Any) -> Any:
        raise RuntimeError("while it is traced")

    fit(loggers(tmp_path))
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="while it is traced"):
        fit(loggers(tmp_path), loss_fn=fails)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_incomplete_lines_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    state, _ = fit(loggers(tmp_path), 1)
    for name, part in (
        ("log.csv", "2,5,0.1"),
        ("steps.csv", "5,1,0"),  # complete but for the end of the number
        ("log.jsonl", '{"event": "step", "step": 4, "lo'),
    ):
        with (tmp_path / name).open("a") as file:
            file.write(part)
    fit(loggers(tmp_path), 1, state)
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1", "2"]
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == [*map(str, range(1, 11))]
    assert len(read_lines(tmp_path / "log.jsonl")) == 12


def test_a_part_of_the_first_line_is_not_other_content(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for part in ("{", '{"event": "st'):
        path.write_text(part)
        fit([jt.callbacks.json_lines(path)], 1)
        assert len(read_lines(path)) == STEPS + 1


def test_a_new_column_is_added_when_a_run_continues(tmp_path: Path) -> None:
    state, _ = fit(loggers(tmp_path), 1)
    fit(loggers(tmp_path), 1, state, metric_fns={"top_2": jt.metrics.top_k_accuracy(2)})
    first, second = read_csv(tmp_path / "log.csv")
    assert (first["test_top_2"], second["test_accuracy"]) == ("", "")
    assert float(first["test_accuracy"]) <= 1
    assert float(second["test_top_2"]) <= 1


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link.csv").symlink_to(tmp_path / "file")
    with pytest.raises(jt.errors.InputError, match=r"path is .*, which is not a regular file"):
        jt.callbacks.csv(tmp_path)
    with pytest.raises(jt.errors.InputError, match=r"path is .*link.csv, which is not a regular"):
        jt.callbacks.json_lines(tmp_path / "link.csv")
    with pytest.raises(jt.errors.InputError, match=r"folder of the log .* cannot be written"):
        jt.callbacks.json_lines(tmp_path / "file" / "log.jsonl")
    with pytest.raises(jt.errors.InputError, match=r"path and steps are both .*; expected two"):
        jt.callbacks.csv(tmp_path / "a.csv", steps=tmp_path / "." / "a.csv")
    with pytest.raises(jt.errors.InputError, match=r"path is '.*'; expected a path"):
        jt.callbacks.csv("a\0b")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link.csv"}


@pytest.mark.parametrize("content", ["name,grade\nMia,1\n", '{"name": "Mia"}\n', "a text", "\n\0"])
def test_a_file_of_other_content_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text(content)
    for make in (
        jt.callbacks.csv,
        jt.callbacks.json_lines,
        lambda path: jt.callbacks.csv(tmp_path / "log.csv", steps=path),
    ):
        with pytest.raises(jt.errors.InputError, match=r"is .*mine, which is not a log file \(it"):
            make(mine)
    assert mine.read_text() == content
    assert list(tmp_path.iterdir()) == [mine]
