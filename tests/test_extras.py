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
    *("requests", "tyro", "matplotlib", "tensorboardX", "wandb"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "program", "message"),
    [
        ("sklearn", "jt.data.load('digits')", "sklearn is not installed; .*'jaxtrain\\[data\\]'"),
        ("pooch", "jt.data.load('mnist')", "pooch .*'jaxtrain\\[data\\]'"),
        (
            "tensorflow_datasets",
            "jt.data.load('tfds:mnist')",
            "tensorflow_datasets .*'jaxtrain\\[tfds\\]'",
        ),
        (
            "tensorboardX",
            "jt.callbacks.tensorboard('a')",
            "tensorboardX .*'jaxtrain\\[tensorboard\\]'",
        ),
        ("wandb", "jt.callbacks.wandb('a')", "wandb .*'jaxtrain\\[wandb\\]'"),
        ("matplotlib", "import jaxtrain.cli.plots", "matplotlib .*'jaxtrain\\[experiments\\]'"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch, hidden: str, program: str, message: str
) -> None:
    monkeypatch.delenv("JAXTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run_without({hidden}, f"import jaxtrain as jt\n{program}", tmp_path)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("jaxtrain.errors.MissingExtraError: the package ")
    assert re.search(message, last)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["matplotlib", "platformdirs", "tyro"])
def test_a_script_without_its_extra_ends_with_one_sentence(tmp_path: Path, package: str) -> None:
    program = f"import runpy\nrunpy.run_path({str(ROOT / 'experiments/losses.py')!r}, run_name='x')"
    result = run_without({package}, program, tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: the package {package} is not installed; install it with "
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
