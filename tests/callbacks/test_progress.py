"""progress: lines without a terminal, a bar in one, and a bar and a table in Jupyter."""

from __future__ import annotations

import io
import re
import sys

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import pytest

import jaxtrain as jt
from jaxtrain.callbacks.progress import default_callbacks, epoch_line

LOSS = jt.losses.mean_squared_error
METRICS = {"accuracy": jt.metrics.accuracy}
CELL = """
import jax, jax.numpy as jnp, optax
import jaxtrain as jt
from flax import linen as nn

x = jnp.linspace(-1, 1, 64)[:, None]
data = jt.Dataset(x, 2 * x)
state = jt.init_state(nn.Dense(1), optax.sgd(0.1), x[:1], key=jax.random.key(0))
result = jt.fit(state, data, data, loss_fn=jt.losses.mean_squared_error, epochs=3, batch_size=8)
"""
SWEEP = """
result = jt.sweep(lambda slope: {"loss": slope}, {"slope": [1, 2, 3]})
"""


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def line_data() -> jt.Dataset:
    x = jnp.linspace(-1, 1, 8)[:, None]
    return jt.Dataset(x, 2 * x)


@pytest.fixture
def line_state(line_data: jt.Dataset) -> jt.TrainState:
    model, optimizer = jt.models.LinearRegression(), jt.optimizers.sgd(0.1)
    return jt.init_state(model, optimizer, line_data.inputs[:1], key=jax.random.key(0))


@pytest.mark.slow
def test_jupyter_shows_one_bar_and_one_table() -> None:
    cells = [nbformat.v4.new_code_cell(cell) for cell in (CELL, SWEEP)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs  # updated in place
    bar, table = output.data["text/html"].split("<table>")
    assert '<progress value="24" max="24">' in bar
    assert "epoch 3/3 · 24/24 steps" in bar
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")[:-1]]
    assert rows[0][:3] == ["epoch", "train loss", "test loss"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3"]
    assert "epoch 3/3" in output.data["text/plain"]
    (output,) = notebook.cells[1].outputs
    assert "training · 3/3 runs" in output.data["text/html"]
    assert "3/3 runs  one at a time" in output.data["text/html"]


def test_without_a_terminal_there_are_lines_only(capsys, line_state, line_data) -> None:
    progress = jt.callbacks.progress(log_interval=1, epoch_interval=2)
    options = {"loss_fn": LOSS, "epochs": 3, "batch_size": 4, "callbacks": [progress]}
    jt.fit(line_state, line_data, **options)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("compiled in ")
    steps = [line for line in lines if "/8 (" in line]
    assert len(steps) == 6
    assert re.fullmatch(r"epoch 1  4/8 \(50%\)  loss \d.*", steps[0])
    epochs = [line.split(":")[0] for line in lines if ":" in line]
    assert epochs == ["epoch 2", "epoch 3"]  # every second one, and the last


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_terminal_shows_a_bar_without_being_asked(monkeypatch, line_state, line_data) -> None:
    options = {"loss_fn": LOSS, "epochs": 3, "batch_size": 4}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    jt.fit(line_state, line_data, **options)
    shown = sys.stderr.getvalue()
    assert "epoch 3/3" in shown
    assert "6/6 steps" in re.sub("\x1b.*?m", "", shown)
    assert "epoch 3: train loss" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is visible again
    monkeypatch.setattr("sys.stderr", Terminal())
    jt.fit(line_state, line_data, callbacks=[], **options)
    assert sys.stderr.getvalue() == ""


def test_nothing_is_shown_elsewhere(capsys, monkeypatch, line_state, line_data) -> None:
    jt.fit(line_state, line_data, loss_fn=LOSS, epochs=1, batch_size=4)
    silent = jt.callbacks.progress(log_interval=0)
    jt.fit(line_state, line_data, loss_fn=LOSS, epochs=1, batch_size=4, callbacks=[silent])
    jt.sweep(lambda slope: {"loss": slope}, {"slope": [1, 2]}, callbacks=[silent])
    assert capsys.readouterr() == ("", "")
    for stream in (None, io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        assert default_callbacks() == []


def test_the_last_epoch_is_shown_wherever_the_run_ends(capsys, line_state, line_data) -> None:
    callbacks = [jt.callbacks.progress(epoch_interval=10), lambda run: run.epoch == 2]
    jt.fit(line_state, line_data, loss_fn=LOSS, batch_size=4, callbacks=callbacks)
    assert re.findall(r"^epoch (\d+):", capsys.readouterr().err, flags=re.MULTILINE) == ["2"]


def test_a_bar_ends_with_an_error(capsys, line_state, line_data) -> None:
    def fail(run) -> None:
        raise RuntimeError("the callback's own")

    callbacks = [jt.callbacks.progress(), fail]
    for _ in range(2):  # the same callback may be used again
        with pytest.raises(RuntimeError, match="own"):
            jt.fit(line_state, line_data, loss_fn=LOSS, batch_size=4, callbacks=callbacks)
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("epoch 1: train loss")


def test_a_resumed_run_says_where_it_resumes(capsys, tmp_path, line_state, line_data) -> None:
    def options(epochs: int) -> dict:
        checkpoint = jt.callbacks.checkpoint(tmp_path)
        callbacks = [jt.callbacks.progress(), checkpoint]
        return {"loss_fn": LOSS, "epochs": epochs, "batch_size": 4, "callbacks": callbacks}

    jt.fit(line_state, line_data, **options(2))
    assert "resuming" not in capsys.readouterr().err
    jt.fit(line_state, line_data, **options(3))
    lines = capsys.readouterr().err.splitlines()
    assert "resuming after epoch 2, from its checkpoint" in lines
    assert lines[-1].startswith("epoch 3: ")
    jt.fit(line_state, line_data, **options(3))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["already finished, after epoch 3: nothing left to train"]


def test_a_line_has_all_columns_and_the_monitored_one_first(
    capsys, small_state, small_classes
) -> None:
    metrics = {"accuracy": jt.metrics.accuracy, "f1": jt.metrics.f1("macro")}
    metrics |= {"recall": jt.metrics.recall(None), "confusion": jt.metrics.confusion_matrix}
    stopping = jt.callbacks.early_stopping(3, "test_f1")
    callbacks = [jt.callbacks.progress(), stopping]
    options = {"loss_fn": jt.losses.cross_entropy, "epochs": 1, "callbacks": callbacks}
    jt.fit(small_state, small_classes, small_classes, metric_fns=metrics, **options)
    n, array = r"\d\S*", rf"recall {NUMBER}…{NUMBER}  confusion \[3, 3\]"
    assert re.search(
        rf"^epoch 1: test f1 {n}  train loss {n}  accuracy {n}%  f1 {n}  {array}  "
        rf"test loss {n}  accuracy \d+/50 \({n}%\)  {array}  learning rate {n}  {n} s$",
        capsys.readouterr().err,
        flags=re.MULTILINE,
    )


NUMBER = r"\d[\d.]*"
ROW = {
    **{"epoch": 3, "train_loss": 0.25, "train_accuracy": 0.5, "test_loss": 0.5},
    **{"test_accuracy": 0.75, "learning_rate": 0.1, "skipped_steps": 0, "seconds": 1.0},
}


@pytest.mark.parametrize(
    ("monitor", "width", "line"),
    [
        (
            None,
            None,
            "epoch 3: train loss 0.2500  accuracy 50.00%  test loss 0.5000  accuracy 3/4 (75.00%)  "
            "learning rate 0.1000  1.0 s",
        ),
        (
            "test_accuracy",
            100,
            "epoch 3: test accuracy 75.00%  train loss 0.2500  accuracy 50.00%  test loss 0.5000  "
            "+1 more  1.0 s",
        ),
        (
            None,
            80,
            "epoch 3: train loss 0.2500  test loss 0.5000  accuracy 75.00%  +2 more  1.0 s",
        ),
        ("test_accuracy", 50, "epoch 3: test accuracy 75.00%  +4 more  1.0 s"),
    ],
)
def test_a_line_fits_the_width_and_says_how_many_columns_it_leaves_out(
    monitor, width, line: str
) -> None:
    assert epoch_line(ROW, 4, monitor, width) == line


def test_a_sweep_shows_lines(capsys, tmp_path) -> None:
    def sweep(slopes: list[int]) -> list[str]:
        jt.sweep(
            lambda slope: {"loss": slope},
            {"slope": slopes},
            at_once=2,
            checkpoint=tmp_path,
            callbacks=[jt.callbacks.progress()],
        )
        return capsys.readouterr().err.splitlines()

    lines = sweep([1, 2, 3, 4])
    assert re.fullmatch(r"2/4 runs  2 at once, .* s per run, compiled in .* s", lines[0])
    assert lines[-1].startswith("4/4 runs  2 at once, ")
    assert sweep([1, 2, 3, 4]) == ["4/4 runs restored from the checkpoint folder"]


@pytest.mark.parametrize("name", ["log_interval", "epoch_interval"])
def test_intervals_are_checked(name: str) -> None:
    with pytest.raises(jt.errors.InputError, match=f"{name} is -1; expected an integer of at"):
        jt.callbacks.progress(**{name: -1})
