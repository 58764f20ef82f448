"""Runs that are killed, interrupted or out of disk or memory: what is kept, and the message."""

from __future__ import annotations

import contextlib
import csv
import json
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

import jaxtrain as jt
from experiments import gradient_descent, linear_regression, optimizers
from jaxtrain._files import PART, lock_folder
from jaxtrain.checkpoint import checkpoint_path, list_checkpoints, list_epochs, verify
from jaxtrain.cli.flags import Safety
from jaxtrain.cli.resuming import checkpoint_callbacks, resumes
from jaxtrain.cli.runs import RunFolder
from jaxtrain.errors import InputError, NonFiniteError, recovery_notes

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


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        pytest.param((), 20, id="in memory, with averaged parameters"),
        pytest.param(("--streamed",), 1, id="stream with workers, accumulated gradients"),
    ],
)
def test_a_run_killed_20_times_ends_in_the_same_bits(environment, tmp_path, flags, more) -> None:
    """SIGKILL at random moments, every second time while a checkpoint is being written.

    The stream is read by another process every second time.
    """
    moments = random.Random(0)
    folder = tmp_path / "checkpoints"
    while_writing = 0
    for kill in range(20):
        before = list_checkpoints(folder)
        for leftover in unfinished(folder):  # the run removes it too, but later
            leftover.unlink()
        worker = ["--worker"] * (bool(flags) and kill % 4 > 1)
        process = start(environment, "-m", "tests.survivor", folder, 1_000_000, *flags, *worker)
        if kill % 2:
            wait_for(lambda: unfinished(folder), process, interval=0)
            time.sleep(moments.uniform(0, 0.002))
        else:
            wait_for(lambda before=before: list_checkpoints(folder) != before, process)
            time.sleep(moments.uniform(0, 0.3))
        kill_with_workers(process)
        assert process.returncode == -signal.SIGKILL
        while_writing += bool(unfinished(folder))
        for found in list_checkpoints(folder):
            verify(checkpoint_path(folder, *found))
    assert while_writing >= 5
    epochs = list_checkpoints(folder)[-1][0] + more
    resumed, _ = run(environment, "-m", "tests.survivor", folder, epochs, *flags)
    assert not unfinished(folder)
    straight, _ = run(environment, "-m", "tests.survivor", "nowhere", epochs, "--plain", *flags)
    assert resumed == straight


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_says_how_to_resume(environment, tmp_path: Path, number: int) -> None:
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/mnist.py", *DIGITS, "--checkpoint-dir", folder, "--output-dir", out)
    process = start(environment, *script, "--epochs", 1_000_000)
    wait_for(lambda: len(list_epochs(folder)) == 3, process)
    process.send_signal(number)
    time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # a second signal is ignored
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    epoch = list_epochs(folder)[-1]
    verify(checkpoint_path(folder, epoch))
    assert not unfinished(folder)
    finished = len(read_history(out))
    assert finished >= epoch
    word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
    assert last_line(err) == (
        f"{word}; rerun the same command to resume after epoch {epoch}; its checkpoint is "
        f"{folder}/epoch-{epoch}.safetensors; the completed epochs ({finished}) are in "
        f"{out}/history.csv"
    )


def test_a_resumed_experiment_equals_an_uninterrupted_one(environment, tmp_path: Path) -> None:
    """In history, summary and pictures; the number of epochs may grow."""
    script = ("experiments/mnist.py", *DIGITS, "--validation", 0.1, "--log-interval", 0)
    parts = ("--checkpoint-dir", tmp_path / "checkpoints", "--output-dir", tmp_path / "parts")
    run(environment, *script, *parts, "--epochs", 2)
    out, _ = run(environment, *script, *parts, "--epochs", 5, "--resume", "required")
    assert last_line(out) == f"results: {tmp_path}/parts"
    run(environment, *script, "--epochs", 5, "--output-dir", tmp_path / "whole")
    assert read_history(tmp_path / "parts") == read_history(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    assert "model.safetensors" in names
    for name in names:
        if name.endswith((".safetensors", "s.png")) and name != "learning_curves.png":
            whole = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / "parts" / name).read_bytes() == whole
    files = [tmp_path / name / "summary.json" for name in ("parts", "whole")]
    summaries = [json.loads(file.read_text()) for file in files]
    changing = {"compile_seconds", "train_seconds", "total_seconds"}
    ours, theirs = ({k: v for k, v in s.items() if k not in changing} for s in summaries)
    assert ours == theirs


@pytest.mark.parametrize(
    ("script", "flags", "pictures"),
    [
        ("linear_regression", ("--epochs", 50), {"fit.png", "last_epochs.png"}),
        ("gradient_descent", (), {"descent.png"}),
        ("minibatch_regression", ("--epochs", 20), {"fit.png", "path.png"}),
    ],
)
def test_every_tutorial_resumes(environment, tmp_path: Path, script, flags, pictures) -> None:
    """Killed in the middle; its pictures need the epochs before."""
    folder = tmp_path / "checkpoints"
    command = (f"experiments/{script}.py", *flags, "--log-interval", 0)
    parts = ("--checkpoint-dir", folder, "--output-dir", tmp_path / "parts")
    process = start(environment, *command, *parts)
    deep = folder / "stochastic" if script == "gradient_descent" else folder
    wait_for(lambda: len(list_epochs(deep)) == 3, process)
    process.kill()
    process.communicate()
    run(environment, *command, *parts)
    run(environment, *command, "--output-dir", tmp_path / "whole")
    assert read_history(tmp_path / "parts") == read_history(tmp_path / "whole")
    for name in pictures:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "parts" / name).read_bytes() == whole


def test_another_run_does_not_resume(environment, tmp_path: Path) -> None:
    """The difference is named; an output folder keeps its results."""
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/linear_regression.py", "--log-interval", 0, "--epochs", 2)
    script = (*script, "--checkpoint-dir", folder, "--output-dir", out)
    run(environment, *script)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flags, message in [
        (
            ("--learning-rate", 0.1, "--seed", 1),
            "learning_rate was 0.01 and is now 0.1, seed was 4",
        ),
        (("--epochs", 1), "epochs is 1, but"),
        (("--resume", "never"), "contains a finished run"),
        (("--resume", "never", "--overwrite"), "resume is 'never', but"),
        (
            ("--resume", "required", "--checkpoint-dir", tmp_path / "a", "--overwrite"),
            "has no checkpoint",
        ),
        (("--checkpoint-dir", out), "the output folder itself"),
    ]:
        _, err = run(environment, *script, *flags, expect=1)
        assert len(err.splitlines()) == 1
        assert message in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_overwrite_replaces_the_checkpoints_of_another_run(environment, tmp_path: Path) -> None:
    """Which the message of the run without the flag offers; the same run still resumes."""
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/linear_regression.py", "--log-interval", 0, "--epochs", 5)
    script = (*script, "--checkpoint-dir", folder, "--output-dir", out)
    run(environment, *script)
    (folder / "notes.txt").write_text("mine")
    other = (*script, "--epochs", 2, "--learning-rate", 0.1)
    _, err = run(environment, *other, expect=1)
    assert "learning_rate was 0.01 and is now 0.1" in err
    assert "or replace it with --overwrite" in err
    assert list_epochs(folder) == [3, 4, 5]
    _, err = run(environment, *other, "--overwrite")
    assert err == f"removed the checkpoints of another run in {folder}\n"
    assert list_epochs(folder) == [1, 2]
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(read_history(out)) == 2
    _, err = run(environment, *other, "--overwrite", "--epochs", 3)
    assert err == ""
    assert list_epochs(folder) == [1, 2, 3]
    # With an output folder of its own, too.
    elsewhere = (*script, "--output-dir", tmp_path / "new", "--seed", 1)
    _, err = run(environment, *elsewhere, expect=1)
    assert "--overwrite" not in err
    assert list_epochs(folder) == [1, 2, 3]
    run(environment, *elsewhere, "--overwrite")
    assert list_epochs(folder) == [3, 4, 5]


def test_overwrite_replaces_damaged_checkpoints(tmp_path: Path) -> None:
    safety = Safety(checkpoint_dir=tmp_path / "c")
    config = linear_regression.Config(
        epochs=2, log_interval=0, output_dir=tmp_path / "out", overwrite=True, safety=safety
    )
    expected = linear_regression.run(config)
    for epoch in (1, 2):
        checkpoint_path(tmp_path / "c", epoch).write_bytes(b"damaged")
    assert linear_regression.run(config)["weight"] == expected["weight"]
    for epoch in (1, 2):
        verify(checkpoint_path(tmp_path / "c", epoch))


def test_checkpoints_that_another_run_is_using_are_not_removed(tmp_path: Path) -> None:
    def config(rate: float) -> linear_regression.Config:
        return linear_regression.Config(
            epochs=1,
            learning_rate=rate,
            log_interval=0,
            output_dir=tmp_path / "out",
            overwrite=True,
            safety=Safety(checkpoint_dir=tmp_path / "c"),
        )

    linear_regression.run(config(0.01))
    lock = lock_folder(tmp_path / "c", "checkpoint folder")
    try:
        with pytest.raises(InputError, match="in use by another run"):
            linear_regression.run(config(0.1))
    finally:
        lock.release()
    assert list_epochs(tmp_path / "c") == [1]


def test_results_of_another_run_are_recognized(tmp_path: Path) -> None:
    """Even if both runs have the same folder of checkpoints, by whichever path."""
    out = tmp_path / "out"

    def config(folder: Path, **options) -> linear_regression.Config:
        safety = Safety(checkpoint_dir=folder)
        return linear_regression.Config(
            epochs=2, log_interval=0, output_dir=out, safety=safety, **options
        )

    linear_regression.run(config(tmp_path / "checkpoints", learning_rate=0.1))
    assert resumes(config(tmp_path / "checkpoints", learning_rate=0.1))
    assert resumes(config(tmp_path / "out" / ".." / "checkpoints", learning_rate=0.1))
    with pytest.raises(InputError, match=r"another run: learning_rate was 0\.1 and is now 0\.2"):
        resumes(config(tmp_path / "checkpoints", learning_rate=0.2))


def test_required_applies_to_all_parts_together(tmp_path: Path) -> None:
    """Interrupted in the first of two descents, a run has no checkpoint of the second yet."""
    safety = Safety(checkpoint_dir=tmp_path / "c", resume="required")
    config = gradient_descent.Config(epochs=2, log_interval=0, output_dir=tmp_path, safety=safety)
    assert checkpoint_callbacks(config, part="batch")[0].resume == "required"
    (tmp_path / "c" / "batch").mkdir(parents=True)
    checkpoint_path(tmp_path / "c" / "batch", 1).touch()
    assert checkpoint_callbacks(config, part="stochastic")[0].resume == "auto"


def test_a_second_process_is_refused(environment, tmp_path: Path) -> None:
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/mnist.py", *DIGITS, "--epochs", 1_000_000)
    first = start(environment, *script, "--checkpoint-dir", folder, "--output-dir", out)
    try:
        wait_for(lambda: list_epochs(folder), first)
        other = ("--checkpoint-dir", folder, "--output-dir", tmp_path / "other")
        _, err = run(environment, *script, *other, expect=1)
        assert err == (
            f"error: the checkpoint folder {folder} is in use by another run; wait until it ends, "
            "or use another folder\n"
        )
        _, err = run(environment, *script, "--output-dir", out, expect=1)
        assert f"the output folder {out} is in use by another run" in err
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    # The lock of the killed run is released.
    before = list_epochs(folder)
    resumed = start(environment, *script, "--checkpoint-dir", folder, "--output-dir", out)
    wait_for(lambda: list_epochs(folder)[-1] > before[-1], resumed)
    resumed.kill()
    resumed.communicate()


@pytest.mark.parametrize(
    ("script", "flags"),
    [("linear_regression", ("--epochs", 5, "--log-interval", 0)), ("losses", ())],
)
def test_a_finished_run_is_not_overwritten(environment, tmp_path: Path, script, flags) -> None:
    command = (f"experiments/{script}.py", *flags, "--output-dir", tmp_path)
    run(environment, *command)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _, err = run(environment, *command, expect=1)
    assert err == (
        f"error: the output folder {tmp_path} contains a finished run; choose another folder "
        "with --output-dir, or replace it with --overwrite\n"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(environment, *command, "--overwrite")


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


@pytest.mark.skipif(not HAS_NAMESPACES, reason="may not mount a small disk (unshare -rm)")
def test_a_full_disk_for_the_results_names_the_file(environment, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    script = f"{sys.executable} experiments/mnist.py --dataset digits --epochs 3 --log-interval 0"
    commands = f'{script} --output-dir {disk}/out; echo "status $?"; cat {disk}/out/history.csv'
    stdout, stderr = run_with_a_disk(environment, "64k", disk, commands)
    assert "status 1" in stdout
    assert stdout.count("\n3,") == 1  # the completed epochs
    (line,) = stderr.strip().splitlines()
    assert line.startswith(
        f"error: {disk}/out/model.safetensors could not be written (no space left on the disk); "
    )


@pytest.mark.skipif(not HAS_NAMESPACES, reason="may not mount a small disk (unshare -rm)")
def test_a_full_disk_ends_the_logs_and_not_the_run(environment, tmp_path: Path) -> None:
    """Each log of 1,000 epochs is larger than the disk."""
    disk = tmp_path / "disk"
    program = """
import sys, jax, jax.numpy as jnp, jaxtrain as jt
from pathlib import Path
data, folder = jt.Dataset(jnp.ones((2, 1)), jnp.ones((2, 1))), Path(sys.argv[1])
model = jt.models.LinearRegression()
state = jt.init_state(model, jt.optimizers.sgd(0.01), data.inputs[:1], key=jax.random.key(0))
logs = [
    jt.callbacks.csv(folder / "log.csv", steps=folder / "steps.csv"),
    jt.callbacks.json_lines(folder / "log.jsonl"),
    jt.callbacks.tensorboard(folder / "tensorboard"),
]
_, history = jt.fit(
    state, data, loss_fn=jt.losses.mean_squared_error, epochs=1000, callbacks=logs
)
print(len(history["epoch"]))
"""
    (tmp_path / "program.py").write_text(program)
    command = f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/program.py {disk}; echo status $?"
    stdout, stderr = run_with_a_disk(environment, "64k", disk, command)
    assert stdout.split() == ["1000", "status", "0"], stderr
    warned = [line for line in stderr.splitlines() if "UserWarning" in line]
    assert len(warned) == 3, stderr
    for line in warned:
        assert re.search(
            rf"the (CSV|JSON lines|TensorBoard) logger cannot write to {disk}\S* \((No|no) space "
            r"left on .*\); it stops logging, and training continues",
            line,
        )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="limits the memory of a CPU")
def test_out_of_memory_names_a_batch_size_that_fits(environment, tmp_path: Path) -> None:
    """A network whose hidden layer is 16 MiB per example, with 3 GiB to work in."""
    program = """
import resource, sys
import jax.numpy as jnp, jax
import jaxtrain as jt
batch_size, test_batch_size = map(int, sys.argv[1:])
data = jt.Dataset(jnp.ones((512, 1)), jnp.zeros(512, jnp.int32))
model = jt.models.FeedForward((2**22, 2), dropout_rate=0.0, mean=0.0, std=1.0)
state = jt.init_state(model, jt.optimizers.sgd(0.1), data.inputs[:1], key=jax.random.key(0))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30,) * 2)
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


def test_a_thousand_epochs_leak_no_memory_threads_or_files(environment, tmp_path: Path) -> None:
    """With a checkpoint after every fifth."""
    out, _ = run(environment, "-m", "tests.survivor", tmp_path, 1000, "--watched")
    readings = np.array([line.split() for line in out.strip().splitlines()[:-1]], int)
    epochs, kib, threads, files = readings.T
    assert list(epochs) == list(range(50, 1001, 50))
    assert kib[1:].max() <= 1.05 * kib[0]
    assert len(set(threads)) == 1
    assert len(set(files)) == 1


def test_a_finished_run_that_resumes_keeps_its_results_until_there_are_newer(
    environment, tmp_path: Path
) -> None:
    """The same command again; then more epochs, killed in the middle."""
    script = ("experiments/linear_regression.py", "--checkpoint-every", 10)
    script = (*script, "--checkpoint-dir", tmp_path / "c", "--output-dir", tmp_path / "out")
    run(environment, *script, "--epochs", 30)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    summary = (tmp_path / "out" / "summary.json").read_text()
    _, err = run(environment, *script, "--epochs", 30)
    assert "already finished, after epoch 30: nothing left to train" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
    process = start(environment, *script, "--epochs", 100_000)
    wait_for(lambda: list_epochs(tmp_path / "c")[-1] >= 50, process)
    process.kill()
    process.communicate()
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert kept["weight"] == json.loads(summary)["weight"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= before


def test_solvers_with_another_budget_are_other_runs(
    tmp_path: Path, digits: jt.data.Resolved
) -> None:
    """The budget decides the rates of some."""
    safety = Safety(checkpoint_dir=tmp_path / "checkpoints")

    def train(epochs: int) -> None:
        config = optimizers.Config(epochs=epochs, safety=safety)
        with RunFolder(tmp_path / "out", config) as folder:
            optimizers.train("sgd", 0.1, config, digits, digits.test, folder)

    train(1)
    with pytest.raises(InputError, match="epochs was 1 and is now 2"):
        train(2)


def test_a_gpu_that_jax_cannot_use_is_explained() -> None:
    from jaxtrain.cli.devices import missing_gpu_advice

    assert "pip install 'jaxtrain[cuda]'" in missing_gpu_advice(gpu=True, plugin=False)
    assert "driver is recent enough" in missing_gpu_advice(gpu=True, plugin=True)
    assert "no NVIDIA GPU" in missing_gpu_advice(gpu=False, plugin=True)
    assert "no NVIDIA GPU" in missing_gpu_advice(gpu=False, plugin=False)


def test_a_run_that_diverges_keeps_its_checkpoints(tmp_path: Path) -> None:
    data = jt.Dataset(jax.numpy.linspace(-1, 1, 8)[:, None], jax.numpy.linspace(0, 3, 8)[:, None])
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(1e3),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    with pytest.raises(NonFiniteError) as raised:
        jt.fit(
            state,
            data,
            loss_fn=jt.losses.mean_squared_error,
            epochs=99,
            callbacks=[jt.callbacks.checkpoint(tmp_path, keep=2)],
        )
    assert list_epochs(tmp_path) == [raised.value.epoch - 2, raised.value.epoch - 1]
    for epoch in list_epochs(tmp_path):
        verify(checkpoint_path(tmp_path, epoch))
    (note,) = recovery_notes(raised.value)
    assert note.endswith("other settings need another folder")
