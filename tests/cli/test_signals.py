"""Signals become exceptions: once while the process ends, and again if one was lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEFORE = """
import os, signal, time
from jaxtrain.cli.command import report_errors
send = lambda: os.kill(os.getpid(), signal.{name})
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
with report_errors():
"""
PROGRAMS = {
    "swallowed, as JAX does": """
    try:
        send()
        time.sleep(1)
    except BaseException:
        pass
    time.sleep(30)
""",
    "swallowed in a callback, as XLA does": """
    class Callback:
        def __del__(self):
            send()
            time.sleep(0.1)
    Callback()
    time.sleep(30)
""",
    "sent repeatedly while it cleans up": """
    try:
        send()
        time.sleep(30)
    finally:
        for _ in range(10):
            send()
            try:
                raise ValueError
            except ValueError:
                time.sleep(0.1)
        print("cleaned up")
""",
}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("case", PROGRAMS)
def test_a_signal_ends_the_process_with_one_line(name: str, case: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BEFORE.format(name=name) + PROGRAMS[case]],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 128 + signal.Signals[name]
    words = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
    assert result.stderr == f"{words[name]}\n"
    assert result.stdout == ("cleaned up\n" if "cleans" in case else "")


def test_a_signal_after_the_work_is_done_is_ignored() -> None:
    program = BEFORE.format(name="SIGINT") + "    print('done')\nsend()\nprint('ended')"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\nended\n", "")


@pytest.mark.parametrize("script", ["linear_regression", "losses"])
def test_ctrl_c_during_the_first_seconds_never_ends_with_status_0(
    script: str, tmp_path: Path
) -> None:
    """While Python imports JAX, matplotlib and the flags' library, which swallow exceptions."""
    command = [sys.executable, f"experiments/{script}.py"]
    for moment in range(12):
        folder = tmp_path / str(moment)
        process = subprocess.Popen(
            [*command, "--output-dir", str(folder), "--no-compilation-cache"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.25 * (moment + 1))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            assert (folder / "summary.json").exists()
        else:
            # In the first milliseconds Python itself is not ready: it says so in a traceback.
            assert process.returncode in (130, -signal.SIGINT), err


def test_an_import_that_swallows_ctrl_c_does_not_lose_it(tmp_path: Path) -> None:
    """As a weak reference's callback of the import system does."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(
        "import os, signal, sys, time\n"
        "class Callback:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.1)\n"
        "Callback()\n"
        "print('swallowed')\n"
        "os._exit(0)\n"
    )
    result = subprocess.run(
        [sys.executable, "experiments/losses.py", "--output-dir", tmp_path / "out"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "")
