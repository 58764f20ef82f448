"""A logger that cannot write warns once in one sentence, and training continues."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.training.events import EpochDone, StepsDone
from tests.loggers.helpers import DATA, fit, make_state

LOGGERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "csv": ("CSV", lambda folder: jt.loggers.csv(folder / "log", steps=folder / "steps")),
    "json_lines": ("JSON lines", lambda folder: jt.loggers.json_lines(folder / "log")),
    "tensorboard": ("TensorBoard", jt.loggers.tensorboard),
}


@pytest.fixture(params=LOGGERS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "tensorboard":
        pytest.importorskip("tensorboardX")
    return request.param


def size_limited(on_event: Any, is_full: Callable[[jt.events.Event], bool]) -> Any:
    """Limits files to 100 bytes during some events, as a quota or a full disk does."""

    def limited(event: jt.events.Event) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if is_full(event):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            on_event(event)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def test_a_file_that_cannot_grow_ends_the_log_and_not_the_run(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, make = LOGGERS[kind]

    def is_full(event: jt.events.Event) -> bool:
        return isinstance(event, StepsDone | EpochDone) and event.epoch >= 2

    with make(tmp_path) as log:
        _, history = fit(size_limited(log, is_full), epochs=4)
    _, expected = fit(None, epochs=4)
    (warning,) = recwarn
    message = str(warning.message)
    assert message.startswith(f"the {name} logger cannot write to {tmp_path}")
    assert message.endswith("(File too large); it stops logging, and training continues")
    assert np.array_equal(history.step_losses, expected.step_losses)
    assert len(history["epoch"]) == 4


def test_a_place_that_disappears_before_the_first_step(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, make = LOGGERS[kind]
    folder = tmp_path / "folder"
    with make(folder) as log:
        shutil.rmtree(folder)
        folder.write_text("a file")
        _, history = fit(log)
    (warning,) = recwarn
    assert f"the {name} logger cannot write to {folder}" in str(warning.message)
    assert len(history["epoch"]) == 2


def test_a_failure_at_the_end_of_the_log_is_a_warning(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The file system of a network may report only on closing that a file was not written."""
    _, make = LOGGERS[kind]
    with make(tmp_path) as log:
        fit(log)
        close = log._writer.close

        def fail() -> None:
            close()
            raise OSError("lost")

        log._writer.close = fail
    (warning,) = recwarn
    assert "(OSError: lost); it stops logging" in str(warning.message)


def test_a_logger_that_failed_leaves_others_alone(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    _, make = LOGGERS[kind]
    with (
        make(tmp_path / "a") as fails,
        jt.loggers.json_lines(tmp_path / "b") as works,
    ):
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("a file")
        fit(jt.loggers.combine(fails, works))
    assert len(recwarn) == 1
    assert len((tmp_path / "b").read_text().splitlines()) == 12


def test_a_run_that_diverges_keeps_what_was_logged(tmp_path: Path, kind: str) -> None:
    _, make = LOGGERS[kind]

    def loss(predictions: Any, targets: Any) -> Any:
        return jt.losses.cross_entropy(predictions, targets) + jnp.where(targets == 9, jnp.nan, 0)

    bad = DATA.replace(targets=np.where(np.arange(50) == 45, 9, DATA.targets))
    with pytest.raises(jt.NonFiniteError), make(tmp_path) as log:
        jt.fit(
            make_state(),
            bad,
            loss_fn=loss,
            batch_size=10,
            on_event=jt.events.every_steps(1, log),
        )
    assert log._writer is None  # closed
    if kind == "json_lines":
        assert len((tmp_path / "log").read_text().splitlines()) == 4
    if kind == "csv":
        assert (tmp_path / "steps").read_text().count("\n") == 5
    if kind == "tensorboard":
        (file,) = tmp_path.glob("*tfevents*")
        assert file.read_bytes().count(b"step_loss") == 4


def test_a_logger_that_failed_is_silent_afterwards(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with jt.loggers.json_lines(tmp_path / "log") as log:
        fit(size_limited(log, lambda event: not isinstance(event, EpochDone)), epochs=5)
    assert len(recwarn) == 1
