"""A run's folder: what lies in it, whole or not at all, also when the run is cut short."""

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

import jaxtrain as jt
from jaxtrain.events import Compiled, EpochDone
from jaxtrain.folders import PART
from jaxtrain.runs import RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    folder: Path = Path("somewhere")
    limit: float = float("inf")


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(tmp_path: Path, small_state: jt.TrainState) -> None:
    with RunFolder(tmp_path / "a" / "b", Config()) as folder:
        folder.record(Compiled(1.5, 2, 3, 50))
        for epoch in (1, 2):
            metrics = {"epoch": epoch, "train_loss": 0.1 / 3, "seconds": 0.25}
            folder.record(EpochDone(epoch, metrics, small_state), weight=7.0)
        folder.write_summary(test_loss=jnp.float32(0.5), worst=np.nan, notice=None)
    files = {path.name for path in folder.path.iterdir()}
    assert files == {"config.json", "history.csv", "summary.json"}
    config = json.loads((folder.path / "config.json").read_text())
    assert config == {"rate": 0.1, "folder": "somewhere", "limit": None}
    rows = read_history(folder.path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0] == {
        "epoch": "1",
        "train_loss": repr(0.1 / 3),
        "seconds": "0.25",
        "weight": "7.0",
    }
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["test_loss"] == 0.5
    assert summary["worst"] is None
    assert summary["compile_seconds"] == 1.5
    assert summary["train_seconds"] == 0.5
    assert summary["total_seconds"] > 0
    assert summary["device"].startswith(jax.devices()[0].platform)
    assert summary["versions"]["jax"] == jax.__version__


def test_a_run_that_diverges_keeps_its_finished_epochs(tmp_path: Path) -> None:
    data = jt.Dataset(jnp.linspace(-1, 1, 8)[:, None], jnp.linspace(0, 3, 8)[:, None])
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(1e3),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    with pytest.raises(jt.NonFiniteLossError) as raised, RunFolder(tmp_path, Config()) as folder:
        jt.fit(state, data, loss_fn=jt.losses.mean_squared_error, epochs=99, report=folder.record)
    rows = read_history(tmp_path)
    assert len(rows) == raised.value.epoch - 1 >= 2
    np.testing.assert_allclose(
        [float(row["train_loss"]) for row in rows], raised.value.history["train_loss"]
    )


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(jt.InputError, match=r"file.* cannot be written .*--output-dir"):
            RunFolder(path, Config())


def test_a_new_run_clears_the_last_ones_pictures_and_no_others(
    tmp_path: Path, small_state: jt.TrainState
) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "holiday.png").write_bytes(b"mine")
    first = RunFolder(tmp_path, Config())
    first.start()
    first.write_picture("a.png", Figure())
    first.write_model(small_state)
    first.write_summary()
    RunFolder(tmp_path, Config(), overwrite=True).start()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "holiday.png"}


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    folder = RunFolder(tmp_path, Config())
    folder.write_picture("a.png", Figure())
    before = (tmp_path / "a.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    (tmp_path / "b.png").mkdir()  # where the next one would go
    with pytest.raises(jt.StorageError, match=r"b\.png could not be written \(Is a directory\)"):
        folder.write_picture("b.png", Figure())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_results_are_the_old_ones_or_the_new_ones(tmp_path: Path, monkeypatch) -> None:
    """The disk fills up while the same file is written again."""
    folder = RunFolder(tmp_path, Config())
    folder.write_table("history.csv", {"epoch": [1]})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jt.StorageError, match="no space left on the disk"):
        folder.write_table("history.csv", {"epoch": [1, 2]})
    assert (tmp_path / "history.csv").read_text() == "epoch\n1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_part_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".film.mkv.part").write_bytes(b"mine")
    (tmp_path / ".mine.part").mkdir()
    (tmp_path / f".history.csv.7{PART}").write_bytes(b"by a run that was killed")
    with RunFolder(tmp_path, Config()):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".film.mkv.part", ".mine.part"]
