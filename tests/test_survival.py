"""Runs that are killed, interrupted or out of disk or memory: what is kept, and the message."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import gradient_descent, linear_regression, minibatch_regression, mnist
from jaxtrain._files import PART, lock_folder
from jaxtrain.checkpoint import checkpoint_path, list_checkpoints, list_epochs, verify
from jaxtrain.cli.resuming import checkpoint_callbacks
from jaxtrain.errors import InputError
from tests import survivor

ROOT = Path(__file__).parents[1]
DIGITS = ("--dataset", "digits")
HAS_NAMESPACES = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.fixture
def environment() -> dict[str, str]:
    """Returns the environment of the tests, without the folder of data sets."""
    return {name: value for name, value in os.environ.items() if name != "JAXTRAIN_DATA_DIR"}


def start(environment, *command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_with_workers(process: subprocess.Popen[str]) -> None:
    """Kills a process and those that it has started, which would keep its pipes open."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(environment, *command: object, expect: int = 0) -> tuple[str, str]:
    """Returns what a command prints on stdout and stderr."""
    process = start(environment, *command)
    out, err = process.communicate(timeout=240)
    assert process.returncode == expect, out + err
    assert "Traceback" not in err
    return out, err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def read_history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def wait_for(condition, process: subprocess.Popen[str], interval: float = 0.001) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(interval)


def unfinished(folder: Path) -> list[Path]:
    """Returns the files that a checkpoint is being written to."""
    return list(folder.glob(f".epoch-*{PART}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streamed", "more"),
    [
        pytest.param(False, 20, id="in memory, with averaged parameters"),
        pytest.param(True, 1, id="stream with workers, accumulated gradients"),
    ],
)
def test_a_run_killed_4_times_ends_in_the_same_bits(environment, tmp_path, streamed, more) -> None:
    """SIGKILL at random moments, every second time while a checkpoint is being written.

    Another process reads the stream in a run. `JAXTRAIN_KILLS` sets another number of kills.
    """
    moments = random.Random(0)
    folder = tmp_path / "checkpoints"
    kills, while_writing = int(os.environ.get("JAXTRAIN_KILLS", "4")), 0
    for kill in range(kills):
        before = list_checkpoints(folder)
        for leftover in unfinished(folder):  # the run removes it too, but later
            leftover.unlink()
        worker = ["--worker"] * (streamed and kill % 4 == 2)
        flags = ["--streamed"] * streamed + worker
        process = start(environment, "-m", "tests.survivor", folder, 1_000_000, *flags)
        if kill % 2:
            wait_for(lambda: unfinished(folder), process, interval=0)
            time.sleep(moments.uniform(0, 0.0005))
        else:
            wait_for(lambda before=before: list_checkpoints(folder) != before, process)
            time.sleep(moments.uniform(0, 0.3))
        kill_with_workers(process)
        assert process.returncode == -signal.SIGKILL
        while_writing += bool(unfinished(folder))
        for found in list_checkpoints(folder):
            verify(checkpoint_path(folder, *found))
    assert while_writing >= kills // 4
    epochs = list_checkpoints(folder)[-1][0] + more
    resumed = survivor.train(str(folder), epochs, streamed=streamed)
    assert not unfinished(folder)
    assert resumed == survivor.train("nowhere", epochs, plain=True, streamed=streamed)


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_resume(environment, tmp_path: Path) -> None:
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/mnist.py", *DIGITS, "--checkpoint-dir", folder, "--output-dir", out)
    process = start(environment, *script, "--epochs", 1_000_000)
    wait_for(lambda: len(list_epochs(folder)) == 3, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # a second signal is ignored
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    epoch = list_epochs(folder)[-1]
    verify(checkpoint_path(folder, epoch))
    assert not unfinished(folder)
    finished = len(read_history(out))
    assert finished >= epoch
    assert last_line(err) == (
        f"interrupted; rerun the same command to resume after epoch {epoch}; its checkpoint is "
        f"{folder}/epoch-{epoch}.safetensors; the completed epochs ({finished}) are in "
        f"{out}/history.csv"
    )


def fit_line(tmp_path: Path, **flags) -> dict:
    """Runs T1 with checkpoints, two epochs unless `flags` say otherwise."""
    options = {"checkpoint_dir": tmp_path / "c", "epochs": 2, "log_interval": 0, **flags}
    return linear_regression.run(linear_regression.Config(tmp_path / "out", **options))


def test_a_resumed_experiment_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """In history, summary, model and pictures; the number of epochs may grow."""

    def train(folder: Path, **flags) -> dict:
        options = {"dataset": "digits", "validation": 0.1, "log_interval": 0, **flags}
        return mnist.run(mnist.Config(folder, **options))

    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for epochs, resume in ((2, "auto"), (4, "required")):
        checkpoints = {"checkpoint_dir": tmp_path / "checkpoints", "resume": resume}
        ours = train(parts, epochs=epochs, **checkpoints)
    theirs = train(whole, epochs=4)
    assert read_history(parts) == read_history(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in parts.iterdir()} == names
    same = ("model.safetensors", "predictions.png", "confusion_matrix.png", "overfitting.png")
    for name in same:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    for name in ("compile_seconds", "train_seconds", "total_seconds"):
        del ours[name], theirs[name]
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "epochs", "pictures"),
    [
        (gradient_descent, 100, {"descent.png"}),
        (minibatch_regression, 20, {"fit.png", "path.png"}),
    ],
    ids=["gradient_descent", "minibatch_regression"],
)
def test_every_tutorial_resumes(environment, tmp_path: Path, script, epochs, pictures) -> None:
    """Killed in the middle; its pictures need the epochs before."""
    folder = tmp_path / "checkpoints"
    config = script.Config(tmp_path / "whole", epochs=epochs, log_interval=0)
    parts = dataclasses.replace(config, output_dir=tmp_path / "parts", checkpoint_dir=folder)
    flags = ("--output-dir", parts.output_dir, "--checkpoint-dir", folder, "--log-interval", 0)
    process = start(environment, script.__file__, *flags, "--epochs", epochs)
    deep = folder / "stochastic" if script is gradient_descent else folder
    wait_for(lambda: len(list_epochs(deep)) == 3, process)
    process.kill()
    process.communicate()
    script.run(parts)
    script.run(config)
    assert read_history(parts.output_dir) == read_history(config.output_dir)
    for name in pictures:
        whole = (config.output_dir / name).read_bytes()
        assert (parts.output_dir / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": 0.1, "seed": 1}, r"learning_rate was 0\.01 and is now 0\.1, seed was 4"),
        ({"epochs": 1}, "epochs is 1, but"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"resume": "never"}, "contains a finished run"),
        ({"resume": "never", "overwrite": True}, "resume is 'never', but"),
        ({"resume": "required", "checkpoint_dir": "new", "overwrite": True}, "has no checkpoint"),
        ({"checkpoint_dir": "out"}, "the output folder itself"),
    ],
    ids=str,
)
def test_another_run_does_not_resume(tmp_path: Path, flags, message: str) -> None:
    """The difference is named; an output folder keeps its results."""
    fit_line(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if "checkpoint_dir" in flags:
        flags = flags | {"checkpoint_dir": tmp_path / flags["checkpoint_dir"]}
    with pytest.raises(InputError, match=message):
        fit_line(tmp_path, **flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_overwrite_replaces_the_checkpoints_of_another_run(tmp_path: Path, capsys) -> None:
    """The same run still resumes, also from a folder in which all checkpoints are damaged."""
    folder = tmp_path / "c"
    fit_line(tmp_path, epochs=5)
    (folder / "notes.txt").write_text("mine")
    assert list_epochs(folder) == [3, 4, 5]
    fit_line(tmp_path, learning_rate=0.1, overwrite=True)
    assert capsys.readouterr().err == f"removed the checkpoints of another run in {folder}\n"
    assert list_epochs(folder) == [1, 2]
    assert len(read_history(tmp_path / "out")) == 2
    expected = fit_line(tmp_path, learning_rate=0.1, overwrite=True, epochs=3)
    assert capsys.readouterr().err == ""
    for epoch in (1, 2, 3):
        checkpoint_path(folder, epoch).write_bytes(b"damaged")
    again = fit_line(tmp_path, learning_rate=0.1, overwrite=True, epochs=3)
    assert again["weight"] == expected["weight"]
    assert (folder / "notes.txt").read_text() == "mine"
    for epoch in (1, 2, 3):
        verify(checkpoint_path(folder, epoch))


def test_folders_that_another_run_is_using_are_refused(tmp_path: Path) -> None:
    fit_line(tmp_path)
    for flags, folder in (({"learning_rate": 0.1, "overwrite": True}, "c"), ({}, "c"), ({}, "out")):
        description = "checkpoint folder" if folder == "c" else "output folder"
        lock = lock_folder(tmp_path / folder, description)
        try:
            with pytest.raises(InputError, match=rf"the {description} .* in use by another run"):
                fit_line(tmp_path, **flags)
        finally:
            lock.release()
    assert list_epochs(tmp_path / "c") == [1, 2]


def test_required_applies_to_all_parts_together(tmp_path: Path) -> None:
    """Interrupted in the first of two descents, a run has no checkpoint of the second yet."""
    folder = tmp_path / "c"
    config = gradient_descent.Config(tmp_path, checkpoint_dir=folder, resume="required")
    assert checkpoint_callbacks(config, part="batch")[0].resume == "required"
    (folder / "batch").mkdir(parents=True)
    checkpoint_path(folder / "batch", 1).touch()
    assert checkpoint_callbacks(config, part="stochastic")[0].resume == "auto"


def run_with_a_disk(environment, size: str, disk: Path, commands: str) -> tuple[str, str]:
    """Runs shell commands with a small disk that only they see; returns stdout and stderr."""
    disk.mkdir()
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"mount -t tmpfs -o size={size} tmpfs {disk}\n{commands}"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="may not mount a small disk (unshare -rm)")
def test_a_full_disk_leaves_the_earlier_checkpoints_intact(environment, tmp_path: Path) -> None:
    """A disk of 3 MiB for checkpoints of 0.9 MiB."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    script = f"{sys.executable} experiments/mnist.py --dataset digits --epochs 9 --log-interval 0"
    commands = f"""
        {script} --checkpoint-dir {disk}/checkpoints --output-dir {out} --keep 9
        echo "status $?"
        ls -A {disk}/checkpoints
        {sys.executable} -m jaxtrain.checkpoint {disk}/checkpoints/epoch-*
    """
    stdout, stderr = run_with_a_disk(environment, "3m", disk, commands)
    assert "status 1" in stdout, stderr
    lines = stdout.split("status 1\n")[1].split()
    names = re.findall(r"^epoch-(\d+)\.safetensors$", stdout, re.MULTILINE)
    kept = [int(epoch) for epoch in names]
    assert lines.count("intact") == len(kept) >= 2
    assert PART not in stdout
    (line,) = stderr.strip().splitlines()
    lost = max(kept) + 1
    assert line.startswith(
        f"error: {disk}/checkpoints/epoch-{lost}.safetensors could not be written (no space left "
        "on the disk); free some space and start the run again; rerun the same command to resume "
        f"after epoch {lost - 1}"
    )
    assert len(read_history(out)) >= lost


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="limits the memory of a CPU")
def test_out_of_memory_names_a_batch_size_that_fits(environment, tmp_path: Path) -> None:
    """A network whose hidden layer is 4 MiB per example, with 768 MiB to work in."""
    program = """
import resource, sys
import jax.numpy as jnp, jax
import jaxtrain as jt
batch_size, test_batch_size = map(int, sys.argv[1:])
data = jt.Dataset(jnp.ones((512, 1)), jnp.zeros(512, jnp.int32))
model = jt.models.FeedForward((2**20, 2), dropout_rate=0.0, mean=0.0, std=1.0)
state = jt.init_state(model, jt.optimizers.sgd(0.1), data.inputs[:1], key=jax.random.key(0))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 768 * 2**20,) * 2)
try:
    jt.fit(state, data.take(jnp.arange(batch_size)), data.take(jnp.arange(test_batch_size)),
           loss_fn=jt.losses.cross_entropy, epochs=1, batch_size=batch_size,
           test_batch_size=test_batch_size)
except jt.errors.OutOfMemoryError as error:
    print(error)
    print(error.fitting, *error.__notes__)
else:
    print("it fits")
"""
    # Each arena of glibc reserves address space, of which there may be one per thread.
    environment = {**environment, "MALLOC_ARENA_MAX": "2"}
    out, _ = run(environment, "-c", program, 512, 1)
    message, fitting = out.strip().splitlines()
    assert message.startswith("out of memory at batch_size 512 (")
    assert f"; try batch_size {fitting}, an estimate of what fits" in message
    assert 8 <= int(fitting) < 512
    out, _ = run(environment, "-c", program, 1, 512)
    message, test_fitting = out.strip().splitlines()
    assert message.startswith("out of memory at test_batch_size 512 (")
    assert f"; try test_batch_size {test_fitting}, an estimate of what fits" in message
    out, _ = run(environment, "-c", program, fitting, test_fitting)
    assert out.strip() == "it fits"


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="limits the memory of a CPU")
def test_data_that_do_not_fit_advise_no_batch_size(environment) -> None:
    """600 MiB of images to copy as float32, with 100 MiB to do it in."""
    program = """
import resource
import jax, jax.numpy as jnp, numpy as np
import jaxtrain as jt
data = jt.Dataset(np.zeros((200_000, 784)), np.zeros(200_000, np.int32))
state = jt.init_state(jt.models.FeedForward((4, 3), mean=0.0, std=1.0), jt.optimizers.sgd(0.1),
                      jnp.ones((1, 784)), key=jax.random.key(0))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 100 * 2**20,) * 2)
try:
    jt.fit(state, data, loss_fn=jt.losses.cross_entropy, epochs=1)
except jt.errors.OutOfMemoryError as error:
    print(error)
"""
    out, _ = run(environment, "-c", program)
    (line,) = out.strip().splitlines()
    assert line.startswith("out of memory at batch_size 64 (")
    assert line.endswith("use a device with more memory, less data at once or a smaller model")


@pytest.mark.slow
def test_600_epochs_leak_no_memory_threads_or_files(environment, tmp_path: Path) -> None:
    """With a checkpoint after every fifth."""
    out, _ = run(environment, "-m", "tests.survivor", tmp_path, 600, "--watched")
    readings = np.array([line.split() for line in out.strip().splitlines()[:-1]], int)
    epochs, kib, threads, files = readings.T
    assert list(epochs) == list(range(50, 601, 50))
    assert kib[1:].max() <= 1.05 * kib[0]
    assert len(set(threads)) == 1
    assert len(set(files)) == 1
