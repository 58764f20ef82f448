"""A signal becomes an exception: once while the process ends, and again where it gets lost."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

BEFORE = """
import os, signal, time
from jaxtrain.command import mistakes_on_one_line
ask = lambda: os.kill(os.getpid(), signal.{name})
with mistakes_on_one_line():
"""
PROGRAMS = {
    "swallowed, as JAX does": """
    try:
        ask()
        time.sleep(1)
    except BaseException:
        pass
    time.sleep(30)
""",
    "swallowed in a callback, as XLA does": """
    class Callback:
        def __del__(self):
            ask()
            time.sleep(0.1)
    Callback()
    time.sleep(30)
""",
    "asked again and again while it cleans up": """
    try:
        ask()
        time.sleep(30)
    finally:
        for _ in range(10):
            ask()
            try:
                raise ValueError
            except ValueError:
                time.sleep(0.1)
        print("cleaned up")
""",
}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("way", PROGRAMS)
def test_a_signal_ends_the_process_with_one_line(name: str, way: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BEFORE.format(name=name) + PROGRAMS[way]],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 128 + signal.Signals[name]
    assert result.stderr == {"SIGINT": "interrupted\n", "SIGTERM": "terminated\n"}[name]
    assert result.stdout == ("cleaned up\n" if "cleans" in way else "")


def test_a_signal_after_the_work_is_done_changes_nothing() -> None:
    program = BEFORE.format(name="SIGINT") + "    print('done')\nask()\nprint('ended')"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\nended\n", "")
