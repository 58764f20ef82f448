"""Progress on screen: lines without a terminal, and a bar that is updated in Jupyter."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import pytest

import jaxtrain as jt

CELL = """
import jax, jax.numpy as jnp, optax
import jaxtrain as jt
from flax import linen as nn

x = jnp.linspace(-1, 1, 64)[:, None]
data = jt.Dataset(x, 2 * x)
state = jt.init_state(nn.Dense(1), optax.sgd(0.1), x[:1], key=jax.random.key(0))
with jt.progress(log_interval=4) as on_event:
    jt.fit(
        state, data, data, loss_fn=jt.losses.mean_squared_error, epochs=3, batch_size=8,
        on_event=on_event,
    )
"""


def test_jupyter_shows_one_bar_and_lines() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    bars = [output for output in outputs if output.output_type == "display_data"]
    (bar,) = bars  # updated in place
    text = re.sub(r"<[^>]*>", "", bar.data["text/html"])
    assert "training" in text
    assert "24/24 steps" in text
    lines = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert "epoch 1  32/64 (50%)  loss" in lines
    assert re.search(r"^epoch 3:  train loss \d.*  test loss \d", lines, flags=re.MULTILINE)
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]


def test_without_a_terminal_there_are_lines_only(capsys) -> None:
    x = jnp.linspace(-1, 1, 8)[:, None]
    data = jt.Dataset(x, 2 * x)
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(0.1), x[:1], key=jax.random.key(0)
    )
    with jt.progress(log_interval=1, epoch_interval=2) as on_event:
        jt.fit(
            state,
            data,
            loss_fn=jt.losses.mean_squared_error,
            epochs=3,
            batch_size=4,
            on_event=on_event,
        )
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("compiled in ")
    steps = [line for line in lines if "/8 (" in line]
    assert len(steps) == 6
    epochs = [line.split(":")[0] for line in lines if ":" in line]
    assert epochs == ["epoch 2", "epoch 3"]  # every second one, and the last


@pytest.mark.parametrize("name", ["log_interval", "epoch_interval"])
def test_intervals_are_checked(name: str) -> None:
    with (
        pytest.raises(jt.InputError, match=f"{name} is -1; expected an integer of at least"),
        jt.progress(**{name: -1}),
    ):
        pass
