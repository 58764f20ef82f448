"""Two processes that train one model: the numbers of one process, one writer, and lost processes.

Each process has one simulated device, and they exchange gradients over 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from tests.parallel import cluster_member
from tests.test_readme import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "devices.md"
MEMBER = ("-m", "tests.parallel.cluster_member")
PROCESSES = 2
EPOCHS = 5
# Of the page's program.
PAGE_EPOCHS = 5
# How long the other process may take to end.
SECONDS_TO_END = 60
SECONDS_TO_TRAIN = 120


class Ended(NamedTuple):
    """What a process has left.

    Attributes:
      status: its exit status, or minus the signal that ended it.
      out: its output, without the lines of Gloo.
      err: its errors.
    """

    status: int
    out: str
    err: str


class Cluster:
    """Two processes of one command, to which address, number of processes and id are passed."""

    def __init__(self, *command: object, arguments: tuple = (), cwd: Path = ROOT) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, (*command, address, PROCESSES, process_id, *arguments))],
                env=environment,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process_id in range(PROCESSES)
        ]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_TRAIN
        while not condition():
            assert time.monotonic() < deadline
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def end_of(self, process_id: int, seconds: float) -> Ended:
        out, err = self.processes[process_id].communicate(timeout=seconds)
        # Gloo, which exchanges the arrays on CPUs, reports its connections on stdout.
        out = "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
        return Ended(self.processes[process_id].returncode, out, err)

    def results(self) -> list[Ended]:
        """Waits for both processes, neither of which may fail."""
        ended = [self.end_of(process_id, SECONDS_TO_TRAIN) for process_id in range(PROCESSES)]
        assert [each.status for each in ended] == [0, 0], ended
        return ended


@contextlib.contextmanager
def cluster(*command: object, arguments: tuple = (), cwd: Path = ROOT) -> Iterator[Cluster]:
    """Starts two processes, and kills those that are left in the end."""
    started = Cluster(*command, arguments=arguments, cwd=cwd)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            with contextlib.suppress(ValueError):  # `communicate` has closed its output
                process.communicate()


def assert_same_checkpoint(one: Path, other: Path, epoch: int, tolerance: float) -> None:
    """Compares the states, the histories and the losses of all steps in two folders."""
    found, expected = (read_all(find_checkpoint(each, epoch)) for each in (one, other))
    assert set(found) == set(expected)
    assert any("Dense_0" in name for name in found)
    for name in found:
        if "seconds" not in name:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by name, read by this process alone."""
    record, arrays = read_checkpoint(path)
    names = list(record["leaves"])
    return dict(zip(names, arrays.take((name, np.zeros(0)) for name in names), strict=True))


class Trained(NamedTuple):
    """A run of two processes that nothing interrupted, and its folder of checkpoints."""

    folder: Path
    ended: list[Ended]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    with cluster(*MEMBER, arguments=(folder, EPOCHS, "--logged")) as running:
        return Trained(folder, running.results())


def test_two_processes_give_the_numbers_of_one(trained: Trained, tmp_path: Path) -> None:
    cluster_member.train(tmp_path / "checkpoints", EPOCHS)
    assert_same_checkpoint(trained.folder, tmp_path / "checkpoints", EPOCHS, 1e-5)
    first, second = (each.out.splitlines()[0] for each in trained.ended)
    assert re.fullmatch("[0-9a-f]{16,}", first)
    assert first == second  # the digests of state and history


def test_only_the_first_process_writes_files_and_shows_progress(trained: Trained) -> None:
    first, second = trained.ended
    written = first.out.splitlines()[1].split()
    assert any(f"epoch-{EPOCHS}.safetensors" in name for name in written)
    assert {"log.csv", "log.jsonl"} <= set(written)
    assert second.out.splitlines()[1:] == [""]
    assert f"epoch {EPOCHS}:" in first.err
    assert second.err == ""
    steps = cluster_member.TRAINED // cluster_member.BATCH
    for name, lines in (("log.csv", 1 + EPOCHS), ("log.jsonl", EPOCHS * (steps + 1))):
        assert (trained.folder / name).read_text().count("\n") == lines


class Killed(NamedTuple):
    """A run whose processes were killed in turn.

    Attributes:
      folder: its folder of checkpoints.
      ended: what each process left, which ended after the other one was killed.
      resumed: what both left that ran to the end.
    """

    folder: Path
    ended: list[Ended]
    resumed: list[Ended]


@pytest.fixture(scope="module", params=["file", "orbax"])
def killed(tmp_path_factory, request) -> Killed:
    """Kills process 1, starts both again and kills process 0, and starts both again.

    The processes read streams, and are killed within an epoch.
    """
    folder = tmp_path_factory.mktemp("killed") / "checkpoints"
    ended = []
    flags = ("--streamed", *(["--orbax"] if request.param == "orbax" else []))
    for victim in (1, 0):
        with cluster(*MEMBER, arguments=(folder, EPOCHS, "--slow", *flags)) as running:
            before = newest(folder)
            running.wait_for(lambda old=before: newest(folder) > old and newest(folder)[1] == 3)
            running.processes[victim].kill()
            ended.append(running.end_of(1 - victim, SECONDS_TO_END))
    assert newest(folder)[1] > 0, "the run was not killed within an epoch"
    with cluster(*MEMBER, arguments=(folder, EPOCHS, *flags)) as running:
        return Killed(folder, ended, running.results())


def newest(folder: Path) -> tuple[int, int]:
    """Returns the completed epochs and the step of the newest checkpoint."""
    return max(list_checkpoints(folder), default=(0, 0)) if folder.exists() else (0, 0)


def test_the_first_process_ends_with_one_line_if_another_is_killed(killed: Killed) -> None:
    ended = killed.ended[0]
    assert ended.status == 1
    lines = ended.err.strip().splitlines()
    assert lines[-1].startswith("error: process 0 of 2 lost the connection to another one (")
    assert "start all processes again" in lines[-1]
    assert len([line for line in lines if line.startswith("error")]) == 1
    assert "Traceback" not in ended.err


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    with cluster(*MEMBER, arguments=(tmp_path / "checkpoints", EPOCHS, "--failing")) as running:
        second = running.end_of(1, SECONDS_TO_TRAIN)
        first = running.end_of(0, SECONDS_TO_END)
    assert first.status == second.status == 1
    assert second.err.rstrip().splitlines()[-1].endswith("the disk is gone")
    assert first.err.splitlines()[-1].startswith(
        "error: process 0 of 2 lost the connection to another one ("
    )


def test_the_other_processes_end_if_the_first_is_killed(killed: Killed) -> None:
    assert killed.ended[1].status not in (0, -signal.SIGKILL)
    assert killed.ended[1].err


def test_both_resume_within_an_epoch_with_the_numbers_of_an_uninterrupted_run(
    trained: Trained, killed: Killed
) -> None:
    """Each process reads its rows of every batch, and keeps its position in the checkpoint."""
    assert_same_checkpoint(killed.folder, trained.folder, EPOCHS, 1e-5)
    first, second = killed.resumed
    assert "resuming after step" in first.err
    assert first.out.splitlines()[0] == second.out.splitlines()[0]


def test_a_divided_state_is_saved_without_all_of_it_in_one_process(tmp_path: Path) -> None:
    """Each process has half of the state, and its memory grows by less than the state.

    As a file it grows by more than three times the state.
    """
    with cluster("-m", "tests.parallel.large_member", arguments=(tmp_path, "orbax")) as running:
        for ended in running.results():
            growth, restored = ended.out.splitlines()
            assert float(growth) < 1.0
            assert restored == "2 True"


def test_the_program_of_the_page_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Each process loads a part of the data, which `shard` joins."""
    [program] = re.findall(
        r"^```python train\.py\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    (tmp_path / "train.py").write_text(program)
    with cluster("train.py", cwd=tmp_path) as running:
        first, second = running.results()
    assert second.out == second.err == ""
    accuracy = float(re.search(r"test accuracy: (.*)", first.out)[1])

    train, test = jt.data.load("digits")
    train, test = train[:1436], test[:360]
    mean, std = jt.data.STATISTICS["digits"]
    model, optimizer = jt.models.FeedForward(mean=mean, std=std), jt.optimizers.sgd(0.05)
    state = jt.init_state(model, optimizer, train.inputs[:1], key=jax.random.key(0))
    _, history = jt.fit(
        state,
        train,
        test,
        loss_fn=jt.losses.cross_entropy,
        metric_fns={"accuracy": jt.metrics.accuracy},
        epochs=PAGE_EPOCHS,
        key=jax.random.key(1),
        callbacks=[jt.callbacks.checkpoint(tmp_path / "alone")],
    )
    assert history["test_accuracy"][-1] == pytest.approx(accuracy, abs=1e-3)
    assert_same_checkpoint(tmp_path / "checkpoints", tmp_path / "alone", PAGE_EPOCHS, 1e-5)
