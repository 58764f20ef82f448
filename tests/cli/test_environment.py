"""Scripts in an unusual environment: full disks, closed pipes, odd variables, damaged caches."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from jaxtrain.cli.compilation_cache import remove_damaged_entries

ROOT = Path(__file__).parents[2]


def run_script(
    script: str, *flags: object, environment: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{script}.py", *map(str, flags)],
        env={**os.environ, **(environment or {})},
        text=True,
        timeout=120,
        check=False,
        **options,
    )


# Starts a script that a hangup ends, even if the tests run under nohup, in the terminal on stdin.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def assert_one_sentence(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("flags", [(), ("--help",)], ids=["results", "help"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_stdout_on_a_full_device(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        result = run_script("losses", "--output-dir", tmp_path / "out", *flags, stdout=full)
    assert_one_sentence(result, "the output could not be printed (No space left on device)")
    if not flags:
        assert (tmp_path / "out" / "summary.json").exists()


def test_a_closed_pipe_on_stdout_and_stderr(tmp_path: Path) -> None:
    """As `2>&1 | head -1` does."""
    flags = ("--dataset", "digits", "--log-interval", "1", "--output-dir", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "experiments/mnist.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_a_reader_that_leaves_the_check_of_checkpoints(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    with subprocess.Popen(
        [sys.executable, "-m", "jaxtrain.checkpoint", *files],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = [sys.executable, str(ROOT / "experiments" / "linear_regression.py"), "--epochs", "2"]
    shell = f'cd {gone} && rmdir {gone} && "$@"'
    out = ["--output-dir", str(tmp_path / "out"), "--log-interval", "0"]
    for flags in ([], out, [*out, "--overwrite", "--checkpoint-dir", "c"]):
        result = subprocess.run(
            ["sh", "-c", shell, "sh", *script, *flags],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if flags == out:
            assert result.returncode == 0, result.stderr
        else:
            folder = "(--checkpoint-dir)" if flags else "output folder runs/linear_regression"
            assert_one_sentence(result, folder)
        gone.mkdir(exist_ok=True)


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])
def test_jax_platforms_without_a_device(tmp_path: Path, platform: str) -> None:
    if platform == jax.default_backend() or (platform == "cuda" and jax.default_backend() == "gpu"):
        pytest.skip("there is such a device here")
    environment = {"JAX_PLATFORMS": platform}
    for script in ("losses", "loss_landscape"):
        result = run_script(script, "--output-dir", tmp_path, environment=environment)
        assert_one_sentence(result, f"$JAX_PLATFORMS is '{platform}'", "--device cpu")
    result = run_script("losses", "--device", "gpu", environment=environment)
    assert_one_sentence(result, "--device is gpu")
    flags = ("--device", "cpu", "--output-dir", tmp_path)
    assert run_script("losses", *flags, environment=environment).returncode == 0


def test_matplotlibs_backend_does_not_matter(tmp_path: Path) -> None:
    environment = {"MPLBACKEND": "nonsense"}
    result = run_script("losses", "--output-dir", tmp_path, environment=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "losses.png").exists()
    program = "import os, jaxtrain.cli.plots; print(os.environ['MPLBACKEND'])"
    kept = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout == "nonsense\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_output(tmp_path: Path, stream: str) -> None:
    number = {"stdout": 1, "stderr": 2}[stream]
    command = [sys.executable, "experiments/losses.py", "--output-dir", str(tmp_path)]
    shell = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *command]
    result = subprocess.run(
        shell, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "summary.json").exists()


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii"}
    result = run_script("losses", "--output-dir", tmp_path, environment=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "at 60\\xb0" in result.stdout


def test_closing_the_terminal_of_a_run_with_a_bar(tmp_path: Path) -> None:
    terminal, screen = pty.openpty()
    flags = ["--dataset", "digits", "--epochs", "1000000", "--output-dir", tmp_path / "o"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, "experiments/mnist.py", *flags],
        cwd=ROOT,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )
    os.close(screen)
    shown = b""
    while b"epoch 2:" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert (tmp_path / "o" / "history.csv").exists()


def test_a_closed_terminal_ends_the_run_with_one_line(tmp_path: Path) -> None:
    flags = ["--dataset", "digits", "--epochs", "1000000", "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-c", IN_TERMINAL, "experiments/mnist.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2:"):
                break
        process.send_signal(signal.SIGHUP)
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 128 + signal.SIGHUP
    assert last.startswith("terminal closed; the completed epochs (")


def test_nohup_keeps_a_run_alive(tmp_path: Path) -> None:
    program = (
        "import os, signal; from jaxtrain.cli.command import report_errors\n"
        "with report_errors():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('alive')"
    )
    result = subprocess.run(
        ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "alive\n"


@pytest.mark.parametrize("name", ["history.csv", "losses.png"])
def test_a_folder_in_the_place_of_a_result(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    result = run_script("losses", "--output-dir", tmp_path, "--overwrite")
    assert_one_sentence(result, f"{tmp_path}/{name} could not be")


def test_pipes_in_the_place_of_results_are_replaced(tmp_path: Path) -> None:
    names = ("config.json", "summary.json", "history.csv", "losses.png")
    for name in names:
        os.mkfifo(tmp_path / name)
    result = run_script("losses", "--output-dir", tmp_path, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / name).is_file() for name in names)


@pytest.mark.parametrize(
    "content", ['{"pictures": ["notes.txt", "../b.png", 3]}', "[" * 9999], ids=["names", "nesting"]
)
def test_overwriting_a_tampered_summary_keeps_the_users_files(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text(content)
    (out / "notes.txt").write_text("mine")
    (tmp_path / "b.png").write_text("mine")
    result = run_script("losses", "--output-dir", out, "--overwrite")
    assert (result.returncode, result.stderr) == (0, "")
    assert (out / "notes.txt").read_text() == (tmp_path / "b.png").read_text() == "mine"
    assert json.loads((out / "summary.json").read_text())["experiment"] == "losses"


def test_an_incomplete_cached_program_is_compiled_again_and_replaced(tmp_path: Path) -> None:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = ("--epochs", 5, "--log-interval", 0, "--output-dir", tmp_path / "out", "--overwrite")
    assert run_script("linear_regression", *flags, environment=environment).returncode == 0
    entries = list((tmp_path / "cache").glob("*-cache"))
    assert entries
    complete = {entry.name: entry.stat().st_size for entry in entries}
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    result = run_script("linear_regression", *flags, environment=environment)
    assert (result.returncode, result.stderr) == (0, "")
    sizes = {name: (tmp_path / "cache" / name).stat().st_size for name in complete}
    assert all(sizes[name] > size // 2 for name, size in complete.items())


def test_cache_entries_are_read_once(tmp_path: Path) -> None:
    good, bad, empty, pipe = (
        tmp_path / f"jit_{name}-{'0' * 64}-cache" for name in ("good", "bad", "empty", "pipe")
    )
    good.write_bytes(zlib.compress(b"program"))
    bad.write_bytes(zlib.compress(b"program")[:-3])
    empty.touch()
    (tmp_path / "my-pip-cache").write_bytes(b"not an entry")
    os.mkfifo(pipe)
    remove_damaged_entries(tmp_path)
    left = {good.name, "my-pip-cache", pipe.name, ".verified"}
    assert {path.name for path in tmp_path.iterdir()} == left
    bad.write_bytes(b"damaged")
    os.utime(bad, (1, 1))  # written before the check above: not read again
    remove_damaged_entries(tmp_path)
    assert bad.exists()
    os.utime(bad)
    remove_damaged_entries(tmp_path)
    assert not bad.exists()
