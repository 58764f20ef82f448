"""The folder of a run: its files are complete or absent, also after an interruption or attack."""

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
from experiments import linear_regression
from jaxtrain._files import PART, write_atomically
from jaxtrain.cli.flags import Safety
from jaxtrain.cli.runs import RunFolder, read_json


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    folder: Path = Path("somewhere")
    limit: float = float("inf")


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def train(*callbacks: object, rate: float = 0.1, **options) -> tuple[jt.TrainState, jt.History]:
    """Fits a line to four points."""
    inputs = jnp.linspace(-1, 1, 4)[:, None]
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(rate), inputs[:1], key=jax.random.key(0)
    )
    options = {"loss_fn": jt.losses.mean_squared_error, **options}
    return jt.fit(state, (inputs, 3 * inputs + 1), callbacks=list(callbacks), **options)


def test_a_run_writes_configuration_history_and_summary(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b", Config()) as folder:
        _, history = train(*folder.callbacks(weight=7.0), epochs=2)
        folder.write_summary(test_loss=jnp.float32(0.5), worst=np.nan, notice=None)
    files = {path.name for path in folder.path.iterdir()}
    assert files == {".lock", "config.json", "history.csv", "summary.json"}
    config = json.loads((folder.path / "config.json").read_text())
    assert config == {"rate": 0.1, "folder": "somewhere", "limit": None}
    rows = read_history(folder.path)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "train_loss", "learning_rate", "seconds", "weight"]
    assert [float(row["train_loss"]) for row in rows] == history["train_loss"].tolist()
    assert rows[0]["weight"] == "7.0"
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["test_loss"] == 0.5
    assert summary["worst"] is None
    assert 0 < summary["compile_seconds"] < summary["total_seconds"]
    assert summary["train_seconds"] == pytest.approx(history["seconds"].sum())
    assert summary["device"].startswith(jax.devices()[0].platform)
    assert summary["versions"]["jax"] == jax.__version__


def test_an_array_is_json_text_in_the_history(tmp_path: Path) -> None:
    def values(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None):
        return jnp.array([1.0, jnp.nan]) + 0 * logits.sum()

    with RunFolder(tmp_path, Config()) as folder:
        metrics = {"pair": jt.metrics.AccumulatedMetric(values, lambda sums: sums)}
        train(*folder.callbacks(), epochs=1, metric_fns=metrics)
    assert read_history(tmp_path)[0]["train_pair"] == "[1.0, null]"


def test_several_runs_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Config()) as folder:
        for part in ("a", "b"):
            train(*folder.callbacks(part, run=part), epochs=2)
    assert [(row["run"], row["epoch"]) for row in read_history(tmp_path)] == [
        *(("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"))
    ]


def test_a_resumed_run_keeps_its_earlier_rows(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path / "checkpoints")
    for epochs in (2, 3, 3):  # the last call has nothing left to train
        with RunFolder(tmp_path / "out", Config(), resuming=epochs == 3) as folder:
            train(*folder.callbacks(), checkpoint, epochs=epochs)
        rows = read_history(tmp_path / "out")
        assert [row["epoch"] for row in rows] == ["1", "2", "3"][:epochs]


def test_a_run_that_takes_no_step_leaves_the_results_of_an_earlier_one(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Config()) as folder:
        train(*folder.callbacks(), epochs=1)
        folder.write_summary()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(run: jt.Run) -> None:
        raise KeyboardInterrupt

    class Interrupt(jt.callbacks.Callback):
        on_start = staticmethod(interrupt)

    with (
        pytest.raises(KeyboardInterrupt),
        RunFolder(tmp_path, Config(rate=0.2), overwrite=True) as folder,
    ):
        train(*folder.callbacks(), Interrupt(), epochs=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_sweep_adds_its_times_to_the_summary(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Config()) as folder:
        (callback,) = folder.callbacks()
        callback.on_runs(jt.callbacks.SweepProgress(0, 3, kind="started"))
        assert not (tmp_path / "config.json").exists()
        for done in (1, 3):
            callback.on_runs(jt.callbacks.SweepProgress(done, 3, 1, 1.5, 0.25))
        assert (tmp_path / "config.json").exists()
        summary = folder.write_summary()
    assert summary["compile_seconds"] == 3.0
    assert summary["train_seconds"] == 0.5


def test_a_run_that_diverges_keeps_its_completed_epochs(tmp_path: Path) -> None:
    with pytest.raises(jt.errors.NonFiniteError) as raised, RunFolder(tmp_path, Config()) as folder:
        train(*folder.callbacks(), rate=1e3, epochs=99)
    rows = read_history(tmp_path)
    assert len(rows) == raised.value.epoch - 1 >= 2
    np.testing.assert_allclose(
        [float(row["train_loss"]) for row in rows], raised.value.history["train_loss"]
    )


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(jt.errors.InputError, match=r"output folder .*file.* cannot be written"):
            RunFolder(path, Config())


def test_a_new_run_removes_the_pictures_of_the_previous_one_and_no_others(
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


def test_a_picture_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    folder = RunFolder(tmp_path, Config())
    folder.write_picture("a.png", Figure())
    before = (tmp_path / "a.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    (tmp_path / "b.png").mkdir()  # where the next one would go
    with pytest.raises(
        jt.errors.StorageError, match=r"b\.png could not be written \(Is a directory\)"
    ):
        folder.write_picture("b.png", Figure())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_full_disk_leaves_the_previous_content_of_a_file(tmp_path: Path, monkeypatch) -> None:
    folder = RunFolder(tmp_path, Config())
    folder.write_table("history.csv", {"epoch": [1]})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jt.errors.StorageError, match="no space left on the disk"):
        folder.write_table("history.csv", {"epoch": [1, 2]})
    assert (tmp_path / "history.csv").read_text() == "epoch\n1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_part_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".film.mkv.part").write_bytes(b"mine")
    (tmp_path / ".mine.part").mkdir()
    (tmp_path / f".folder{PART}").mkdir()
    (tmp_path / f".history.csv.7{PART}").write_bytes(b"of a run that was killed")
    with RunFolder(tmp_path, Config()):
        pass
    left = [".film.mkv.part", f".folder{PART}", ".lock", ".mine.part"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_planted_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    """Neither a link in a result's place nor one with the name of a temporary file."""
    precious, out = tmp_path / "precious.txt", tmp_path / "out"
    precious.write_text("mine")
    out.mkdir()
    names = ("config.json", "history.csv", f".history.csv{PART}", f".history.csv.0{PART}")
    for name in names:
        (out / name).symlink_to(precious)
    with RunFolder(out, Config()) as folder:
        folder.start()
        folder.write_table("history.csv", {"epoch": [1]})
    assert precious.read_text() == "mine"
    assert (out / "history.csv").read_text() == "epoch\n1\n"
    assert not (out / "history.csv").is_symlink()
    assert json.loads((out / "config.json").read_text())["rate"] == 0.1


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    folder = RunFolder(tmp_path, Config())
    folder.write_table("history.csv", {"epoch": [1]})
    (tmp_path / "history.csv").chmod(mode)
    folder.write_table("history.csv", {"epoch": [1, 2]})
    assert (tmp_path / "history.csv").stat().st_mode & 0o777 == mode


TAMPERED = {
    "no object": "[]",
    "a number": "17",
    "pictures a number": '{"pictures": 17}',
    "pictures an object": '{"pictures": {"notes.txt": 1}}',
    "pictures of all kinds": json.dumps(
        {
            "pictures": [
                *("notes.txt", "../out/../precious.png", "/etc/x.png", "folder.png", "link.png"),
                *("no\0name.png", "\ud800.png", "x" * 5000 + ".png", "sub/a.png", 3, None, [], {}),
            ]
        }
    ),
    "logs of all kinds": json.dumps({"logs": ["notes.txt", "../precious.png", "log_link.csv", {}]}),
    "not UTF-8": "\udcff",
    "nested too deeply": "[" * 100_000,
    "a huge number": '{"pictures": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_summary_makes_no_run_delete_files_of_the_user(
    tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    (out / "folder.png").mkdir(parents=True)
    (out / "sub").mkdir()
    for file in ("notes.txt", "sub/a.png", "folder.png/b.png", "../precious.png"):
        (out / file).write_text("mine")
    for link in ("link.png", "log_link.csv"):
        (out / link).symlink_to(tmp_path / "precious.png")
    (out / "summary.json").write_text(TAMPERED[kind], errors="surrogateescape")
    before = {path for path in tmp_path.rglob("*") if path.name != "summary.json"}
    with RunFolder(out, Config(), overwrite=True) as folder:
        folder.start()
        folder.write_summary()
    written = {out / name for name in (".lock", "config.json", "summary.json")}
    assert {path for path in tmp_path.rglob("*")} == before | written


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless device", "huge"])
def test_an_earlier_result_that_is_no_regular_file_does_not_hang(
    tmp_path: Path, name: str, kind: str
) -> None:
    file = tmp_path / name
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as sparse:
            sparse.truncate(2**42)
    assert read_json(file) is None
    with RunFolder(tmp_path, Config(), overwrite=True) as folder:
        folder.start()
        folder.write_summary()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json", "summary.json"}
    assert read_json(file) is not None


def test_a_folder_in_a_results_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(jt.errors.InputError, match="contains a finished run"):
        RunFolder(tmp_path, Config())
    with pytest.raises(jt.errors.StorageError, match=r"summary\.json could not be written"):
        RunFolder(tmp_path, Config(), overwrite=True).start()


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31mb", "a\udcffb", "a\nb"])
def test_folder_names_with_odd_characters(tmp_path: Path, name: str, capsys) -> None:
    """One sentence or a run, and no control characters on the terminal."""
    folder, other = tmp_path / name, tmp_path / "other"

    def use(output_dir: Path, checkpoint_dir: Path) -> None:
        safety = Safety(checkpoint_dir=checkpoint_dir)
        config = linear_regression.Config(
            epochs=1, log_interval=0, output_dir=output_dir, safety=safety
        )
        linear_regression.run(config)

    for folders in ((folder, other), (other, folder)):
        if "\0" in name:
            with pytest.raises(
                jt.errors.InputError, match=r"folder .* cannot be written .*null"
            ) as raised:
                use(*folders)
            assert str(raised.value).isprintable()
        else:
            use(*folders)
            assert folders[0].joinpath("summary.json").exists()
            # The same again resumes, another run is refused in one printable sentence.
            use(*folders)
            with pytest.raises(jt.errors.InputError, match="finished run") as raised:
                RunFolder(folders[0], Config())
            assert str(raised.value).isprintable()
    captured = capsys.readouterr()
    assert all(line.isprintable() for line in (captured.out + captured.err).splitlines())
