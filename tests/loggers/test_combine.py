"""combine: order, steps, the end of a run, and callbacks that fail."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxtrain as jt
from jaxtrain.training.events import Compiled, EpochDone, StepsDone
from tests.loggers.helpers import STEPS, fit


def test_callbacks_are_called_in_their_order_with_the_same_events() -> None:
    calls: list[tuple[str, Any]] = []
    combined = jt.loggers.combine(
        lambda event: calls.append(("a", event)), lambda event: calls.append(("b", event))
    )
    fit(combined, epochs=1)
    assert [name for name, _ in calls] == ["a", "b"] * (len(calls) // 2)
    assert all(a[1] is b[1] for a, b in zip(calls[::2], calls[1::2], strict=True))
    assert {type(event) for _, event in calls} == {Compiled, StepsDone, EpochDone}


@pytest.mark.parametrize("result", [True, np.True_])
def test_a_run_ends_if_any_callback_returns_true(result: object) -> None:
    def stop(event: jt.events.Event) -> object:
        return result if isinstance(event, EpochDone) and event.epoch == 2 else "no"

    inner = jt.loggers.combine(stop, lambda event: None)
    _, history = fit(jt.loggers.combine(lambda event: False, inner, lambda event: 1), epochs=4)
    assert len(history["epoch"]) == 2


def test_each_callback_receives_its_steps() -> None:
    steps: dict[int, list[int]] = {4: [], 6: []}
    losses: list[float] = []

    def record(interval: int) -> Any:
        def on_event(event: jt.events.Event) -> None:
            if isinstance(event, StepsDone):
                steps[interval].append(event.step)
                losses.extend(event.losses if interval == 4 else [])

        return jt.events.every_steps(interval, on_event)

    combined = jt.loggers.combine(record(4), print_nothing, record(6))
    assert combined.steps_between_events == 2
    assert jt.loggers.combine(combined, record(5)).steps_between_events == 1
    assert jt.loggers.combine(print_nothing).steps_between_events == 0
    assert jt.loggers.combine()(Compiled(0.0, 1, 1, 1)) is False
    _, history = fit(combined, epochs=1, batch_size=4)
    assert {4, 8, 12} <= set(steps[4])
    assert {6, 12} <= set(steps[6])
    assert losses == history.step_losses.tolist()


def print_nothing(event: jt.events.Event) -> None:
    pass


def test_a_callback_that_fails_is_not_called_again_and_training_continues(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    calls = []

    def fails(event: jt.events.Event) -> None:
        calls.append(event)
        raise RuntimeError("no connection\nto the server")

    with jt.loggers.csv(tmp_path / "log.csv") as log:
        _, history = fit(jt.loggers.combine(jt.events.every_steps(2, fails), log))
    (warning,) = recwarn
    assert "fails failed (RuntimeError: no connection); it is not called again, and training " in (
        str(warning.message)
    )
    assert len(calls) == 1
    assert len(history["epoch"]) == 2
    assert (tmp_path / "log.csv").read_text().count("\n") == 3


def test_a_picture_is_checked_and_reaches_every_logger(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with jt.loggers.tensorboard(tmp_path) as log:
        inner = jt.loggers.combine(jt.events.every_steps(3, log))
        combined = jt.loggers.combine(print_nothing, jt.events.every_steps(2, inner))
        combined.picture("picture", Figure(figsize=(2, 1)))
        with pytest.raises(jt.InputError, match="picture is a int; expected a matplotlib figure"):
            jt.loggers.combine(print_nothing).picture("number", 3)
    (file,) = tmp_path.iterdir()
    assert b"PNG" in file.read_bytes()
    assert isinstance(combined, typing.get_type_hints(jt.loggers.combine)["return"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_propagates(error: type[BaseException]) -> None:
    def interrupt(event: jt.events.Event) -> None:
        if isinstance(event, StepsDone):
            raise error

    with pytest.raises(error):
        fit(jt.loggers.combine(interrupt))


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="types are checked before")
def test_context_managers_and_other_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(jt.InputError, match="an argument of combine is a context manager"):
        jt.loggers.combine(jt.loggers.csv(tmp_path / "log.csv"))
    with pytest.raises(jt.InputError, match="an argument of combine is None"):
        jt.loggers.combine(None)


def test_progress_prints_its_lines(tmp_path: Path, capsys) -> None:
    with jt.progress(log_interval=2) as bar, jt.loggers.csv(tmp_path / "log.csv") as log:
        fit(jt.loggers.combine(bar, log), epochs=1)
    lines = capsys.readouterr().err
    assert "epoch 1  20/50 (40%)  loss" in lines
    assert "epoch 1  40/50 (80%)  loss" in lines
    assert STEPS == 5
