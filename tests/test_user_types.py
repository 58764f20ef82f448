"""mypy and pyright check a user's program against the installed package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# The first line makes a package without py.typed an error in pyright, as it is in mypy.
PROGRAM = """# pyright: reportMissingTypeStubs=true
from pathlib import Path
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jaxtrain as jt


class Network(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Dense(self.features)(inputs))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))


def cubic_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(predictions - targets) ** 3, axis=-1)


def within(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(predictions - targets) < 0.1, axis=-1)


class Report(jt.callbacks.Callback):
    def on_epoch(self, run: jt.Run) -> bool:
        loss: float = run.rows[-1]["train_loss"]
        print(run.epoch, loss)
        return loss < 1e-6


def shown(run: jt.Run) -> None:
    print(run.history["test_loss"])


def own_step(state: jt.TrainState, batch: jt.Dataset) -> tuple[jt.TrainState, dict[str, jax.Array]]:
    (loss, aux), grads = jt.gradients(state, batch, cubic_error)
    return jt.apply_gradients(state, grads, model_state=aux.model_state), {"loss": loss}


inputs = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
key = jax.random.key(0)
train, test = jt.Dataset(inputs, 2 * inputs).split(0.25, key)
state = jt.init_state(Network(), jt.optimizers.adam(1e-2), train.inputs[:1], key=key)

state, metrics = jt.train_step(state, train[:8], cubic_error)
state, losses = jt.train_epoch(state, train, cubic_error, batch_size=8, key=key)
assert_type(state, jt.TrainState)
assert_type(metrics["loss"], jax.Array)
assert_type(losses, jax.Array)
assert_type(jt.losses.cross_entropy(np.ones((8, 3)), np.zeros(8, np.int32)), jax.Array)
assert_type(len(train), int)
assert_type(jt.__version__, str)
(loss, aux), grads = jt.gradients(state, train[:8], cubic_error)
state = jt.apply_gradients(state, grads, model_state=aux.model_state)

state, history = jt.fit(
    state,
    train,
    [test[:8], test[8:]],
    validation=test,
    loss_fn=cubic_error,
    metric_fns={"within": within, "r2": jt.metrics.r2},
    epochs=2,
    batch_size=8,
    key=key,
    callbacks=[
        jt.callbacks.early_stopping(3),
        jt.callbacks.checkpoint(Path("checkpoints")),
        jt.callbacks.progress(),
        Report(),
        shown,
    ],
)
state, history = jt.fit(state, train, loss_fn=cubic_error, epochs=1)
state, history = jt.fit(state, (inputs, inputs), step_fn=own_step, epochs=1, callbacks=[])
last: float = float(history["train_loss"][-1])
evaluated: dict[str, jax.Array] = jt.evaluate(state, test, cubic_error, {"within": within})
predictions = jt.predict(state, test.inputs)


def run(learning_rate: float, seed: int) -> tuple[jt.TrainState, dict[str, jax.Array]]:
    optimizer = jt.optimizers.sgd(learning_rate, momentum=0.9)
    state = jt.init_state(Network(), optimizer, train.inputs[:1], key=jax.random.key(seed))
    return jt.train(state, train, test, loss_fn=cubic_error, epochs=2, batch_size=8)


result = jt.sweep(run, {"learning_rate": [1e-3, 1e-2], "seed": range(2)})
print(result["test_loss"].shape, result.table(over="seed"))
best: jt.sweeps.SweepRun = result.best("test_loss")
jt.save("model.safetensors", state)
state = jt.load("model.safetensors", state)
"""

# Each line with a comment is one mistake.
WRONG = """
import jax
import numpy as np
from flax import linen as nn

import jaxtrain as jt

data = jt.Dataset(np.ones((8, 4), np.float32), np.zeros(8, np.int32))
state = jt.init_state(nn.Dense(3), jt.optimizers.sgd(0.1), data.inputs, key=jax.random.key(0))
jt.fit(state, data, loss_fn=jt.losses.cross_entropy, batch_size="64")  # not a number
jt.fit(state, data, loss_fn=jt.losses.cross_entropy, epoch=1)  # another name
jt.fit(state, data, loss_fn=jt.losses.cross_entropy, callbacks=[lambda: None])  # takes no run
jt.train_step(data, state, jt.losses.cross_entropy)  # swapped
jt.init_state(nn.Dense(3), jt.optimizers.sgd(0.1), data.inputs)  # no key
jt.losses.crossentropy  # misspelled
"""

MISTAKES = [number for number, line in enumerate(WRONG.splitlines(), 1) if "  # " in line]


def run(*command: str, folder: Path) -> str:
    """Returns what a type checker prints; it exits with status 1 at an error."""
    pytest.importorskip(command[0], reason=f"needs {command[0]}")
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def mypy(folder: Path, *files: str) -> list[tuple[str, int]]:
    """Returns the errors of `mypy --strict`, without a configuration file."""
    found = run("mypy", "--strict", "--config-file=", "--output=json", *files, folder=folder)
    errors = [json.loads(line) for line in found.splitlines() if line]
    return [(each["file"], each["line"]) for each in errors if each["severity"] == "error"]


def pyright(folder: Path, *files: str) -> list[tuple[str, int]]:
    """Returns the errors of pyright, which would look online for updates if it wrote text."""
    command = ("pyright", "--pythonpath", sys.executable, "--outputjson", *files)
    found = json.loads(run(*command, folder=folder))["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    return [(Path(each["file"]).name, each["range"]["start"]["line"] + 1) for each in errors]


def test_the_program_runs(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("check", [mypy, pyright])
def test_the_program_has_no_errors_and_every_mistake_is_one(
    check: Callable[..., list[tuple[str, int]]], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    found = check(tmp_path, "program.py", "wrong.py")
    assert sorted(set(found)) == [("wrong.py", line) for line in MISTAKES]
