"""A logger that cannot write warns once in one sentence, and training continues."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    """Limits files to 100 bytes, as a quota or a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Limited(jt.callbacks.Callback):
    """Calls a logger, from the second epoch on without space on the disk."""

    def __init__(self, log: jt.callbacks.Callback) -> None:
        self.on_start = log.on_start
        self.on_steps = self.limited(log.on_steps)
        self.on_epoch = self.limited(log.on_epoch)
        self.on_end = self.limited(log.on_end)

    def limited(self, call: Callable[..., None]) -> Callable[..., None]:
        def limited_call(run: jt.Run, *arguments: Any) -> None:
            with no_space() if run.rows else contextlib.nullcontext():
                call(run, *arguments)

        return limited_call


def test_a_file_that_cannot_grow_ends_the_log_and_not_the_run(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, make = LOGGERS[kind]
    log = make(tmp_path)
    state, history = fit([Limited(log)], epochs=4)
    _, expected = fit([], epochs=4)
    (warning,) = recwarn
    message = str(warning.message)
    assert message.startswith(f"the {name} logger cannot write to {tmp_path}")
    assert message.endswith("(File too large); it stops logging, and training continues")
    assert np.array_equal(history.step_losses, expected.step_losses)
    assert len(history["epoch"]) == 4
    fit([log], epochs=1, state=state)
    assert len(recwarn) == 1  # it is silent afterwards


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
