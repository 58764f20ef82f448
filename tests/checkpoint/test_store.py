"""CheckpointStore: saving, restoring, faults of the disk, and damaged files."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.numpy

from jaxtrain.checkpoint import DamagedError, checkpoint_path, list_epochs, verify
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
    restore,
    write,
)

ROOT = Path(__file__).parents[2]


def test_the_newest_checkpoints_are_kept_and_the_newest_is_restored(tmp_path: Path) -> None:
    assert restore(tmp_path) is None
    write(tmp_path, 1, 2, 9, 10, keep=2)
    assert list_epochs(tmp_path) == [9, 10]
    restored = restore(tmp_path)
    assert_identical(restored.state, make_state(10))
    assert restored.history["epoch"].tolist() == list(range(1, 11))


def test_saving_returns_before_the_file_is_written(tmp_path: Path, monkeypatch) -> None:
    permit, fsync = threading.Event(), os.fsync

    def wait_and_flush(descriptor: int) -> None:
        assert permit.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_and_flush)
    with open_store(tmp_path) as store:
        store.save(make_snapshot(1))
        assert store.found == []
        permit.set()
    assert list_epochs(tmp_path) == [1]


@pytest.mark.parametrize("waiting", [False, True])
def test_ctrl_c_completes_the_checkpoint_being_written(tmp_path, monkeypatch, waiting) -> None:
    """Also if it interrupts the wait for it."""
    fsync, wait = os.fsync, concurrent.futures.wait

    def flush_slowly(descriptor: int) -> None:
        time.sleep(0.3)
        fsync(descriptor)

    def interrupt(pending) -> None:
        monkeypatch.setattr(concurrent.futures, "wait", wait)
        raise KeyboardInterrupt

    def run() -> None:
        with open_store(tmp_path) as store:
            store.save(make_snapshot(4))
            if waiting:
                monkeypatch.setattr(concurrent.futures, "wait", interrupt)
                store.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", flush_slowly)
    with pytest.raises(KeyboardInterrupt) as error:
        run()
    path = checkpoint_path(tmp_path, 4)
    verify(path)
    note = f"rerun the same command to resume after epoch 4; its checkpoint is {path}"
    assert recovery_notes(error.value) == [note]


def test_a_run_that_diverged_is_not_advised_to_resume(tmp_path: Path) -> None:
    def notes_of(error: BaseException) -> list[str]:
        def run() -> None:
            with open_store(tmp_path) as store:
                store.save(make_snapshot(2))
                raise error

        with pytest.raises(type(error)):
            run()
        return recovery_notes(error)

    (note,) = notes_of(NonFiniteError(3, 1, "training loss", float("nan"), 0.1))
    assert note.startswith(f"the checkpoint of epoch 2 is {checkpoint_path(tmp_path, 2)}")
    assert notes_of(InputError("a wrong argument")) == []


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, monkeypatch) -> None:
    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    def run(error: BaseException | None) -> None:
        with open_store(tmp_path) as store:
            store.save(make_snapshot(2))
            if error is not None:
                raise error

    write(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(StorageError, match=r"epoch-2.*\(no space left") as error:
        run(None)
    (note,) = recovery_notes(error.value)
    assert "after epoch 1;" in note
    with pytest.raises(ZeroDivisionError):  # it is not hidden by the failed write
        run(ZeroDivisionError())
    assert restore(tmp_path).epoch == 1


def test_the_next_save_raises_the_failure_of_a_write(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "checkpoints"
    with open_store(folder) as store:
        os.rename(folder, tmp_path / "elsewhere")
        store.save(make_snapshot(2))
        with pytest.raises(StorageError, match=r"epoch-2.* could not be written \(No such"):
            store.save(make_snapshot(3))

    def fail(*arguments) -> bytes:
        raise MemoryError

    monkeypatch.setattr(safetensors.numpy, "save", fail)
    with pytest.raises(StorageError, match=r"epoch-1.*MemoryError"):
        write(tmp_path, 1)


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

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(tmp_path, 1)
    assert calls == ["file", "replace", "folder"]


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The other process must neither open it nor wait for the lock."""
    program = (
        "import sys; from tests.checkpoint.helpers import open_store; from pathlib import Path\n"
        "with open_store(Path(sys.argv[1])): print('entered')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    with open_store(tmp_path):
        other = subprocess.run(command, check=False, **options)
        assert other.returncode == 1
        assert "is in use by another run" in other.stderr
        with pytest.raises(InputError, match="in use by another run"):
            open_store(tmp_path).__enter__()
    with open_store(tmp_path):
        pass


def test_a_killed_writer_leaves_the_previous_checkpoint_and_its_files_are_removed(
    tmp_path: Path,
) -> None:
    program = (
        "import os, sys; from tests.checkpoint.helpers import write; from pathlib import Path\n"
        "write(Path(sys.argv[1]), 1)\n"
        "os.replace = lambda *paths: os._exit(9)\n"
        "write(Path(sys.argv[1]), 2)"
    )
    others = [
        *(".epoch-1.safetensors.jaxtrain-part", ".thesis.abc.jaxtrain-part", "x.jaxtrain-part"),
        *("epoch-01.safetensors", "epoch-x.safetensors", "epoch-1.safetensors.old", "epoch-1"),
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    command = [sys.executable, "-c", program, str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert killed.returncode == 9
    assert len(list(tmp_path.glob(".epoch-2.safetensors.*.jaxtrain-part"))) == 1
    assert restore(tmp_path).epoch == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*others, "epoch-1.safetensors", ".lock"}
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**42),
    ],
    ids=["folder", "pipe", "link", "sparse file"],
)
def test_what_is_not_a_file_of_a_checkpoint_is_refused_without_delay(tmp_path: Path, make) -> None:
    write(tmp_path, 1)
    make(checkpoint_path(tmp_path, 2))
    with pytest.raises(InputError, match=r"epoch-2.* (cannot be read|is larger than)"):
        restore(tmp_path)
    assert list_epochs(tmp_path) == [1, 2]


def test_damaged_checkpoints_are_skipped_and_all_damaged_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    checkpoint_path(tmp_path, 3).write_bytes(b"")
    os.truncate(checkpoint_path(tmp_path, 2), 100)
    content = checkpoint_path(tmp_path, 1).read_bytes()
    checkpoint_path(tmp_path, 1).write_bytes(content[:-1])
    for _ in range(2):  # no file is renamed, so that the next run does not start from scratch
        with pytest.raises(InputError, match=r"no intact checkpoint .*epoch-3.*epoch-2.*epoch-1"):
            restore(tmp_path)
        assert list_epochs(tmp_path) == [1, 2, 3]
    checkpoint_path(tmp_path, 1).write_bytes(content)
    (tmp_path / "epoch-3.safetensors.damaged").write_text("renamed earlier")
    with pytest.warns(UserWarning, match="resuming after epoch 1") as told:
        assert_identical(restore(tmp_path).state, make_state(1))
    assert len(told) == 2
    assert list_epochs(tmp_path) == [1]
    assert (tmp_path / "epoch-3.safetensors.damaged").read_bytes() == b""


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path)
    real_open = os.open

    def refuse(path, *arguments, **options) -> int:
        if str(path).endswith("epoch-3.safetensors"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real_open(path, *arguments, **options)

    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(InputError, match=r"epoch-3.* cannot be read \(Too many"):
            store.restore(make_state(), COLUMNS, accept)
    assert list_epochs(tmp_path) == [1, 2, 3]


def test_a_newer_format_is_not_damaged(tmp_path: Path) -> None:
    write(tmp_path)
    forge(checkpoint_path(tmp_path, 3), lambda header, record: record.update(format=5))
    with pytest.raises(InputError, match=r"has format 5, but this version .* reads 4") as e:
        restore(tmp_path)
    assert not isinstance(e.value, DamagedError)
    assert list_epochs(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda header, record: header.pop("state.w"),
        lambda header, record: record.pop("metadata"),
    ],
    ids=["no array", "no metadata"],
)
def test_a_file_that_contradicts_itself_is_damaged(tmp_path: Path, change) -> None:
    """Its checksum is correct."""
    write(tmp_path)
    forge(checkpoint_path(tmp_path, 3), change)
    with pytest.warns(UserWarning, match="epoch-3.*damaged .*malformed"):
        assert restore(tmp_path).epoch == 2


@pytest.mark.parametrize("columns", [COLUMNS[::-1], ["epoch"], ["epoch", "test_loss"]])
def test_other_columns_are_refused(tmp_path: Path, columns) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match="the columns epoch, train_loss, and that of this run"):
        restore(tmp_path, columns=columns)
    assert list_epochs(tmp_path) == [1, 2, 3]


def test_a_checkpoint_of_another_run_is_refused_before_structures_are_compared(tmp_path) -> None:
    write(tmp_path)
    seen = {}

    def refuse(recorded, where: str) -> None:
        seen.update(recorded)
        raise InputError(f"{where} is of another run")

    with pytest.raises(InputError, match=r"the checkpoint .*epoch-3\.safetensors is of another"):
        restore(tmp_path, {}, check=refuse)
    assert seen == METADATA
    assert list_epochs(tmp_path) == [1, 2, 3]


def test_a_warning_of_the_check_is_given_if_the_run_resumes(tmp_path: Path) -> None:
    write(tmp_path)

    def check(recorded, where: str) -> str:
        return "other versions"

    with pytest.warns(UserWarning, match="other versions") as told:
        restore(tmp_path, check=check)
    assert len(told) == 1
    with pytest.raises(InputError, match="where this run has"):  # and no warning
        restore(tmp_path, {}, check=check)


def test_resume_may_be_required_or_never(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"resume is 'required', but .* has no checkpoint"):
        restore(tmp_path, resume="required")
    assert restore(tmp_path, resume="never") is None
    write(tmp_path)
    with pytest.raises(InputError, match=r"resume is 'never', but .* up to epoch 3"):
        restore(tmp_path, resume="never")
    assert restore(tmp_path, resume="required").epoch == 3


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "below", Path("/proc/none"), Path("a\0b"), Path("a" * 300)):
        with pytest.raises(InputError, match=r"checkpoint folder .* cannot be written"):
            open_store(path).__enter__()
    assert list_epochs(Path("a\0b")) == list_epochs(tmp_path / "file") == []
    with pytest.raises(InputError, match="expected a path"):
        verify("a\0b")
