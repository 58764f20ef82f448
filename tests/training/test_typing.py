"""The types that type checkers infer for the results of public functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax
import jaxtrain as jt
import numpy as np
import optax
from flax import linen as nn

data = jt.Dataset(np.ones((8, 4), np.float32), np.zeros(8, np.int32))
state = jt.init_state(nn.Dense(3), optax.adam(1e-3), data.inputs, key=jax.random.key(0))
state, metrics = jt.train_step(state, data[:4], jt.losses.cross_entropy)
state, losses = jt.train_epoch(state, data, jt.losses.cross_entropy)
jt.losses.cross_entropy(np.ones((8, 3), np.float32), np.zeros(8, np.int32))
state, history = jt.fit(state, data, loss_fn=jt.losses.cross_entropy, epochs=1)
(loss, aux), grads = jt.gradients(state, data, jt.losses.cross_entropy)
reveal_type(state)
reveal_type(metrics["loss"])
reveal_type(losses)
reveal_type(history["train_loss"])
reveal_type(aux)
reveal_type(len(data))
reveal_type(jt.__version__)
"""

EXPECTED = ("TrainState", "Array", "Array", "ndarray", "Auxiliary", "int", "str")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checker", "options", "shown"),
    [
        ("mypy", ["--strict", "--ignore-missing-imports"], "Revealed type"),
        ("pyright", ["--pythonpath", sys.executable], "Type of"),
    ],
)
def test_a_type_checker_sees_the_types_of_results(
    tmp_path: Path, checker: str, options: list[str], shown: str
) -> None:
    pytest.importorskip(checker)
    (tmp_path / "user.py").write_text(CODE)
    result = subprocess.run(
        [sys.executable, "-m", checker, *options, "user.py"],
        cwd=tmp_path,
        env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},  # no look for a newer version
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    revealed = [line for line in result.stdout.splitlines() if shown in line]
    for line, expected in zip(revealed, EXPECTED, strict=True):
        assert expected in line
        assert 'type is "Any"' not in line
