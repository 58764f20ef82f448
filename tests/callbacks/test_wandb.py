"""Weights & Biases offline: the file of the run has the scalars, histograms and pictures."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import jaxtrain as jt
from jaxtrain.dataset import named_arrays
from tests.callbacks.helpers import STEPS, fit, interrupt_at

wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
BLOCK, HEADER = 32 * 1024, 7


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch) -> None:
    """Keeps the package's caches in the folder of the test, and the network out of reach."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def records(path: Path) -> Iterator[Any]:
    """Yields the records of a run's file: LevelDB's log format after a header of 7 bytes."""
    content, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        at += HEADER
        record += content[at : at + length]
        at += length
        if kind in (1, 4):  # complete, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def finish(log: Any) -> None:
    """Ends the run that a logger has left open, as the end of the process does."""
    log._run.finish()


def history_of(folder: Path, run: str = "offline-run-*") -> dict[int, dict[str, Any]]:
    """Returns what a run has logged, by step."""
    (path,) = folder.glob(f"wandb/{run}/run-*.wandb")
    found = {}
    for record in wait_for_end(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            found[row.pop("_step")] = row
    return found


def wait_for_end(path: Path) -> list[Any]:
    """Returns all records; the package's process may write the last ones after `finish`."""
    deadline = time.monotonic() + 30
    while True:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, "the run has no end"
        time.sleep(0.05)


def test_a_run_has_the_history_and_the_loss_of_every_step(tmp_path: Path, capfd) -> None:
    figure = Figure(figsize=(2, 1))
    log = jt.callbacks.wandb("test", folder=tmp_path, histograms=True, config={"rate": 1})
    log.picture("before", figure)
    state, history = fit([log], epochs=3)
    log.picture("curves", figure)
    finish(log)
    assert capfd.readouterr() == ("", "")
    rows = history_of(tmp_path)
    assert any("before" in name for name in rows.pop(0))
    assert list(rows) == list(range(1, 3 * STEPS + 1))
    assert [row["step_loss"] for row in rows.values()] == history.step_losses.tolist()
    epochs = [row for row in rows.values() if "epoch" in row]
    for name, values in history.items():
        assert [row[name] for row in epochs] == pytest.approx(values.tolist()), name
    assert rows[10]["learning_rate"] == 0.1
    counts = {name: value for name, value in rows[10].items() if name.endswith(".values")}
    sizes = {name.removesuffix(".values"): sum(value) for name, value in counts.items()}
    arrays = named_arrays(state.params, "params")
    assert sizes == {name: array.size for name, array in arrays}
    assert any("curves" in name for name in rows[15])
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/curves_*.png")
    assert picture.stat().st_size > 0


def test_a_run_that_continues_is_the_same_and_another_one_is_new(tmp_path: Path) -> None:
    log = jt.callbacks.wandb("test", folder=tmp_path)
    state, _ = fit([log], 1, metric_fns={"confusion": jt.metrics.confusion_matrix})
    fit([log], 1, state)
    first = log._run
    fit([log], 1)
    assert log._run is not first
    finish(log)
    runs = [history_of(tmp_path, run.name) for run in tmp_path.glob("wandb/offline-run-*")]
    assert sorted(map(len, runs)) == [STEPS, 2 * STEPS]
    assert not any("confusion" in name for run in runs for row in run.values() for name in row)


def test_an_error_finishes_the_run_as_failed(tmp_path: Path) -> None:
    log = jt.callbacks.wandb("test", folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit([log, interrupt_at(2, 3)])
    assert log._run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [r.exit.exit_code for r in wait_for_end(path) if r.HasField("exit")] == [1]


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="types are checked before")
def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match="mode is 'of'; expected one of offline, online"):
        jt.callbacks.wandb("test", mode="of", folder=tmp_path)


def test_a_run_that_cannot_start_is_a_warning(tmp_path: Path) -> None:
    log = jt.callbacks.wandb("test", folder=tmp_path, no_such_option=1)
    with pytest.warns(UserWarning, match=r"the Weights & Biases logger cannot write to .*wandb \("):
        _, history = fit([log])
    assert len(history["epoch"]) == 2
