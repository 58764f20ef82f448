"""TensorBoard's own reader finds scalars, histograms and pictures at their steps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import jaxtrain as jt
from jaxtrain.callbacks.tensorboard import EVENT_FILES
from tests.callbacks.helpers import STEPS, fit, interrupt_at

pytest.importorskip("tensorboardX")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path) -> Any:
    everything = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    found = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    return found.Reload()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = read(folder).Scalars(tag)
    assert len({event.step for event in events}) == len(events), f"{tag} has duplicates"
    return {event.step: event.value for event in events}


def test_scalars_are_the_history_without_matrices_and_the_loss_of_every_step(
    tmp_path: Path,
) -> None:
    metric_fns = {"accuracy": jt.metrics.accuracy, "confusion": jt.metrics.confusion_matrix}
    metric_fns["recall"] = jt.metrics.recall(None)
    _, history = fit([jt.callbacks.tensorboard(tmp_path)], epochs=3, metric_fns=metric_fns)
    for index, values in enumerate(history["test_recall"].T):
        found = [*scalars(tmp_path, f"test_recall/{index}").values()]
        assert np.array_equal(np.float32(found), values)
    names = {name for name, values in history.items() if values.ndim == 1}
    vectors = {f"{data}_recall" for data in ("train", "test")}
    assert set(history) - names == {"train_confusion", "test_confusion", *vectors}
    elements = {f"{name}/{index}" for name in vectors for index in range(3)}
    tags = read(tmp_path).Tags()
    assert set(tags["scalars"]) == {"step_loss", *names, *elements}
    assert tags["histograms"] == tags["images"] == []
    losses = scalars(tmp_path, "step_loss")
    assert list(losses) == list(range(1, 3 * STEPS + 1))
    assert np.array_equal(np.float32([*losses.values()]), history.step_losses)
    for name in names - {"learning_rate"}:
        found = scalars(tmp_path, name)
        assert list(found) == [5, 10, 15]
        assert np.array_equal(np.float32([*found.values()]), np.float32(history[name])), name
    rates = scalars(tmp_path, "learning_rate")
    assert {5, 10, 15} <= rates.keys()
    assert set(rates.values()) == {float(np.float32(0.1))}


def test_histograms_are_those_of_every_parameter(tmp_path: Path) -> None:
    import safetensors.numpy

    state, _ = fit([jt.callbacks.tensorboard(tmp_path / "events", histograms=True)])
    jt.save(tmp_path / "model", state)
    arrays = safetensors.numpy.load_file(tmp_path / "model")
    found = read(tmp_path / "events")
    assert set(found.Tags()["histograms"]) == set(arrays)
    for name, array in arrays.items():
        first, last = found.Histograms(name)
        assert (first.step, last.step) == (5, 10)
        value, exact = last.histogram_value, array.astype(np.float64)
        assert (value.min, value.max, value.num) == (exact.min(), exact.max(), exact.size)
        assert value.sum == pytest.approx(exact.sum())
        assert value.sum_squares == pytest.approx((exact**2).sum())
        counts, edges = np.histogram(exact, bins=len(value.bucket) - 1)
        assert value.bucket == [0, *counts]
        assert value.bucket_limit == pytest.approx(edges)


def test_pictures_are_at_the_latest_step(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    png = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(png, "png")
    log = jt.callbacks.tensorboard(tmp_path)

    def during(run: jt.Run) -> None:
        log.picture(f"epoch {run.epoch}", figure)

    state, _ = fit([log, during])
    log.picture("curves", figure)
    log.picture("red", png.getvalue())
    with pytest.raises(jt.errors.InputError, match="picture is a str; expected a matplotlib fig"):
        log.picture("text", "red")
    with pytest.raises(jt.errors.InputError, match=r"picture is b'not a PN'\.\.\.; expected a mat"):
        log.picture("bytes", b"not a PNG file")
    with pytest.raises(jt.errors.InputError, match=r"picture is b'.*PNG.*; expected a matplotlib"):
        log.picture("cut short", png.getvalue()[:20])
    fit([log], 1, state)
    found = read(tmp_path)
    assert set(found.Tags()["images"]) == {"curves", "red", "epoch 1", "epoch 2"}
    (curves,), (red,), (first,) = map(found.Images, ("curves", "red", "epoch 1"))
    assert (first.step, first.width, first.height) == (5, 240, 120)
    assert (curves.step, curves.width, curves.height) == (10, 240, 120)
    assert (red.step, red.width, red.height) == (10, 7, 5)
    assert red.encoded_image_string == png.getvalue()
    assert Image.open(io.BytesIO(curves.encoded_image_string)).size == (240, 120)
    assert list(scalars(tmp_path, "step_loss")) == list(range(1, 16))  # it still logs


def test_pictures_before_and_without_a_run_keep_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    log = jt.callbacks.tensorboard(tmp_path)
    log.picture("first", figure)
    log.picture("second", figure)
    state, _ = fit([log])
    log = jt.callbacks.tensorboard(tmp_path)
    log.picture("third", figure)
    fit([log], 1, state)
    jt.callbacks.tensorboard(tmp_path).picture("fourth", figure)
    found = read(tmp_path)
    assert list(scalars(tmp_path, "step_loss")) == list(range(1, 3 * STEPS + 1))
    steps = {name: [event.step for event in found.Images(name)] for name in found.Tags()["images"]}
    assert steps == {name: [0] for name in ("first", "second", "third", "fourth")}


def test_a_run_that_resumes_continues_without_duplicates(tmp_path: Path) -> None:
    folder = tmp_path / "events"

    def train(*interrupt: jt.callbacks.Callback) -> Any:
        checkpoint = jt.callbacks.checkpoint(tmp_path / "checkpoints", every_steps=2)
        return fit([jt.callbacks.tensorboard(folder), *interrupt, checkpoint], epochs=4)[1]

    with pytest.raises(KeyboardInterrupt):
        train(interrupt_at(2, 3))
    history = train()
    assert len(list(folder.glob(EVENT_FILES))) == 2
    losses = scalars(folder, "step_loss")
    assert list(losses) == list(range(1, 4 * STEPS + 1))
    assert np.array_equal(np.float32([*losses.values()]), history.step_losses)
    assert list(scalars(folder, "test_loss")) == [5, 10, 15, 20]


def test_another_run_replaces_the_event_files_of_this_logger_only(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1.host"
    other.write_bytes(b"")
    log = jt.callbacks.tensorboard(tmp_path)
    for logger, epochs in ((log, 3), (jt.callbacks.tensorboard(tmp_path), 2), (log, 1)):
        fit([logger], epochs)
        assert len(list(tmp_path.glob(EVENT_FILES))) == 1
        assert list(scalars(tmp_path, "train_loss")) == [5, 10, 15][:epochs]
    assert other.exists()
