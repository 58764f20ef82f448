"""Flags: seeds, safeguards, and the flag that an error message names."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxtrain as jt
from experiments import losses, mnist
from jaxtrain.cli.command import report_errors
from jaxtrain.cli.flags import Safety, flag_of, seed_key, with_safeguards
from jaxtrain.cli.resuming import checkpoint_callbacks
from jaxtrain.errors import MissingExtraError
from jaxtrain.optimizers._inspect import has_clipping, skipped_steps


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999])
def test_a_seed_that_jax_would_reduce_to_another_is_refused(seed: int) -> None:
    with pytest.raises(jt.errors.InputError, match=f"seed is {seed}"):
        seed_key(seed)


def test_flags_wrap_the_optimizer_in_safeguards() -> None:
    optimizer, params = jt.optimizers.sgd(0.1), {"w": jnp.zeros(2)}
    assert with_safeguards(optimizer, Safety()) is optimizer
    clipped = with_safeguards(optimizer, Safety(max_gradient_norm=1.0)).init(params)
    assert has_clipping(clipped)
    assert skipped_steps(clipped) is None
    both_flags = Safety(max_gradient_norm=1.0, on_nonfinite="skip")
    both = with_safeguards(optimizer, both_flags).init(params)
    assert has_clipping(both)
    assert int(skipped_steps(both)) == 0


def test_a_run_without_a_checkpoint_folder_saves_nothing() -> None:
    assert checkpoint_callbacks(mnist.Config()) == []


def test_the_configuration_of_checkpoints_has_the_flags_that_decide_the_result(
    tmp_path: Path,
) -> None:
    safety = Safety(checkpoint_dir=tmp_path, checkpoint_every=2, keep=4, max_gradient_norm=1.0)
    config = mnist.Config(safety=safety)
    (callback,) = checkpoint_callbacks(config, part="a", dataset="digits")
    assert (callback.directory, callback.every, callback.keep) == (tmp_path / "a", 2, 4)
    configuration = callback.configuration
    assert configuration["dataset"] == "digits"
    assert configuration["max_gradient_norm"] == 1.0
    assert not configuration.keys() & {"epochs", "output_dir", "overwrite", "safety", "device"}


@pytest.mark.parametrize(
    ("error", "flags"),
    [
        (jt.errors.OutOfMemoryError(64, 32, "detail", "test_batch_size"), "(--test-batch-size 32)"),
        (jt.errors.OutOfMemoryError(64, None, "detail"), "model"),
        (MemoryError(), "error: out of memory"),
        (jt.errors.DataUnavailableError("a", "b"), "(flags: --data-dir FOLDER, --dataset digits)"),
        (jt.errors.NonFiniteError(1, 1, "loss", 1.0, 0.1), "--on-nonfinite skip)"),
        (jt.errors.NonFiniteError(1, 1, "loss", 1.0, 0.1, "check the data"), "check the data"),
        (jt.errors.InputError("a", argument="learning_rate"), "error: a (--learning-rate)"),
        (jt.errors.InputError("a", argument="dropout_rate"), "error: a (--dropout)"),
        (jt.errors.InputError("a", argument="every"), "error: a (--checkpoint-every)"),
        (jt.errors.InputError("a", argument="classes"), "error: a"),
        (MissingExtraError("sklearn", "data"), "pip install 'jaxtrain[data]'"),
        (jt.errors.InputError("a\x1b[31m"), "error: a\\x1b[31m"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line_with_the_flags_that_help(
    error: Exception, flags: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("jaxtrain.cli.command.raise_on_signals", lambda: None)
    monkeypatch.setattr("jaxtrain.cli.command.ignore_signals", lambda: None)
    monkeypatch.setattr("warnings.showwarning", None)  # restored afterwards
    with pytest.raises(SystemExit) as raised, report_errors(mnist.Config):
        raise error
    assert raised.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(flags)


def test_an_argument_without_a_flag_has_none() -> None:
    assert flag_of("momentum", mnist.Config) == "--momentum"
    assert flag_of("momentum", losses.Config) is None
    assert flag_of("dropout_rate", losses.Config) is None
    assert flag_of(None, mnist.Config) is None
