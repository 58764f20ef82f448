"""Processes that should train together and differ: one sentence in every process names it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.parallel.disagreeing_member import CASES
from tests.parallel.test_processes import Ended, cluster
from tests.test_readme import ROOT

pytestmark = pytest.mark.slow

# What the error of each case says; "" where the processes agree.
NAMED = {
    "nothing": "",
    "nothing on streams": "",
    "learning rate": "learning_rate is 0.1 on process 0 and 0.2 on process 1",
    "rate of optax": "the program of a step is ",
    "initial key": "state.params.Dense_0.weight is float32[4, 4] with the digest ",
    "shuffle key": "train data is shuffled by key ",
    "data scale": "train.inputs is float32[32, 4] with the digest ",
    "batch size": "train batch_size is 8 on process 0 and 16 on process 1",
    "examples": "train.inputs is float32[32, 4] with the digest ",
    "sharded examples": "inputs is float32[32, 4] on process 0 and float32[16, 4] on process 1",
    "loss": "loss is cross_entropy (",
    "epochs": "epochs is 1 on process 0 and 2 on process 1",
    "metrics": "metrics is none on process 0 and accuracy: accuracy (",
    "test data": "test.inputs is float32[32, 4] with the digest ",
    "stream key": "train data is Stream(32 examples in batches of 8, shuffled by key ",
    "rows per batch": "train batch_size is 8 on process 0 and 16 on process 1",
    "number of batches": "what follows in train in epoch 1 is batches 1 to 3 of 16 examples",
    "rows of a later batch": "is batches 3 to 3 of 8 examples in ",
    "callback": "state.step is 4 on process 0 and unchanged on process 1",
    "judge": "saving and monitoring callbacks is EarlyStopping(",
    "train": "epochs of the program is 1 on process 0 and 2 on process 1",
    "copies": "w is float64[3] with the digest ",
    "values in a step": "state.params.Dense_0.weight is float32[4, 4] with the digest ",
}


@pytest.fixture(scope="module")
def errors() -> tuple[dict[str, str], dict[str, str]]:
    """The errors of both processes by case."""

    def read(ended: Ended) -> dict[str, str]:
        return {name: error or "" for name, error in map(json.loads, ended.out.splitlines())}

    with cluster("-m", "tests.parallel.disagreeing_member") as running:
        first, second = running.results()
    return read(first), read(second)


@pytest.mark.parametrize("name", CASES)
def test_every_process_names_what_differs(errors, name: str) -> None:
    first, second = (found[name] for found in errors)
    assert first == second
    if not NAMED[name]:
        assert first == ""
        return
    assert first.startswith("the processes differ: ")
    assert NAMED[name] in first
    assert "; expected " in first


@pytest.mark.parametrize(
    ("process_id", "is_served", "found"),
    [
        (1, False, "nothing answers at 127.0.0.1:"),
        (1, True, "process 0 answers at 127.0.0.1:"),
        (0, False, "process 0 answers at 127.0.0.1:"),
        (0, True, "InputError: the processes could not be joined ("),
    ],
    ids=["wrong port", "another is missing", "the others are missing", "port in use"],
)
def test_processes_that_do_not_join_end_with_a_sentence(
    process_id: int, is_served: bool, found: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not is_served:
            server.close()
        program = (
            f"import jaxtrain as jt; jt.parallel.initialize({address!r}, 2, {process_id}, "
            "timeout=0.5)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert found in last
    assert "expected " in last
    assert "stack trace" not in ended.stderr
