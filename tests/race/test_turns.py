"""Turns of processes: what is left out and why, and what a process is told and answers."""

from __future__ import annotations

import functools
import os
import threading
from importlib.util import find_spec

import numpy as np
import pytest

from jaxtrain.errors import InputError
from jaxtrain.race.measuring import measure
from jaxtrain.race.processes import ProcessError, call
from jaxtrain.race.turns import take_turns

ENDS = {"loss": (0.3, 0.05)}
# The extra torch has it.
needs_cloudpickle = pytest.mark.skipif(not find_spec("cloudpickle"), reason="needs cloudpickle")


def turns(actions: dict, rounds: int, log=lambda text: None) -> list:
    options = {"references": ("reference",), "tolerances": ENDS, "log": log}
    return take_turns(actions, dict.fromkeys(actions, rounds), **options)


def test_one_that_computes_something_else_or_fails_is_left_out() -> None:
    calls = []

    def reading(name: str, loss: float | None, _: int) -> dict:
        calls.append(name)
        if loss is None:
            raise ProcessError("MemoryError")
        return {"case": {"seconds": 1.0, "loss": loss}}

    losses = {"reference": 0.2, "close": 0.21, "far": 0.9, "failing": None}
    actions = {name: functools.partial(reading, name, loss) for name, loss in losses.items()}
    lines: list[str] = []
    *_, (found, failed) = turns(actions, 2, lines.append)
    assert calls == ["reference", "close", "far", "failing", "reference", "close"]
    assert {name: len(each) for name, each in found["case"].items()} == {"reference": 2, "close": 2}
    assert failed == {
        "failing": "MemoryError",
        "far": "ends case with the loss 0.9; expected about 0.2, as the reference",
    }
    assert len([line for line in lines if "left out" in line]) == 2


@pytest.mark.parametrize("ends", [[0.2, 0.2, 0.9], [0.9, 0.2, 0.2]])
def test_the_loss_of_every_section_is_compared(ends: list[float]) -> None:
    actions = {
        "reference": lambda _: {"case": {"loss": [0.2, 0.2, 0.2]}},
        "other": lambda _: {"case": {"loss": ends}},
    }
    ((_, failed),) = turns(actions, 1)
    assert list(failed) == ["other"]


def test_a_loss_that_is_not_finite_has_a_remedy() -> None:
    ((_, failed),) = turns({"reference": lambda _: {"case": {"loss": [1.0, np.nan]}}}, 1)
    assert "use a smaller learning rate" in failed["reference"]


class Slope:
    """A trainer that should make five updates in a pass."""

    def __init__(self, updates: int) -> None:
        self.per_pass, self.made = updates, 0

    def train(self, passes: int) -> np.ndarray:
        self.made += passes * self.per_pass
        return np.ones(5)

    def losses(self) -> np.ndarray:
        return self.train(1)

    def updates(self) -> int:
        return self.made


@pytest.mark.parametrize(("updates", "is_wrong"), [(5, False), (15, True), (4, True)])
def test_updates_are_counted(updates: int, is_wrong: bool) -> None:
    values = measure(lambda: Slope(updates), steps=5, passes=2)  # 1 pass, and 3 sections of 2
    ((_, failed),) = turns({"reference": lambda _: {"case": values}}, 1)
    expected = f"has made {updates * 7} updates in case; expected 35"
    assert failed == ({"reference": expected} if is_wrong else {})


def test_ctrl_c_returns_the_readings_of_the_incomplete_round() -> None:
    def interrupt(_: int) -> dict:
        raise KeyboardInterrupt

    actions = {"reference": lambda _: {"case": {"seconds": 1.0}}, "other": interrupt}
    found = turns(actions, 5)
    assert next(found) == ({"case": {"reference": [{"seconds": 1.0}]}}, {})
    with pytest.raises(KeyboardInterrupt):
        next(found)


@needs_cloudpickle
@pytest.mark.parametrize("reuse_memory", [False, True])
def test_a_process_reuses_memory_if_told(reuse_memory: bool) -> None:
    found = call(lambda: "MALLOC_ARENA_MAX" in os.environ, reuse_memory=reuse_memory)
    assert found == reuse_memory


@needs_cloudpickle
def test_a_process_takes_what_no_module_defines() -> None:
    offset = 3

    class Local:
        def add(self, value: int) -> int:
            return value + offset

    assert call(lambda value: Local().add(value), 4) == 7


def refuse() -> None:
    raise InputError("x is 3; expected 4")


def end(code: int) -> None:
    os.write(2, b"a warning\nlast words\n")
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


@needs_cloudpickle
@pytest.mark.parametrize(
    ("function", "arguments", "kind", "message"),
    [
        (refuse, (), InputError, "x is 3; expected 4"),
        (lambda: 1 / 0, (), ProcessError, "ZeroDivisionError: division by zero"),
        (end, (3,), ProcessError, "the process ended with exit code 3: last words"),
        (end, (-9,), ProcessError, r"the process ended by signal 9 \(Killed\): last words"),
        (print, (threading.Lock(),), InputError, "cannot be sent to another process .*lock"),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_sentence(
    function, arguments: tuple, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(function, *arguments)
