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


def test_the_files_have_the_history_and_the_loss_of_every_step(tmp_path: Path) -> None:
    metric_fns = {"accuracy": jt.metrics.accuracy, "confusion": jt.metrics.confusion_matrix}
    _, history = fit(loggers(tmp_path / "new"), epochs=3, metric_fns=metric_fns)
    assert np.shape(history["test_confusion"]) == (3, 3, 3)
    rows, steps = (read_csv(tmp_path / "new" / name) for name in ("log.csv", "steps.csv"))
    assert list(rows[0]) == ["epoch", "step", *list(history)[1:]]
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    assert list(steps[0]) == ["step", "epoch", "loss"]
    assert [int(row["step"]) for row in steps] == list(range(1, 3 * STEPS + 1))
    assert [row["epoch"] for row in steps[4:6]] == ["1", "2"]
    assert [float(row["loss"]) for row in steps] == history.step_losses.tolist()

    lines = read_lines(tmp_path / "new" / "log.jsonl")
    assert lines[STEPS]["event"] == "epoch"  # in the order of the calls
    json_steps = [row for row in lines if row["event"] == "step"]
    epochs = [row for row in lines if row["event"] == "epoch"]
    assert [row["step"] for row in json_steps] == list(range(1, 3 * STEPS + 1))
    assert [row["loss"] for row in json_steps] == history.step_losses.tolist()
    assert json_steps[STEPS - 1]["learning_rate"] == 0.1  # the last step of an epoch is a report
    assert [row["step"] for row in epochs] == [5, 10, 15]
    for name, values in history.items():  # arrays are nested lists
        assert [json.loads(row[name]) for row in rows] == values.tolist(), name
        assert [row[name] for row in epochs] == values.tolist(), name


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


@pytest.mark.parametrize("stop", [(2, 3), (2, 5)])
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


@pytest.mark.parametrize("same", [True, False], ids=["the same loggers", "new loggers"])
def test_calling_fit_again_with_the_returned_state_continues_the_files(
    tmp_path: Path, same: bool
) -> None:
    first = loggers(tmp_path)

    def train(state: jt.TrainState | None = None) -> Any:
        return fit(first if same else loggers(tmp_path), 1, state)

    def logged() -> tuple[list[str], list[str], list[int]]:
        rows, steps = (read_csv(tmp_path / name) for name in ("log.csv", "steps.csv"))
        lines = read_lines(tmp_path / "log.jsonl")
        return [r["epoch"] for r in rows], [s["loss"] for s in steps], [r["step"] for r in lines]

    state, history = train()
    _, second = train(state)
    steps = [1, 2, 3, 4, 5, 5]
    losses = [str(loss) for loss in [*history.step_losses.tolist(), *second.step_losses.tolist()]]
    assert logged() == (["1", "2"], losses, [*steps, 6, 7, 8, 9, 10, 10])
    train(state)  # the same epoch again
    assert logged() == (["1", "2"], losses, [*steps, 6, 7, 8, 9, 10, 10])
    train()  # from the start: another run
    assert logged() == (["1"], losses[:STEPS], steps)


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
    (tmp_path / "log.jsonl").write_text('{"event": "st')  # an incomplete first line
    fit([jt.callbacks.json_lines(tmp_path / "log.jsonl")], 1)
    assert len(read_lines(tmp_path / "log.jsonl")) == STEPS + 1


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
    with pytest.raises(jt.errors.InputError, match=r"path is .* \(it is a directory, not a"):
        jt.callbacks.csv(tmp_path)
    with pytest.raises(jt.errors.InputError, match=r"path is .*link.csv, .* \(it is a link, not"):
        jt.callbacks.json_lines(tmp_path / "link.csv")
    with pytest.raises(jt.errors.InputError, match=r"folder of the log .* cannot be written"):
        jt.callbacks.json_lines(tmp_path / "file" / "log.jsonl")
    with pytest.raises(jt.errors.InputError, match=r"path and steps are both .*; expected two"):
        jt.callbacks.csv(tmp_path / "a.csv", steps=tmp_path / "." / "a.csv")
    with pytest.raises(jt.errors.InputError, match=r"path is '.*'; expected a path"):
        jt.callbacks.csv("a\0b")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link.csv"}


def test_two_loggers_of_one_file_are_refused(tmp_path: Path) -> None:
    """Each would write its rows."""
    log = jt.callbacks.csv(tmp_path / "log.csv", steps=tmp_path / "steps.csv")
    for other in (
        log,
        jt.callbacks.csv(tmp_path / "." / "log.csv"),
        jt.callbacks.csv(tmp_path / "other.csv", steps=tmp_path / "log.csv"),
        jt.callbacks.json_lines(tmp_path / "steps.csv"),
        jt.callbacks.every_steps(2, jt.callbacks.csv(tmp_path / "log.csv")),
    ):
        with pytest.raises(jt.errors.InputError, match=r"2 loggers that write .*; expected one"):
            fit([log, other])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        *("name,grade\nMia,1\n", '{"name": "Mia"}\n', "\n\0"),
        "epoch,step,train_loss\n0,9,0.5\n",  # of Lightning's CSVLogger
        "step,loss,epoch\n1,0.5,1\n",
        '{"event": "step", "step": 1, "loss": 0.5}\n',
        '{"event": "epoch", "level": "info"}\n',  # of structlog
    ],
)
def test_a_file_of_other_content_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text(content)
    for make in (
        jt.callbacks.csv,
        jt.callbacks.json_lines,
        lambda path: jt.callbacks.csv(tmp_path / "log.csv", steps=path),
    ):
        with pytest.raises(
            jt.errors.InputError, match=r"is .*mine, .* \(it is not a log: it starts"
        ):
            make(mine)
    assert mine.read_text() == content
    assert list(tmp_path.iterdir()) == [mine]


def test_the_epochs_of_a_run_are_not_replaced_by_its_steps(tmp_path: Path) -> None:
    fit(loggers(tmp_path), 1)
    with pytest.raises(jt.errors.InputError, match=r"steps is .*log.csv, .* \(it is not a log"):
        jt.callbacks.csv(tmp_path / "new.csv", steps=tmp_path / "log.csv")


@pytest.mark.parametrize("name", ["log.csv", "steps.csv", "log.jsonl"])
def test_a_log_that_is_deleted_or_replaced_is_reported_once(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The run would otherwise append to a file that has no name."""

    def remove(run: jt.Run) -> None:
        if len(run.rows) == 1:
            (tmp_path / name).unlink()
            (tmp_path / name).write_text("mine") if name == "log.csv" else None

    _, history = fit([*loggers(tmp_path), remove], epochs=3)
    (warning,) = recwarn
    assert "(it was deleted or replaced); it stops logging" in str(warning.message)
    assert len(history["epoch"]) == 3
    assert (tmp_path / "log.csv").read_text() == "mine" or name != "log.csv"


def test_a_second_run_does_not_write_to_the_files_of_a_first(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Not one whose loggers are made during the first run, and not one that has made them."""
    second = loggers(tmp_path)

    def run_another(run: jt.Run) -> None:
        if len(run.rows) == 1:
            with pytest.raises(jt.errors.InputError, match="another run is writing to it"):
                loggers(tmp_path)
            fit(second, 1)

    _, history = fit([*loggers(tmp_path), run_another], 2)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 2
    assert all("(another run is writing to it); it stops logging" in each for each in messages)
    steps = [row for row in read_lines(tmp_path / "log.jsonl") if row["event"] == "step"]
    assert [row["loss"] for row in steps] == history.step_losses.tolist()
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "steps.csv")]
    assert losses == history.step_losses.tolist()
    loggers(tmp_path)  # released
