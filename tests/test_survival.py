"""Runs that are killed, interrupted, starved of disk or memory: what is kept, and what is said."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
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
from jaxtrain import command
from jaxtrain.checkpoint_files import check_sums
from jaxtrain.checkpoints import checkpoint_folder, list_epochs
from jaxtrain.command import Safety
from jaxtrain.errors import what_is_kept
from jaxtrain.runs import RunFolder

ROOT = Path(__file__).parents[1]
DIGITS = ("--dataset", "digits")
HAS_NAMESPACES = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.fixture
def environment() -> dict[str, str]:
    """The caller's, without its data."""
    return {name: value for name, value in os.environ.items() if name != "JAXTRAIN_DATA_DIR"}


def start(environment, *command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(environment, *command: object, expect: int = 0) -> tuple[str, str]:
    """What it prints on stdout and stderr."""
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


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_at_20_moments_it_ends_in_the_same_bits(environment, tmp_path: Path) -> None:
    """SIGKILL, every second time while a checkpoint is being written."""
    epochs = 200
    moments = random.Random(0)
    folder = tmp_path / "checkpoints"
    while_writing = 0
    for kill in range(20):
        before = list_epochs(folder)
        for left in folder.glob("*.unfinished"):  # the run would; here it would be taken for new
            shutil.rmtree(left)
        process = start(environment, "-m", "tests.survivor", folder, epochs)
        if kill % 2:
            wait_for(lambda: any(folder.glob("*.unfinished")), process)
            time.sleep(moments.uniform(0, 0.03))
        else:
            wait_for(lambda before=before: list_epochs(folder) != before, process)
            time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        while_writing += any(folder.glob("*.unfinished"))
        for epoch in list_epochs(folder):  # whole, whenever it was
            check_sums(checkpoint_folder(folder, epoch))
    assert while_writing >= 5
    assert list_epochs(folder)[-1] < epochs
    resumed, _ = run(environment, "-m", "tests.survivor", folder, epochs)
    assert not list(folder.glob("*.unfinished"))
    straight, _ = run(environment, "-m", "tests.survivor", "nowhere", epochs, "--plain")
    assert resumed == straight


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_says_where_to_go_on(environment, tmp_path: Path, number: int) -> None:
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/mnist.py", *DIGITS, "--checkpoint-dir", folder, "--output-dir", out)
    process = start(environment, *script, "--epochs", 1_000_000)
    wait_for(lambda: len(list_epochs(folder)) == 3, process)
    process.send_signal(number)
    time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # impatience does not cut it off
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    epoch = list_epochs(folder)[-1]
    check_sums(checkpoint_folder(folder, epoch))
    assert not list(folder.glob("*.unfinished"))
    finished = len(read_history(out))
    assert finished >= epoch
    word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
    assert last_line(err) == (
        f"{word}; the same command goes on after epoch {epoch}, whose checkpoint is in {folder}; "
        f"the finished epochs ({finished}) are in {out}/history.csv"
    )


def test_an_experiment_goes_on_where_it_was_cut_off(environment, tmp_path: Path) -> None:
    """Its history, summary and pictures are those of a run in one piece; its epochs may grow."""
    script = ("experiments/mnist.py", *DIGITS, "--validation", 0.1, "--log-interval", 0)
    parts = ("--checkpoint-dir", tmp_path / "checkpoints", "--output-dir", tmp_path / "parts")
    run(environment, *script, *parts, "--epochs", 2)
    out, _ = run(environment, *script, *parts, "--epochs", 5, "--resume", "must")
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
def test_every_tutorial_goes_on(environment, tmp_path: Path, script, flags, pictures) -> None:
    """Killed in the middle; its pictures need what came before."""
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


def test_another_run_does_not_go_on_from_it(environment, tmp_path: Path) -> None:
    """The change is named; an output folder that has results keeps them."""
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
        (("--resume", "never"), "holds a finished run"),
        (("--resume", "never", "--overwrite"), "resume is 'never', but"),
        (("--resume", "must", "--checkpoint-dir", tmp_path / "a", "--overwrite"), "holds no check"),
        (("--checkpoint-dir", out), "the output folder itself"),
    ]:
        _, err = run(environment, *script, *flags, expect=1)
        assert len(err.splitlines()) == 1
        assert message in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_results_of_another_run_are_not_this_ones(tmp_path: Path) -> None:
    """Though its checkpoints were in a folder of the same name."""
    out = tmp_path / "out"

    def config(folder: Path, **options) -> linear_regression.Config:
        safety = Safety(checkpoint_dir=folder)
        return linear_regression.Config(
            epochs=2, log_interval=0, output_dir=out, safety=safety, **options
        )

    linear_regression.run(config(tmp_path / "checkpoints", learning_rate=0.1))
    assert command.output_folder(config(tmp_path / "checkpoints", learning_rate=0.1))
    assert command.output_folder(config(tmp_path / "out" / ".." / "checkpoints", learning_rate=0.1))
    with pytest.raises(jt.InputError, match=r"another run: learning_rate was 0\.1 and is now 0\.2"):
        command.output_folder(config(tmp_path / "checkpoints", learning_rate=0.2))


def test_must_is_asked_of_all_parts_together(tmp_path: Path) -> None:
    """Cut off in the first of two descents, there is none of the second yet."""
    safety = Safety(checkpoint_dir=tmp_path / "c", resume="must")
    config = gradient_descent.Config(epochs=2, log_interval=0, output_dir=tmp_path, safety=safety)
    assert safety.fit_options(config, part="batch")["resume"] == "must"
    (tmp_path / "c" / "batch" / "epoch-1").mkdir(parents=True)
    assert safety.fit_options(config, part="stochastic")["resume"] == "auto"


def test_a_second_process_is_refused(environment, tmp_path: Path) -> None:
    folder, out = tmp_path / "checkpoints", tmp_path / "out"
    script = ("experiments/mnist.py", *DIGITS, "--epochs", 1_000_000)
    first = start(environment, *script, "--checkpoint-dir", folder, "--output-dir", out)
    try:
        wait_for(lambda: list_epochs(folder), first)
        other = ("--checkpoint-dir", folder, "--output-dir", tmp_path / "other")
        _, err = run(environment, *script, *other, expect=1)
        assert err == (
            f"error: the checkpoint folder {folder} is in use by another run; wait for its end, or "
            "name another by --checkpoint-dir\n"
        )
        _, err = run(environment, *script, "--output-dir", out, expect=1)
        assert f"the output folder {out} is in use by another run" in err
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    # The killed one holds nothing any more.
    before = list_epochs(folder)
    resumed = start(environment, *script, "--checkpoint-dir", folder, "--output-dir", out)
    wait_for(lambda: list_epochs(folder)[-1] > before[-1], resumed)
    resumed.kill()
    resumed.communicate()


@pytest.mark.parametrize(
    ("script", "flags"), [("linear_regression", ("--epochs", 5)), ("losses", ())]
)
def test_a_finished_run_is_not_overwritten(environment, tmp_path: Path, script, flags) -> None:
    command = (f"experiments/{script}.py", *flags, "--log-interval", 0, "--output-dir", tmp_path)
    run(environment, *command)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _, err = run(environment, *command, expect=1)
    assert err == (
        f"error: the output folder {tmp_path} holds a finished run; keep it and name another by "
        "--output-dir, or take --overwrite\n"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(environment, *command, "--overwrite")


def run_with_a_disk(environment, size: str, disk: Path, commands: str) -> tuple[str, str]:
    """Shell commands with a small disk that only their process tree sees; stdout and stderr."""
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


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs leave to mount a small disk (unshare -rm)")
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints_whole(
    environment, tmp_path: Path
) -> None:
    """A disk of 3 MiB for checkpoints of 0.9 MiB."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    script = f"{sys.executable} experiments/mnist.py --dataset digits --epochs 9 --log-interval 0"
    commands = f"""
        {script} --checkpoint-dir {disk}/checkpoints --output-dir {out} --keep 9
        echo "status $?"
        cd {disk}/checkpoints && ls && for epoch in epoch-*; do
            (cd $epoch && sha256sum --check --quiet SHA256SUMS && echo "whole $epoch"); done
    """
    stdout, stderr = run_with_a_disk(environment, "3m", disk, commands)
    assert "status 1" in stdout, stderr
    lines = stdout.split("status 1\n")[1].split()
    kept = [int(name.removeprefix("epoch-")) for name in lines if name.startswith("epoch-")]
    assert lines.count("whole") == len(set(kept)) >= 2
    assert "unfinished" not in stdout
    (line,) = stderr.strip().splitlines()
    lost = max(kept) + 1
    assert line.startswith(
        f"error: {disk}/checkpoints/epoch-{lost} could not be written (no space left on the disk); "
        f"make room and run it again; the same command goes on after epoch {lost - 1}"
    )
    assert len(read_history(out)) >= lost


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs leave to mount a small disk (unshare -rm)")
def test_a_full_disk_for_the_results_is_said(environment, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    script = f"{sys.executable} experiments/mnist.py --dataset digits --epochs 3 --log-interval 0"
    commands = f'{script} --output-dir {disk}/out; echo "status $?"; cat {disk}/out/history.csv'
    stdout, stderr = run_with_a_disk(environment, "64k", disk, commands)
    assert "status 1" in stdout
    assert stdout.count("\n3,") == 1  # what was finished is there
    (line,) = stderr.strip().splitlines()
    assert line.startswith(
        f"error: {disk}/out/model.safetensors could not be written (no space left on the disk); "
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="limits the memory of a CPU")
def test_out_of_memory_names_a_batch_size_that_fits(environment, tmp_path: Path) -> None:
    """A network whose hidden layer is 16 MiB an example, with 3 GiB to work in."""
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
except jt.OutOfMemoryError as error:
    print(error)
    print(error.fitting)
else:
    print("it fits")
"""
    out, _ = run(environment, "-c", program, 512, 1)
    message, fitting = out.strip().splitlines()
    assert message.startswith("out of memory at batch size 512 (")
    assert f"an estimate of what fits is --batch-size {fitting}" in message
    assert 8 <= int(fitting) < 512
    out, _ = run(environment, "-c", program, 1, 512)
    message, test_fitting = out.strip().splitlines()
    assert message.startswith("out of memory at test batch size 512 (")
    assert f"an estimate of what fits is --test-batch-size {test_fitting}" in message
    out, _ = run(environment, "-c", program, fitting, test_fitting)
    assert out.strip() == "it fits"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="limits the memory of a CPU")
def test_data_that_do_not_fit_are_no_matter_of_the_batch_size(environment) -> None:
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
except jt.OutOfMemoryError as error:
    print(error)
"""
    out, _ = run(environment, "-c", program)
    (line,) = out.strip().splitlines()
    assert line.startswith("out of memory at batch size 64 (")
    assert line.endswith("expected a device with more memory, less data at once or a smaller model")


def test_a_thousand_epochs_leave_memory_threads_and_files_as_they_were(
    environment, tmp_path: Path
) -> None:
    """With a checkpoint after every fifth."""
    out, _ = run(environment, "-m", "tests.survivor", tmp_path, 1000, "--watch")
    readings = np.array([line.split() for line in out.strip().splitlines()[:-1]], int)
    epochs, kib, threads, files = readings.T
    assert list(epochs) == list(range(50, 1001, 50))
    assert kib[1:].max() <= 1.05 * kib[0]
    assert len(set(threads)) == 1
    assert len(set(files)) == 1


def test_a_finished_run_that_goes_on_keeps_its_results_till_there_are_newer(
    environment, tmp_path: Path
) -> None:
    """The same command again; then more epochs, killed in the middle."""
    script = ("experiments/linear_regression.py", "--checkpoint-every", 10)
    script = (*script, "--checkpoint-dir", tmp_path / "c", "--output-dir", tmp_path / "out")
    run(environment, *script, "--epochs", 30)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    summary = (tmp_path / "out" / "summary.json").read_text()
    _, err = run(environment, *script, "--epochs", 30)
    assert "finished already, after epoch 30: nothing left to train" in err
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
    """Some of their rates are chosen by it."""
    safety = Safety(checkpoint_dir=tmp_path / "checkpoints")

    def train(epochs: int) -> None:
        config = optimizers.Config(epochs=epochs, safety=safety)
        with RunFolder(tmp_path / "out", config) as folder:
            optimizers.train("sgd", 0.1, config, digits, digits.test, folder)

    train(1)
    with pytest.raises(jt.InputError, match="epochs was 1 and is now 2"):
        train(2)


def test_a_gpu_that_jax_cannot_see_is_explained() -> None:
    from jaxtrain.devices import missing_gpu_advice

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
    with pytest.raises(jt.NonFiniteLossError) as raised:
        jt.fit(
            state,
            data,
            loss_fn=jt.losses.mean_squared_error,
            epochs=99,
            checkpoint_dir=tmp_path,
            keep=2,
        )
    assert list_epochs(tmp_path) == [raised.value.epoch - 2, raised.value.epoch - 1]
    for epoch in list_epochs(tmp_path):
        check_sums(checkpoint_folder(tmp_path, epoch))
    (note,) = what_is_kept(raised.value)
    assert note.endswith("a run with other flags takes another checkpoint_dir")
