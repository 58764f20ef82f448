"""Flags: values, help, and one sentence for each mistake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import jaxtrain as jt
from jaxtrain.cli.flags import DatasetFlags, TrainingFlags
from jaxtrain.cli.parsing import parse


@dataclass(frozen=True)
class Config(DatasetFlags, TrainingFlags):
    """Flags."""

    output_dir: Path = Path("runs/example")
    epochs: int | None = None
    """Passes over the data."""
    rates: tuple[float, ...] = (0.1,)
    """Learning rates."""
    shuffle: bool = True
    """Shuffle the examples."""


def read(*arguments: str) -> Config:
    return parse(Config, "An example.", arguments)


def test_flags_of_the_script_and_of_its_bases() -> None:
    config = read(
        *("--epochs", "3", "--rates", "0.1", "0.2", "--no-shuffle", "--log_interval=5"),
        *("--checkpoint-dir", "c", "--max-gradient-norm", "2", "--dataset", "digits"),
    )
    assert (config.epochs, config.rates, config.shuffle) == (3, (0.1, 0.2), False)
    assert (config.log_interval, config.dataset) == (5, "digits")
    assert (config.checkpoint_dir, config.max_gradient_norm) == (Path("c"), 2.0)
    assert read() == Config()


def test_help_describes_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        read("--epochs", "3", "--help")
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    for text in ("An example.", "Folder of the results", "Passes over the data", "--on-nonfinite"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epoch 5", "there is no flag --epoch; did you mean --epochs? (see --help)"),
        ("--no-shufle", "there is no flag --no-shufle; did you mean --no-shuffle? (see --help)"),
        ("--xyz", "there is no flag --xyz; see --help"),
        ("--epochs five", "--epochs is 'five'; expected an integer or None (see --help)"),
        ("--epochs", "--epochs has no value; expected an integer or None (see --help)"),
        ("--keep=1.5", "--keep is '1.5'; expected an integer (see --help)"),
        (
            "--shuffle --resume maybe",
            "--resume is 'maybe'; expected one of auto, required, never (see --help)",
        ),
        (
            "--rates 1 b",
            "--rates is '1 b'; expected a list of values, each a number (see --help)",
        ),
        ("--epochs 5 6", "unexpected argument '6'; expected --NAME VALUE (see --help)"),
        ("epochs 5", "unexpected argument 'epochs'; expected --NAME VALUE (see --help)"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: str, message: str, capsys) -> None:
    with pytest.raises(jt.errors.InputError) as raised:
        read(*arguments.split())
    assert str(raised.value) == message
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
