"""Files that are not ours: links, pipes, devices, and paths that are none, for each function."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import checkpoint_path, verify
from jaxtrain.cli.runs import RunFolder
from jaxtrain.race.result import Race
from tests.checkpoint.helpers import write
from tests.cli.test_runs import Config
from tests.test_idx import encode

INPUTS = np.zeros((1, 6), np.float32)


@pytest.fixture(scope="module")
def writers(small_state: jt.TrainState) -> dict[str, Callable[[Any], Any]]:
    """Functions that write a file, by name."""
    swept = jt.sweep(lambda slope: {"loss": slope}, {"slope": [1, 2]})
    return {
        "save": lambda path: jt.save(path, small_state),
        "stablehlo": lambda path: jt.export.stablehlo(small_state, path, INPUTS),
        "onnx": lambda path: jt.export.onnx(small_state, path, INPUTS),
        "SweepResult.save": swept.save,
        "SweepResult.to_csv": swept.to_csv,
        "Race.save": Race((), "a race", (), {}).save,
        "csv": jt.callbacks.csv,
        "json_lines": jt.callbacks.json_lines,
    }


def readers(state: jt.TrainState) -> dict[str, Callable[[Any], Any]]:
    """Functions that read a file, by name."""
    return {
        "load": lambda path: jt.load(path, state),
        "load_stablehlo": jt.export.load_stablehlo,
        "load_torch": lambda path: jt.export.load_torch(state, path),
        "load_checkpoint": lambda path: jt.load_checkpoint(path, state),
        "load_sweep": jt.load_sweep,
        "read_idx": jt.data.read_idx,
        "verify": verify,
    }


def make_device(path: Path) -> None:
    """Makes a node of the null device, which discards what is written."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("may not make devices")


KINDS: dict[str, Callable[[Path], Any]] = {
    "link": lambda path: path.symlink_to("target"),
    "pipe": os.mkfifo,
    "device": make_device,
    "directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_replaced(tmp_path: Path, writers, kind: str) -> None:
    (tmp_path / "target").write_text("mine")
    path = tmp_path / "path"
    KINDS[kind](path)
    before = path.lstat()
    for name, function in writers.items():
        with pytest.raises(jt.errors.InputError, match=rf"path is .*it is a {kind}, not a regular"):
            function(path)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode), name
    assert (tmp_path / "target").read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} == {"path", "target"}


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_run_replaces_only_regular_files_in_its_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").write_text("mine")
    KINDS[kind](tmp_path / "history.csv")
    before = (tmp_path / "history.csv").lstat().st_mode
    with RunFolder(Config(tmp_path, overwrite=True)) as folder:
        for write_file in (folder.start, lambda: folder.write_table("history.csv", {"epoch": [1]})):
            with pytest.raises(jt.errors.StorageError, match=rf"\(it is a {kind}, not a regular"):
                write_file()
    assert (tmp_path / "history.csv").lstat().st_mode == before
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_only_regular_files_are_read_also_behind_links(
    tmp_path: Path, small_state: jt.TrainState, kind: str
) -> None:
    """Opening a pipe would otherwise wait for a writer."""
    KINDS[kind](tmp_path / "path")
    (tmp_path / "link.safetensors").symlink_to("path")
    for name, function in readers(small_state).items():
        if (name, kind) != ("load_checkpoint", "directory"):  # which reads the newest checkpoint
            with pytest.raises(jt.errors.InputError, match=rf"link.* \(it is a {kind}, not a reg"):
                function(tmp_path / "link.safetensors")


def test_a_link_is_read_as_its_target(tmp_path: Path, small_state: jt.TrainState) -> None:
    """Whatever their names."""
    jt.save(tmp_path / "a", small_state.replace(params=_ones(small_state.params)))
    write(tmp_path, 1)
    checkpoint_path(tmp_path, 1).rename(tmp_path / "b")
    (tmp_path / "c").write_bytes(encode(np.arange(3, dtype=np.uint8)))
    for name in "abc":
        (tmp_path / f"link-{name}").symlink_to(name)
    loaded = jt.load(tmp_path / "link-a", small_state)
    assert loaded.params["Dense_0"]["bias"].tolist() == [1] * 8
    verify(tmp_path / "link-b")
    assert jt.data.read_idx(tmp_path / "link-c").tolist() == [0, 1, 2]


@pytest.mark.parametrize("path", [None, 3, b"model", "a\0b", ["model"]], ids=str)
def test_what_is_no_path_is_named(
    tmp_path: Path, monkeypatch, writers, small_state: jt.TrainState, path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {
        "sweep": lambda path: jt.sweep(lambda x: {"y": x}, {"x": [1]}, checkpoint=path or 0),
        "profile": jt.callbacks.profile,
        "tensorboard": jt.callbacks.tensorboard,
        "load": lambda path: jt.data.load("mnist", data_dir=path or [0]),
    }
    for function in (*writers.values(), *readers(small_state).values(), *folders.values()):
        # The type checker of `make test TYPES=1` raises first.
        with pytest.raises(
            (jt.errors.InputError, TypeError), match=r"; expected a (path|state dict)|parameter"
        ):
            function(path)
    assert list(tmp_path.iterdir()) == []


def _ones(params: Any) -> Any:
    return {name: {n: jnp.ones_like(x) for n, x in each.items()} for name, each in params.items()}
