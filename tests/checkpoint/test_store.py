"""CheckpointStore: saving, restoring, faults of the disk, and hostile or damaged files."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import (
    DamagedError,
    _store,
    checkpoint_path,
    list_epochs,
    read_file,
    verify,
)
from jaxtrain.errors import InputError, NonFiniteError, StorageError, recovery_notes
from tests.checkpoint.helpers import (
    COLUMNS,
    METADATA,
    accept,
    assert_identical,
    forge,
    make_snapshot,
    make_state,
    open_store,
    write_three,
)

ROOT = Path(__file__).parents[2]


def restore(path: Path, like=None, columns=COLUMNS, check=accept, **options):
    with open_store(path) as store:
        return store.restore(make_state() if like is None else like, columns, check, **options)


def test_the_newest_checkpoints_are_kept_and_the_newest_is_restored(tmp_path: Path) -> None:
    with open_store(tmp_path, keep=2) as store:
        assert store.restore(make_state(), COLUMNS, accept) is None
        for epoch in (1, 2, 9, 10):
            store.save(make_snapshot(epoch))
        store.wait()
        assert store.found == [(9, 0), (10, 0)]
    restored = restore(tmp_path)
    assert_identical(restored.state, make_state(10))
    assert restored.history["epoch"].tolist() == list(range(1, 11))


def test_an_old_checkpoint_that_cannot_be_deleted_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "epoch-1.safetensors").mkdir()
    with open_store(tmp_path, keep=1) as store:
        store.save(make_snapshot(2))
        store.save(make_snapshot(3))
    assert list_epochs(tmp_path) == [1, 3]


def test_saving_returns_before_the_file_is_written(tmp_path: Path, monkeypatch) -> None:
    permit = threading.Event()
    write = _store.write_atomically

    def wait_and_write(*arguments, **options) -> None:
        assert permit.wait(30)
        write(*arguments, **options)

    monkeypatch.setattr(_store, "write_atomically", wait_and_write)
    with open_store(tmp_path) as store:
        store.save(make_snapshot(1))
        assert store.found == []
        permit.set()
    assert list_epochs(tmp_path) == [1]


def test_ctrl_c_completes_the_checkpoint_being_written(tmp_path: Path, monkeypatch) -> None:
    write = _store.write_atomically

    def write_slowly(*arguments, **options) -> None:
        time.sleep(0.3)
        write(*arguments, **options)

    monkeypatch.setattr(_store, "write_atomically", write_slowly)

    def run() -> None:
        with open_store(tmp_path) as store:
            store.save(make_snapshot(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        run()
    path = checkpoint_path(tmp_path, 4)
    verify(path)
    note = f"rerun the same command to resume after epoch 4; its checkpoint is {path}"
    assert recovery_notes(error.value) == [note]


def test_ctrl_c_while_waiting_still_waits_for_the_write(tmp_path: Path, monkeypatch) -> None:
    """When it is closed, the store waits again for the write whose wait was interrupted."""
    opened = open_store(tmp_path)
    wait = _store.concurrent.futures.wait

    def interrupt(pending) -> None:
        monkeypatch.setattr(_store.concurrent.futures, "wait", wait)
        raise KeyboardInterrupt

    def run() -> None:
        with opened as store:
            store.save(make_snapshot(1))
            monkeypatch.setattr(_store.concurrent.futures, "wait", interrupt)
            store.wait()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list_epochs(tmp_path) == [1]


def test_a_run_that_diverged_is_not_advised_to_resume(tmp_path: Path) -> None:
    def run(error: BaseException) -> None:
        with open_store(tmp_path) as store:
            store.save(make_snapshot(2))
            raise error

    def diverge(error: BaseException) -> list[str]:
        with pytest.raises(type(error)):
            run(error)
        return recovery_notes(error)

    (note,) = diverge(NonFiniteError(3, 1, "training loss", float("nan"), 0.1))
    assert note.startswith(f"the checkpoint of epoch 2 is {checkpoint_path(tmp_path, 2)}")
    assert "again" not in note
    assert diverge(InputError("a wrong argument")) == []


def test_a_renamed_folder_stops_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with open_store(folder) as store:
        store.save(make_snapshot(1))
        store.wait()
        os.rename(folder, tmp_path / "elsewhere")
        store.save(make_snapshot(2))
        message = r"epoch-2.* could not be written \(No such"
        with pytest.raises(StorageError, match=message) as error:
            store.save(make_snapshot(3))
    assert "\n" not in str(error.value)


def test_a_failed_write_is_raised_at_the_end_with_a_recovery_note(tmp_path, monkeypatch) -> None:
    def fail(path: Path, *arguments, **options) -> None:
        raise StorageError(path, "no space left on the disk")

    def run(error: BaseException | None) -> None:
        with open_store(tmp_path) as store:
            store.save(make_snapshot(2))
            if error is not None:
                raise error

    with open_store(tmp_path) as store:
        store.save(make_snapshot(1))
    monkeypatch.setattr(_store, "write_atomically", fail)
    with pytest.raises(StorageError, match="epoch-2") as error:
        run(None)
    (note,) = recovery_notes(error.value)
    assert "after epoch 1;" in note
    with pytest.raises(ZeroDivisionError):  # it is not hidden by the failed write
        run(ZeroDivisionError())


def test_other_failures_of_a_write_are_storage_errors(tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments) -> bytes:
        raise MemoryError

    monkeypatch.setattr(_store._file, "encode", fail)
    with pytest.raises(StorageError, match=r"epoch-1.*MemoryError"), open_store(tmp_path) as s:
        s.save(make_snapshot(1))


def test_a_checkpoint_survives_a_power_failure(tmp_path: Path, monkeypatch) -> None:
    """Its bytes are flushed before it is renamed, and its folder is flushed after that."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        if calls[-1] == "file":
            assert os.fstat(descriptor).st_size > 500
        fsync(descriptor)

    def record_replace(*arguments) -> None:
        calls.append("replace")
        replace(*arguments)

    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", record_replace)
        store.save(make_snapshot(1))
    assert calls == ["file", "replace", "folder"]


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The other process must neither open it nor wait for the lock."""
    program = (
        "import sys; from tests.checkpoint.helpers import open_store; from pathlib import Path\n"
        "with open_store(Path(sys.argv[1])): print('entered')"
    )

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    with open_store(tmp_path):
        other = run()
        assert other.returncode == 1
        assert "is in use by another run" in other.stderr
        with pytest.raises(InputError, match="in use by another run"):
            open_store(tmp_path).__enter__()
    assert run().stdout == "entered\n"


def test_a_failed_start_releases_the_folder(tmp_path: Path, monkeypatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_store, "_list", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path).__enter__()
    with open_store(tmp_path):
        pass


def test_only_temporary_files_of_checkpoints_are_removed(tmp_path: Path) -> None:
    """Those that a killed process leaves; files with other names are kept."""
    (tmp_path / "target").write_text("mine")
    left = tmp_path / ".epoch-12.safetensors.a_1b2c3d.jaxtrain-part"
    left.write_bytes(b"half")
    link = tmp_path / ".epoch-13.safetensors.abcdefgh.jaxtrain-part"
    link.symlink_to(tmp_path / "target")
    others = [
        *(".epoch-1.safetensors.jaxtrain-part", ".epoch-01.safetensors.a.jaxtrain-part"),
        *("epoch-1.safetensors.abc.jaxtrain-part", ".thesis.abc.jaxtrain-part", "x.jaxtrain-part"),
        *("epoch-01.safetensors", "epoch-x.safetensors", "epoch-1.safetensors.old", "epoch-1"),
        *("epoch--1.safetensors", "epoch-1.safetensors\n", "epoch-٣.safetensors", "7", "target"),
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert list_epochs(tmp_path) == []
    with open_store(tmp_path, keep=1) as store:
        for epoch in (1, 2, 3):
            store.save(make_snapshot(epoch))
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".lock"} == {*others, "epoch-3.safetensors"}
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_the_temporary_file_of_a_killed_writer_is_removed(tmp_path: Path, monkeypatch) -> None:
    """The store recognizes the names that it gives to temporary files."""
    seen: list[str] = []
    replace = os.replace

    def record(part, path) -> None:
        seen.append(Path(part).name)
        replace(part, path)

    monkeypatch.setattr(os, "replace", record)
    with open_store(tmp_path) as store:
        store.save(make_snapshot(123456))
    (tmp_path / seen[0]).write_bytes(b"half")
    with open_store(tmp_path):
        assert not (tmp_path / seen[0]).exists()


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoint_path(folder, 1).symlink_to(target)
    with open_store(folder) as store:
        store.save(make_snapshot(1))
    assert target.read_text() == "mine"
    assert not checkpoint_path(folder, 1).is_symlink()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the length of the path of a socket is limited
        server.bind(path.name)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)


REPLACEMENTS = {
    "a folder": Path.mkdir,
    "a full folder": lambda path: (path.mkdir(), (path / "file").touch()),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a link to a device that never ends": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to another checkpoint": lambda path: path.symlink_to("epoch-2.safetensors"),
    "a sparse file of 4 TiB": make_sparse,
    "an empty file": Path.touch,
    "a header longer than the file": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "deep JSON": lambda path: path.write_bytes(
        (10**5).to_bytes(8, "little") + b"[" * 10**5 + b"]" * 10**5
    ),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_hostile_files_are_damaged_and_do_not_hang(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_three(tmp_path)
    path = checkpoint_path(tmp_path, 3)
    path.unlink()
    REPLACEMENTS[name](path)
    alone = tmp_path / "alone"
    alone.mkdir()
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.warns(UserWarning, match="epoch-3.safetensors.damaged .* after epoch 2"):
        assert restore(tmp_path).epoch == 2
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert list_epochs(tmp_path) == [1, 2]
    aside = tmp_path / "epoch-3.safetensors.damaged"
    assert os.path.lexists(aside)
    if "another checkpoint" not in name:
        os.rename(aside, checkpoint_path(alone, 3))
        with pytest.raises(InputError, match="no intact checkpoint") as error:
            restore(alone)
        assert "\n" not in str(error.value)
        assert os.path.lexists(checkpoint_path(alone, 3))


def test_a_damaged_file_renamed_earlier_is_replaced(tmp_path: Path) -> None:
    write_three(tmp_path)
    (tmp_path / "epoch-3.safetensors.damaged").mkdir()
    checkpoint_path(tmp_path, 3).write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"):
        restore(tmp_path)
    assert (tmp_path / "epoch-3.safetensors.damaged").read_bytes() == b"x"


def test_damaged_checkpoints_are_skipped_and_all_damaged_is_an_error(tmp_path: Path) -> None:
    write_three(tmp_path)
    checkpoint_path(tmp_path, 3).write_bytes(b"")
    os.truncate(checkpoint_path(tmp_path, 2), 100)
    content = checkpoint_path(tmp_path, 1).read_bytes()
    checkpoint_path(tmp_path, 1).write_bytes(content[:-1])
    for _ in range(2):  # no file is renamed, so that the next run does not start from scratch
        with pytest.raises(InputError, match=r"no intact checkpoint .*epoch-3.*epoch-2.*epoch-1"):
            restore(tmp_path)
        assert list_epochs(tmp_path) == [1, 2, 3]
    checkpoint_path(tmp_path, 1).write_bytes(content)
    with pytest.warns(UserWarning, match="resuming after epoch 1") as told:
        assert_identical(restore(tmp_path).state, make_state(1))
    assert len(told) == 2
    assert list_epochs(tmp_path) == [1]


def test_a_checkpoint_under_the_name_of_another_epoch_is_damaged(tmp_path: Path) -> None:
    write_three(tmp_path)
    os.rename(checkpoint_path(tmp_path, 3), checkpoint_path(tmp_path, 4))
    with pytest.warns(UserWarning, match=r"epoch-4.* it is of epoch 3\).* after epoch 2"):
        assert restore(tmp_path).epoch == 2


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch) -> None:
    write_three(tmp_path)
    real_open = os.open
    for number, reason in ((24, "Too many open files"), (13, "Permission denied"), (5, "error")):

        def refuse(path, *arguments, number=number, **options) -> int:
            if str(path).endswith("epoch-3.safetensors"):
                raise OSError(number, os.strerror(number), str(path))
            return real_open(path, *arguments, **options)

        with monkeypatch.context() as patch, open_store(tmp_path) as store:
            patch.setattr(os, "open", refuse)
            with pytest.raises(InputError, match=rf"epoch-3.* cannot be read \(.*{reason}"):
                store.restore(make_state(), COLUMNS, accept)
        assert list_epochs(tmp_path) == [1, 2, 3]


def test_a_newer_format_is_not_damaged(tmp_path: Path) -> None:
    write_three(tmp_path)
    path = checkpoint_path(tmp_path, 3)
    forge(path, lambda header, record: record.update(format=4))
    with pytest.raises(InputError, match=r"has format 4, but this version .* reads 3") as e:
        restore(tmp_path)
    assert not isinstance(e.value, DamagedError)
    assert list_epochs(tmp_path) == [1, 2, 3]


FORGERIES = {
    "a shorter column": lambda header, record: header["history.1.train_loss"].update(
        shape=[2], data_offsets=[o - 8 * i for i, o in enumerate(_offsets(header))]
    ),
    "a column of another length": lambda header, record: header["history.1.train_loss"].update(
        shape=[1, 3]
    ),
    "another epoch at its end": lambda header, record: header["history.0.epoch"].update(
        shape=[2], data_offsets=[o - 8 * i for i, o in enumerate(_offsets(header, "0.epoch"))]
    ),
    "step losses of two axes": lambda header, record: header["step_losses"].update(shape=[3, 4]),
    "no step losses": lambda header, record: header.pop("step_losses"),
    "an array of another shape": lambda header, record: header["state.w"].update(shape=[2, 3]),
    "an array of another dtype": lambda header, record: header["state.w"].update(dtype="I32"),
    "a dtype of objects": lambda header, record: header["state.w"].update(dtype="O"),
    "an array of 8 TB": lambda header, record: header["state.w"].update(shape=[2**20, 2**21]),
    "a negative shape": lambda header, record: header["state.w"].update(shape=[-1]),
    "an array outside of the file": lambda header, record: header["state.w"].update(
        data_offsets=[10**6, 10**6 + 24]
    ),
    "an array missing": lambda header, record: header.pop("state.w"),
    "a history of fewer epochs": lambda header, record: [
        header[name].update(shape=[2], data_offsets=[o - 8 * i for i, o in enumerate(offsets)])
        for name, offsets in (
            ("history.0.epoch", _offsets(header, "0.epoch")),
            ("history.1.train_loss", _offsets(header)),
        )
    ],
    "states in a list": lambda header, record: record.update(leaves=["state"]),
    "no metadata": lambda header, record: record.pop("metadata"),
    "no format": lambda header, record: record.pop("format"),
    "a format that is a string": lambda header, record: record.update(format="two"),
    "an empty record": lambda header, record: record.clear(),
    "metadata without the expected names": lambda header, record: record.update(metadata={}),
}


def _offsets(header, column="1.train_loss") -> list[int]:
    return header[f"history.{column}"]["data_offsets"]


def check_name(recorded, where: str) -> list[str]:
    assert recorded["run"] == "a"
    return []


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_damaged(tmp_path: Path, name: str) -> None:
    """Its checksum is correct, but its record contradicts the arrays or the run."""
    write_three(tmp_path)
    forge(checkpoint_path(tmp_path, 3), FORGERIES[name])
    with pytest.warns(UserWarning, match="epoch-3.*damaged"):
        assert restore(tmp_path, check=check_name).epoch == 2


@pytest.mark.parametrize("columns", [COLUMNS[::-1], ["epoch"], ["epoch", "test_loss"]])
def test_other_columns_are_refused(tmp_path: Path, columns) -> None:
    write_three(tmp_path)
    with pytest.raises(InputError, match="the columns epoch, train_loss, and that of this run"):
        restore(tmp_path, columns=columns)
    assert list_epochs(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("change", [{"leaves": {}}, {"best": "stored"}])
def test_a_record_without_a_state_is_refused(tmp_path: Path, change) -> None:
    write_three(tmp_path)
    forge(checkpoint_path(tmp_path, 3), lambda header, record: record.update(change))
    with pytest.raises(InputError, match="has nothing more where this run has"):
        restore(tmp_path)


def test_shapes_are_compared_before_arrays_are_created(tmp_path, monkeypatch) -> None:
    write_three(tmp_path)
    like = {**make_state(), "w": jnp.zeros((3, 3))}
    monkeypatch.setattr(
        _store._file, "place", lambda *arguments: pytest.fail("an array was created")
    )
    with pytest.raises(InputError, match=r"float32\[3, 2\] where"):
        restore(tmp_path, like)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Before structures are compared; the error also names newer checkpoints that are damaged."""
    write_three(tmp_path)
    checkpoint_path(tmp_path, 3).write_bytes(b"")
    seen = {}

    def refuse(recorded, where: str) -> None:
        seen.update(recorded)
        raise InputError(f"{where} is of another run")

    message = r"the checkpoint .*epoch-2\.safetensors is of another run; .*epoch-3.* checksum"
    with pytest.raises(InputError, match=message):
        restore(tmp_path, {}, check=refuse)
    assert seen == METADATA
    assert list_epochs(tmp_path) == [1, 2, 3]


def test_a_warning_of_the_check_is_given_if_the_run_resumes(tmp_path: Path) -> None:
    write_three(tmp_path)

    def check(recorded, where: str) -> list[str]:
        return ["other versions"]

    with pytest.warns(UserWarning, match="other versions") as told:
        restore(tmp_path, check=check)
    assert len(told) == 1
    with pytest.raises(InputError, match="where this run has"):  # and no warning
        restore(tmp_path, {}, check=check)


def test_resume_may_be_required_or_never(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"resume is 'required', but .* has no checkpoint"):
        restore(tmp_path, resume="required")
    assert restore(tmp_path, resume="never") is None
    write_three(tmp_path)
    with pytest.raises(InputError, match=r"resume is 'never', but .* up to epoch 3"):
        restore(tmp_path, resume="never")
    assert restore(tmp_path, resume="required").epoch == 3


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "below", Path("/proc/none"), Path("a\0b"), Path("a" * 300)):
        with pytest.raises(InputError, match=r"checkpoint folder .* cannot be written"):
            open_store(path).__enter__()
    assert list_epochs(Path("a\0b")) == list_epochs(tmp_path / "file") == []
    with pytest.raises(InputError, match="cannot be read"):
        verify("a\0b")


@pytest.mark.parametrize("name", ["line\nbreak \x1b[31mred", "bad-\udcff\udc80-bytes", "é ü"])
def test_control_characters_in_folder_names_are_escaped(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    metadata = {"folder": str(folder)}
    with open_store(folder, metadata) as store:
        for epoch in (1, 2):
            store.save(make_snapshot(epoch))
    seen = {}
    assert restore(folder, check=lambda recorded, where: seen.update(recorded) or []).epoch == 2
    assert seen["folder"] == str(folder)
    texts = []
    checkpoint_path(folder, 2).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged") as told:
        restore(folder)
    texts.append(str(told[0].message))
    with pytest.raises(InputError) as error:
        restore(folder, {})
    texts.append(str(error.value))
    with pytest.raises(KeyboardInterrupt) as interrupt, open_store(folder):
        raise KeyboardInterrupt
    texts += recovery_notes(interrupt.value)
    assert len(texts) == 3
    assert all(text.isprintable() for text in texts)
    for text in texts:
        text.encode()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_not_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    folder.mkdir()
    if kind == "folder":
        (folder / ".lock").mkdir()
    else:
        (folder / ".lock").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"the checkpoint folder .* cannot be locked"):
        open_store(folder).__enter__()
    assert not elsewhere.exists()


def test_the_record_is_json(tmp_path: Path) -> None:
    write_three(tmp_path)
    record, arrays = read_file(checkpoint_path(tmp_path, 3))
    assert record["metadata"] == METADATA
    assert record["leaves"]["state.key"] == "['key'] of key<threefry2x32>[]"
    assert record["columns"] == COLUMNS
    assert record["leaves"]["history.1.train_loss"] == "[1]['train_loss'] of float64[3]"
    assert json.loads(json.dumps(record)) == record
    assert arrays["step_losses"].shape == (12,)
    assert not arrays["step_losses"].flags.writeable
