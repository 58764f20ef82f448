"""The folder of a run: its files are complete or absent, also after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxtrain as jt
from jaxtrain._files import PART
from jaxtrain.cli.flags import ExperimentFlags
from jaxtrain.cli.runs import RunFolder


@dataclasses.dataclass(frozen=True)
class Config(ExperimentFlags):
    limit: float = float("inf")


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(*callbacks: object, rate: float = 0.1, **options) -> tuple[jt.TrainState, jt.History]:
    """Fits a line to four points."""
    inputs = jnp.linspace(-1, 1, 4)[:, None]
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(rate), inputs[:1], key=jax.random.key(0)
    )
    options = {"loss_fn": jt.losses.mean_squared_error, **options}
    return jt.fit(state, (inputs, 3 * inputs + 1), callbacks=list(callbacks), **options)


def test_a_run_writes_configuration_history_and_summary(tmp_path: Path) -> None:
    with RunFolder(Config(tmp_path / "a" / "b")) as folder:
        for run in (1.0, 2.0):
            _, history = train(*folder.callbacks(f"{run}", run=run), epochs=2)
        folder.write_summary("line", test_loss=jnp.float32(0.5), worst=np.nan)
    files = {path.name for path in folder.path.iterdir()}
    assert files == {".lock", "config.json", "history.csv", "summary.json"}
    config = json.loads((folder.path / "config.json").read_text())
    assert (config["output_dir"], config["limit"]) == (str(folder.path), None)
    rows = read_history(folder.path)
    assert [(row["epoch"], row["run"]) for row in rows] == [
        *(("1", "1.0"), ("2", "1.0"), ("1", "2.0"), ("2", "2.0"))
    ]
    assert list(rows[0]) == ["epoch", "train_loss", "learning_rate", "seconds", "run"]
    assert [float(row["train_loss"]) for row in rows[2:]] == history["train_loss"].tolist()
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["experiment"], summary["test_loss"], summary["worst"]) == ("line", 0.5, None)
    assert 0 < summary["compile_seconds"] < summary["total_seconds"]
    seconds = sum(float(row["seconds"]) for row in rows)
    assert summary["train_seconds"] == pytest.approx(seconds)
    assert summary["device"].startswith(jax.devices()[0].platform)
    assert summary["versions"]["jax"] == jax.__version__


def test_a_resumed_run_keeps_its_earlier_rows_and_results(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path / "checkpoints")
    config = Config(tmp_path / "out", overwrite=True)
    for epochs in (2, 3, 3):  # the last call has nothing left to train
        with RunFolder(config) as folder:
            train(*folder.callbacks(), checkpoint, epochs=epochs)
            assert (config.output_dir / "summary.json").exists() == (epochs == 3)
            folder.write_summary("line")
        rows = read_history(config.output_dir)
        assert [row["epoch"] for row in rows] == ["1", "2", "3"][:epochs]


def test_a_run_that_takes_no_step_leaves_the_results_of_an_earlier_one(tmp_path: Path) -> None:
    config = Config(tmp_path, overwrite=True)
    with RunFolder(config) as folder:
        train(*folder.callbacks(), epochs=1)
        folder.write_summary("line")
    before = read_all(tmp_path)
    with pytest.raises(jt.errors.InputError, match="rate"), RunFolder(config) as folder:
        train(*folder.callbacks(), rate=-1.0)
    assert read_all(tmp_path) == before


def test_a_sweep_adds_its_times_to_the_summary(tmp_path: Path) -> None:
    with RunFolder(Config(tmp_path)) as folder:
        (callback,) = folder.callbacks()
        callback.on_runs(jt.callbacks.SweepProgress(0, 3, kind="started"))
        assert not (tmp_path / "config.json").exists()
        for done in (1, 3):
            callback.on_runs(jt.callbacks.SweepProgress(done, 3, 1, 1.5, 0.25))
        summary = folder.write_summary("line")
    assert (summary["compile_seconds"], summary["train_seconds"]) == (3.0, 0.5)


def test_a_run_that_diverges_keeps_its_completed_epochs(tmp_path: Path) -> None:
    with (
        pytest.raises(jt.errors.NonFiniteError) as raised,
        RunFolder(Config(tmp_path)) as folder,
    ):
        train(*folder.callbacks(), rate=1e3, epochs=99)
    rows = read_history(tmp_path)
    assert len(rows) == raised.value.epoch - 1 >= 2
    losses = [float(row["train_loss"]) for row in rows]
    np.testing.assert_allclose(losses, raised.value.history["train_loss"])


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(jt.errors.InputError, match=r"output folder .*file.* cannot be written"):
            RunFolder(Config(path))


def test_a_new_run_removes_the_pictures_of_the_previous_one_and_no_others(
    tmp_path: Path, small_state: jt.TrainState
) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    (tmp_path / f".history.csv.7{PART}").write_bytes(b"of a run that was killed")
    with RunFolder(Config(tmp_path)) as first:
        first.start()
        first.write_picture("a.png", Figure())
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        first.write_model(small_state)
        first.write_summary("line")
    with RunFolder(Config(tmp_path, overwrite=True)) as second:
        second.start()
    assert set(read_all(tmp_path)) == {".lock", "config.json", "holiday.png"}


@pytest.mark.parametrize("name", ["summary.json", "history.csv", "a.png"])
def test_a_folder_in_the_place_of_a_result_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    folder = RunFolder(Config(tmp_path, overwrite=True))

    def write() -> None:
        folder.start()
        folder.write_picture("a.png", Figure())

    with pytest.raises(jt.errors.StorageError, match=rf"{name} could not be written \(it is a dir"):
        write()


def test_a_full_disk_leaves_the_previous_content_of_a_file(tmp_path: Path, monkeypatch) -> None:
    folder = RunFolder(Config(tmp_path))
    folder.write_table("history.csv", {"epoch": [1]})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jt.errors.StorageError, match="no space left on the disk"):
        folder.write_table("history.csv", {"epoch": [1, 2]})
    assert read_all(tmp_path) == {"history.csv": b"epoch\n1\n"}
