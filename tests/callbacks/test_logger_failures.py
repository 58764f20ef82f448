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
from tests.callbacks.helpers import DATA, fit, make_state

LOGGERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "csv": ("CSV", lambda folder: jt.callbacks.csv(folder / "log", steps=folder / "steps")),
    "json_lines": ("JSON lines", lambda folder: jt.callbacks.json_lines(folder / "log")),
    "tensorboard": ("TensorBoard", jt.callbacks.tensorboard),
}


@pytest.fixture(params=LOGGERS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "tensorboard":
        pytest.importorskip("tensorboardX")
    return request.param


class SizeLimited(jt.callbacks.Callback):
    """Limits files to 100 bytes during some calls, as a quota or a full disk does."""

    def __init__(self, log: jt.callbacks.Callback, first_epoch: int, *names: str) -> None:
        self.log, self.first_epoch, self.names = log, first_epoch, names

    def call(self, name: str, run: jt.Run, *arguments: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if name in self.names and len(run.rows) >= self.first_epoch - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            getattr(self.log, name)(run, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def on_start(self, run: jt.Run) -> None:
        self.call("on_start", run)

    def on_steps(self, run: jt.Run) -> None:
        self.call("on_steps", run)

    def on_epoch(self, run: jt.Run) -> None:
        self.call("on_epoch", run)

    def on_end(self, run: jt.Run, error: BaseException | None) -> None:
        self.call("on_end", run, error)


def test_a_file_that_cannot_grow_ends_the_log_and_not_the_run(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, make = LOGGERS[kind]
    log = SizeLimited(make(tmp_path), 2, "on_steps", "on_epoch", "on_end")
    _, history = fit([log], epochs=4)
    _, expected = fit([], epochs=4)
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
    log = make(folder)
    shutil.rmtree(folder)
    folder.write_text("a file")
    works = jt.callbacks.json_lines(tmp_path / "works")
    _, history = fit([log, works])
    if kind == "tensorboard":
        log.picture("silent", b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR" + bytes(8))
    (warning,) = recwarn
    assert f"the {name} logger cannot write to {folder}" in str(warning.message)
    assert len(history["epoch"]) == 2
    assert len((tmp_path / "works").read_text().splitlines()) == 12


def test_a_failure_at_the_end_of_the_log_is_a_warning(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The file system of a network may report only on closing that a file was not written."""
    log = LOGGERS[kind][1](tmp_path)
    close = log._close

    def fail(error: BaseException | None) -> None:
        close(error)
        if log._step:  # not when it is opened
            raise OSError("lost")

    log._close = fail
    fit([log])
    (warning,) = recwarn
    assert "(OSError: lost); it stops logging" in str(warning.message)


def test_a_run_that_diverges_keeps_what_was_logged(tmp_path: Path, kind: str) -> None:
    log = LOGGERS[kind][1](tmp_path)

    def loss(predictions: Any, targets: Any) -> Any:
        return jt.losses.cross_entropy(predictions, targets) + jnp.where(targets == 9, jnp.nan, 0)

    bad = DATA.replace(targets=np.where(np.arange(50) == 45, 9, DATA.targets))
    with pytest.raises(jt.errors.NonFiniteError):
        jt.fit(
            make_state(),
            bad,
            loss_fn=loss,
            batch_size=10,
            callbacks=[log, jt.callbacks.every_steps(1, lambda run: None)],
        )
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
    log = SizeLimited(jt.callbacks.json_lines(tmp_path / "log"), 1, "on_steps")
    state, _ = fit([log], epochs=5)
    fit([log], epochs=1, state=state)
    assert len(recwarn) == 1
