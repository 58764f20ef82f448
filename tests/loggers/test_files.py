"""CSV and JSON lines, read by Python's own parsers; runs that resume, repeat or are killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.training.events import EpochDone, StepsDone
from tests.loggers.helpers import STEPS, fit, make_state


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_csv_has_the_history_and_the_loss_of_every_step(tmp_path: Path) -> None:
    with jt.loggers.csv(tmp_path / "new" / "log.csv", steps=tmp_path / "steps.csv") as log:
        _, history = fit(log, epochs=3)
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
    with jt.loggers.json_lines(str(tmp_path / "log.jsonl")) as log:
        _, history = fit(log, epochs=3)
    rows = read_lines(tmp_path / "log.jsonl")
    steps = [row for row in rows if row["event"] == "step"]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["step"] for row in steps] == list(range(1, 3 * STEPS + 1))
    assert [row["loss"] for row in steps] == history.step_losses.tolist()
    assert steps[STEPS - 1]["learning_rate"] == 0.1  # the last step of an epoch is a report
    assert [row["step"] for row in epochs] == [5, 10, 15]
    for name, values in history.items():
        assert [row[name] for row in epochs] == values.tolist(), name
    assert rows[STEPS]["event"] == "epoch"  # in the order of the events


def test_lines_are_on_disk_as_soon_as_they_are_reported(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.jsonl", []

    def count(event: jt.events.Event) -> None:
        if isinstance(event, StepsDone | EpochDone):
            seen.append((int(event.state.step), len(read_lines(path))))

    with jt.loggers.json_lines(path) as log:
        fit(jt.loggers.combine(log, jt.events.every_steps(1, count)), epochs=1)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6)]


def test_a_value_that_is_not_finite_is_null_in_json_and_nan_in_csv(tmp_path: Path) -> None:
    event = StepsDone(1, 2, 20, np.float32([np.nan, np.inf]), make_state().replace(step=2))
    done = EpochDone(1, {"epoch": 1, "train_loss": float("nan")}, event.state)
    with (
        jt.loggers.json_lines(tmp_path / "log.jsonl") as lines,
        jt.loggers.csv(tmp_path / "log.csv", steps=tmp_path / "steps.csv") as table,
    ):
        for log in (lines, table):
            log(event)
            log(done)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    rows = read_lines(tmp_path / "log.jsonl")
    assert [row.get("loss", row.get("train_loss")) for row in rows] == [None, None, None]
    assert read_csv(tmp_path / "log.csv")[0]["train_loss"] == "nan"
    assert [row["loss"] for row in read_csv(tmp_path / "steps.csv")] == ["nan", "inf"]


@pytest.mark.parametrize("stop", [(2, 3), (2, 5), (3, 1)])
def test_a_run_that_resumes_continues_its_files(tmp_path: Path, stop: tuple[int, int]) -> None:
    """Interrupted within an epoch or at its end; checkpoints every 2 steps and after epochs."""

    def train(folder: Path, stop: tuple[int, int] | None) -> None:
        def interrupt(event: jt.events.Event) -> None:
            if isinstance(event, StepsDone) and (event.epoch, event.step) == stop:
                raise KeyboardInterrupt

        with (
            jt.loggers.csv(folder / "log.csv", steps=folder / "steps.csv") as table,
            jt.loggers.json_lines(folder / "log.jsonl") as lines,
        ):
            callback = jt.loggers.combine(table, lines, jt.events.every_steps(1, interrupt))
            options = jt.CheckpointOptions(folder / "checkpoints", every_steps=2)
            fit(callback, epochs=4, checkpoint=options)

    train(tmp_path / "once", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "twice", stop)
    train(tmp_path / "twice", None)
    for name, read in (("log.csv", read_csv), ("steps.csv", read_csv), ("log.jsonl", read_lines)):
        once, twice = read(tmp_path / "once" / name), read(tmp_path / "twice" / name)
        assert without_seconds(twice) == without_seconds(once), name


def test_steps_are_reported_before_a_checkpoint_within_an_epoch(tmp_path: Path) -> None:
    """Otherwise a run that is killed after it would never report them."""
    reported = []

    def on_event(event: jt.events.Event) -> None:
        if isinstance(event, StepsDone):
            reported.append(event.step)

    fit(on_event, epochs=1, checkpoint=jt.CheckpointOptions(tmp_path, every_steps=2))
    assert {2, 4, 5} <= set(reported)


def test_calling_fit_again_with_the_returned_state_continues_the_files(tmp_path: Path) -> None:
    def logged(epochs: int, state: jt.TrainState | None = None) -> tuple[jt.TrainState, Any]:
        with jt.loggers.csv(tmp_path / "log.csv", steps=tmp_path / "steps.csv") as log:
            return fit(log, epochs, state)

    state, first = logged(1)
    _, second = logged(2, state)
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1", "2", "3"]
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "steps.csv")]
    assert losses == [*first.step_losses, *second.step_losses]
    logged(1)  # from the start: another run
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1"]
    assert len(read_csv(tmp_path / "steps.csv")) == STEPS


def test_one_logger_serves_several_calls_of_fit(tmp_path: Path) -> None:
    with jt.loggers.json_lines(tmp_path / "log.jsonl") as log:
        state, _ = fit(log, 1)
        fit(log, 1, state)
        steps = [row["step"] for row in read_lines(tmp_path / "log.jsonl")]
        assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
        fit(log, 1)
    assert [row["step"] for row in read_lines(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 5]


def test_incomplete_lines_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    def logged(state: jt.TrainState | None = None) -> jt.TrainState:
        with (
            jt.loggers.csv(tmp_path / "log.csv", steps=tmp_path / "steps.csv") as table,
            jt.loggers.json_lines(tmp_path / "log.jsonl") as lines,
        ):
            return fit(jt.loggers.combine(table, lines), 1, state)[0]

    state = logged()
    for name, part in (
        ("log.csv", "2,5,0.1"),
        ("steps.csv", "5,1,0"),  # complete but for the end of the number
        ("log.jsonl", '{"event": "step", "step": 4, "lo'),
    ):
        with (tmp_path / name).open("a") as file:
            file.write(part)
    logged(state)
    assert [row["epoch"] for row in read_csv(tmp_path / "log.csv")] == ["1", "2"]
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == [*map(str, range(1, 11))]
    assert len(read_lines(tmp_path / "log.jsonl")) == 12


def test_a_part_of_the_first_line_is_not_other_content(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for part in ("{", '{"event": "st'):
        path.write_text(part)
        with jt.loggers.json_lines(path) as log:
            fit(log, 1)
        assert len(read_lines(path)) == STEPS + 1


def test_a_new_column_is_added_when_a_run_continues(tmp_path: Path) -> None:
    def logged(state: jt.TrainState | None, **options: Any) -> jt.TrainState:
        with jt.loggers.csv(tmp_path / "log.csv") as log:
            return fit(log, 1, state, **options)[0]

    state = logged(None)
    logged(state, state_metrics={"one": lambda state: 1.0}, metric_fns={})
    first, second = read_csv(tmp_path / "log.csv")
    assert (first["one"], second["one"]) == ("", "1.0")
    assert first["test_accuracy"] != ""
    assert second["test_accuracy"] == ""


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link.csv").symlink_to(tmp_path / "file")
    with pytest.raises(jt.InputError, match=r"path is .*, which is not a regular file"):
        jt.loggers.csv(tmp_path)
    with pytest.raises(jt.InputError, match=r"path is .*link.csv, which is not a regular file"):
        jt.loggers.json_lines(tmp_path / "link.csv")
    with pytest.raises(jt.InputError, match=r"folder of the log .* cannot be written"):
        jt.loggers.json_lines(tmp_path / "file" / "log.jsonl")
    with pytest.raises(jt.InputError, match=r"path and steps are both .*; expected two files"):
        jt.loggers.csv(tmp_path / "a.csv", steps=tmp_path / "." / "a.csv")
    with pytest.raises(jt.InputError, match=r"path is '.*'; expected a path"):
        jt.loggers.csv("a\0b")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link.csv"}


@pytest.mark.parametrize("content", ["name,grade\nMia,1\n", '{"name": "Mia"}\n', "a text", "\n\0"])
def test_a_file_of_other_content_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text(content)
    for make in (
        jt.loggers.csv,
        jt.loggers.json_lines,
        lambda path: jt.loggers.csv(tmp_path / "log.csv", steps=path),
    ):
        with pytest.raises(jt.InputError, match=r"is .*mine, which contains something else than"):
            make(mine)
    assert mine.read_text() == content
    assert list(tmp_path.iterdir()) == [mine]


def test_a_closed_logger_says_so(tmp_path: Path) -> None:
    with jt.loggers.csv(tmp_path / "log.csv") as log:
        pass
    with pytest.raises(jt.InputError, match=r"the CSV logger of .* is closed; expected the call"):
        fit(log)
