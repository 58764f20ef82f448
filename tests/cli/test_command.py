"""The command line: flags that an error names, safeguards and signals."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxtrain as jt
from experiments import losses, mnist
from jaxtrain.cli.command import report_errors
from jaxtrain.cli.flags import with_safeguards
from jaxtrain.cli.resuming import checkpoint_callbacks
from jaxtrain.errors import MissingExtraError
from tests.test_experiments import SCRIPTS

ROOT = Path(__file__).parents[2]


def test_flags_wrap_the_optimizer_in_safeguards() -> None:
    optimizer, params = jt.optimizers.sgd(0.1), jnp.zeros(2)
    assert with_safeguards(optimizer, mnist.Config()) is optimizer
    config = mnist.Config(max_gradient_norm=1.0, on_nonfinite="skip")
    safe = with_safeguards(optimizer, config)
    update, state = safe.update(jnp.array([3.0, 4.0]), safe.init(params), params)
    assert float(jnp.linalg.norm(update)) == pytest.approx(0.1)
    assert jt.optimizers.records(state)["skipped_steps"].value == 0


def test_checkpoints_record_the_flags_that_decide_the_result(tmp_path: Path) -> None:
    assert checkpoint_callbacks(mnist.Config()) == []
    config = mnist.Config(
        checkpoint_dir=tmp_path, checkpoint_every=2, keep=4, max_gradient_norm=1.0
    )
    (callback,) = checkpoint_callbacks(config, part="a", dataset="digits")
    assert (callback.directory, callback.every, callback.keep) == (tmp_path / "a", 2, 4)
    configuration = callback.configuration
    assert (configuration["dataset"], configuration["max_gradient_norm"]) == ("digits", 1.0)
    assert not configuration.keys() & {"epochs", "output_dir", "overwrite", "device", "keep"}


@pytest.mark.parametrize(
    ("error", "flags"),
    [
        (jt.errors.OutOfMemoryError(64, 32, "detail", "batch_size"), "(--batch-size 32)"),
        (jt.errors.OutOfMemoryError(64, None, "detail"), "model"),
        (MemoryError(), "error: out of memory"),
        (jt.errors.DataUnavailableError("a", "b"), "(flags: --data-dir FOLDER, --dataset digits)"),
        (jt.errors.NonFiniteError(1, 1, "loss", 1.0, 0.1), "--on-nonfinite skip)"),
        (jt.errors.NonFiniteError(1, 1, "loss", 1.0, 0.1, "check the data"), "check the data"),
        (jt.errors.InputError("a", argument="learning_rate"), "error: a (--learning-rate)"),
        (jt.errors.InputError("a", argument="dropout_rate"), "error: a (--dropout)"),
        (jt.errors.InputError("a", argument="every"), "error: a (--checkpoint-every)"),
        (jt.errors.InputError("a", argument="classes"), "error: a"),
        (
            jt.errors.StorageError(Path("a"), "no space left on the disk"),
            "a could not be written (no space left on the disk); free some space and start the run "
            "again",
        ),
        (MissingExtraError("sklearn", "data"), "pip install 'jaxtrain[data]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line_with_the_flags_that_help(error: Exception, flags: str, capsys) -> None:
    with pytest.raises(SystemExit) as raised, report_errors(mnist.Config):
        raise error
    assert raised.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(flags)


def test_an_argument_without_a_flag_is_not_hinted_at(capsys) -> None:
    with pytest.raises(SystemExit), report_errors(losses.Config):
        raise jt.errors.InputError("momentum is 2", argument="momentum")
    assert capsys.readouterr().err == "error: momentum is 2\n"


@pytest.mark.parametrize(("name", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_signal_ends_the_process_once_with_one_line(name: str, word: str) -> None:
    program = f"""
import os, signal, time
from jaxtrain.cli.command import report_errors
with report_errors():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(30)
    finally:
        for _ in range(3):  # an impatient user
            os.kill(os.getpid(), signal.{name})
            time.sleep(0.1)
        print("cleaned up")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 128 + signal.Signals[name]
    assert (result.stdout, result.stderr) == ("cleaned up\n", f"{word}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_dead(script) -> None:
    shared = "".join(path.read_text() for path in (ROOT / "jaxtrain" / "cli").glob("*.py"))
    text = Path(script.__file__).read_text() + shared
    for field in dataclasses.fields(script.Config):
        used = rf"\b(config|training)\.{field.name}\b|check\(config, \"{field.name}\""
        assert re.search(used, text), field.name
