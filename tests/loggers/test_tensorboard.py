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
from jaxtrain.export import save_params
from jaxtrain.loggers._tensorboard import EVENT_FILES
from jaxtrain.training.events import StepsDone
from tests.loggers.helpers import STEPS, fit

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


def test_scalars_are_the_history_and_the_loss_of_every_step(tmp_path: Path) -> None:
    with jt.loggers.tensorboard(tmp_path) as log:
        _, history = fit(log, epochs=3)
    tags = read(tmp_path).Tags()
    assert set(tags["scalars"]) == {"step_loss", *history}
    assert tags["histograms"] == tags["images"] == []
    losses = scalars(tmp_path, "step_loss")
    assert list(losses) == list(range(1, 3 * STEPS + 1))
    assert np.array_equal(np.float32([*losses.values()]), history.step_losses)
    for name in set(history) - {"learning_rate"}:
        found = scalars(tmp_path, name)
        assert list(found) == [5, 10, 15]
        assert np.array_equal(np.float32([*found.values()]), np.float32(history[name])), name
    rates = scalars(tmp_path, "learning_rate")
    assert {5, 10, 15} <= rates.keys()
    assert set(rates.values()) == {float(np.float32(0.1))}


def test_histograms_are_those_of_every_parameter(tmp_path: Path) -> None:
    import safetensors.numpy

    with jt.loggers.tensorboard(tmp_path / "events", histograms=True) as log:
        state, _ = fit(log)
    save_params(tmp_path / "model", state)
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
    with jt.loggers.tensorboard(tmp_path) as log:
        state, _ = fit(log)
        jt.loggers.combine(print, log).picture("curves", figure)
        log.picture("red", png.getvalue())
        with pytest.raises(jt.InputError, match="picture is a str; expected a matplotlib figure"):
            log.picture("text", "red")
        with pytest.raises(
            jt.InputError, match=r"picture is b'not a PN'\.\.\.; expected a matplot"
        ):
            log.picture("bytes", b"not a PNG file")
        with pytest.raises(jt.InputError, match=r"picture is b'.*PNG.*; expected a matplotlib"):
            log.picture("cut short", png.getvalue()[:20])
        fit(log, 1, state)
    found = read(tmp_path)
    assert found.Tags()["images"] == ["curves", "red"]
    (curves,), (red,) = found.Images("curves"), found.Images("red")
    assert (curves.step, curves.width, curves.height) == (10, 240, 120)
    assert (red.step, red.width, red.height) == (10, 7, 5)
    assert red.encoded_image_string == png.getvalue()
    assert Image.open(io.BytesIO(curves.encoded_image_string)).size == (240, 120)
    assert list(scalars(tmp_path, "step_loss")) == list(range(1, 16))  # it still logs


def test_a_picture_before_the_first_event_keeps_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    with jt.loggers.tensorboard(tmp_path) as log:
        log.picture("first", figure)
        state, _ = fit(log)
    with jt.loggers.tensorboard(tmp_path) as log:  # resumes
        log.picture("second", figure)
        fit(log, 1, state)
    with jt.loggers.tensorboard(tmp_path) as log:  # without a run
        log.picture("third", figure)
    found = read(tmp_path)
    assert list(scalars(tmp_path, "step_loss")) == list(range(1, 3 * STEPS + 1))
    steps = {name: [event.step for event in found.Images(name)] for name in found.Tags()["images"]}
    assert steps == {"first": [0], "second": [10], "third": [0]}


@pytest.mark.parametrize("stop", [(2, 3), (3, 1)])
def test_a_run_that_resumes_continues_without_duplicates(
    tmp_path: Path, stop: tuple[int, int]
) -> None:
    folder = tmp_path / "events"

    def train(stop: tuple[int, int] | None) -> Any:
        def interrupt(event: jt.events.Event) -> None:
            if isinstance(event, StepsDone) and (event.epoch, event.step) == stop:
                raise KeyboardInterrupt

        with jt.loggers.tensorboard(folder) as log:
            callback = jt.loggers.combine(log, jt.events.every_steps(1, interrupt))
            options = jt.CheckpointOptions(tmp_path / "checkpoints", every_steps=2)
            return fit(callback, epochs=4, checkpoint=options)[1]

    with pytest.raises(KeyboardInterrupt):
        train(stop)
    history = train(None)
    assert len(list(folder.glob(EVENT_FILES))) == 2
    losses = scalars(folder, "step_loss")
    assert list(losses) == list(range(1, 4 * STEPS + 1))
    assert np.array_equal(np.float32([*losses.values()]), history.step_losses)
    assert list(scalars(folder, "test_loss")) == [5, 10, 15, 20]


def test_another_run_replaces_the_event_files_of_this_logger_only(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1.host"
    other.write_bytes(b"")
    for epochs in (3, 1):
        with jt.loggers.tensorboard(tmp_path) as log:
            fit(log, epochs)
    assert len(list(tmp_path.glob(EVENT_FILES))) == 1
    assert other.exists()
    assert list(scalars(tmp_path, "train_loss")) == [5]
