"""Training works without the extras; the error for a missing package names its extra."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
# Makes imports of packages fail as if they were not installed.
HIDE = "import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
EXTRAS = {
    *("sklearn", "tensorflow_datasets", "importlib_resources", "platformdirs", "pooch"),
    *("requests", "tyro", "matplotlib", "tensorboardX", "wandb", "torch"),
}


def run_without(hidden: set[str], program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_training_with_checkpoints_and_progress_needs_no_extra(tmp_path: Path) -> None:
    program = (ROOT / "tests" / "own_model.py").read_text()
    result = run_without(EXTRAS, program, tmp_path)
    assert result.stdout == "True\n", result.stderr
    assert "epoch 3:" in result.stderr


MISSING = {
    "jt.data.load('digits')": "sklearn is not installed; .*'jaxtrain\\[data\\]'",
    "jt.data.load('mnist')": "pooch .*'jaxtrain\\[data\\]'",
    "jt.data.load('tfds:mnist')": "tensorflow_datasets .*'jaxtrain\\[tfds\\]'",
    "jt.callbacks.tensorboard('a')": "tensorboardX .*'jaxtrain\\[tensorboard\\]'",
    "jt.callbacks.wandb('a')": "wandb .*'jaxtrain\\[wandb\\]'",
    "jt.race(None, None, loss_fn=None, optimizer=None)": "torch .*'jaxtrain\\[torch\\]'",
    "import jaxtrain.cli.plots": "matplotlib .*'jaxtrain\\[experiments\\]'",
}


@pytest.mark.slow
def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = f"""
import jaxtrain as jt
for statement in {list(MISSING)}:
    try:
        exec(statement)
    except jt.errors.MissingExtraError as error:
        print(error)
"""
    result = run_without(EXTRAS, program, tmp_path)
    lines = result.stdout.splitlines()
    for line, message in zip(lines, MISSING.values(), strict=True):
        assert re.match(f"the package {message}", line)


@pytest.mark.slow
def test_a_script_without_its_extra_ends_with_one_sentence(tmp_path: Path) -> None:
    program = f"import runpy\nrunpy.run_path({str(ROOT / 'experiments/losses.py')!r}, run_name='x')"
    result = run_without({"tyro"}, program, tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        "error: the package tyro is not installed; install it with "
        "pip install 'jaxtrain[experiments]'\n"
    )


def test_idx_files_need_no_extra(tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 1, 0, 0, 0, 3])
    (tmp_path / "labels").write_bytes(header + bytes([7, 8, 9]))
    program = "import jaxtrain as jt; print(jt.data.read_idx('labels'))"
    result = run_without(EXTRAS, program, tmp_path)
    assert result.stdout == f"{np.array([7, 8, 9])}\n", result.stderr


def test_the_error_is_an_input_error_and_an_import_error() -> None:
    assert issubclass(MissingExtraError, jt.errors.InputError)
    assert issubclass(MissingExtraError, ImportError)
