"""Runs counted in steps, and streams whose batches differ in shape."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.training.helpers import Stop, assert_close, assert_identical, assert_same_run, stop_at

LOSS = jt.losses.cross_entropy
KEY = jax.random.key(3)
MODEL = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
RNG = np.random.default_rng(7)
LABELS = np.arange(50, dtype=np.int32) % 3
DATA = jt.Dataset(RNG.normal(size=(50, 6)).astype(np.float32), LABELS)
STATE = jt.init_state(MODEL, jt.optimizers.adam(0.05), DATA.inputs[:1], key=jax.random.key(0))
STREAM = jt.data.stream(DATA, 16, KEY)  # four batches per pass


def fit(data: Any = DATA, state: jt.TrainState = STATE, **options: Any) -> Any:
    shuffle = KEY if isinstance(data, jt.Dataset) else None
    defaults: dict[str, Any] = {"loss_fn": LOSS, "callbacks": [], "key": shuffle, "batch_size": 16}
    return jt.fit(state, data, **{**defaults, **options})


def endless() -> Iterator[jt.Dataset]:
    """The batches of the passes over `STREAM`, without an end."""
    for number in itertools.count(1):
        yield from STREAM.epoch(number)


class Unsized:
    """An iterable that starts again in each pass, and has no length."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Iterator[jt.Dataset]:
        self.number += 1
        yield from STREAM.epoch(self.number)


def endless_grain() -> Any:
    """An endless data set of Grain, which has a position."""
    import grain

    batches = [jax.tree.map(np.asarray, batch) for batch in STREAM.epoch(1)]
    return grain.MapDataset.source(batches).shuffle(seed=1).repeat().to_iter_dataset()


KINDS: dict[str, Callable[[], Any]] = {
    "in memory": lambda: DATA,
    "a stream": lambda: STREAM,
    "an endless generator": endless,
    "an iterable without a length": Unsized,
}


@pytest.fixture(scope="module")
def by_epochs() -> Any:
    return fit(epochs=5)


@pytest.fixture(scope="module")
def by_steps() -> Any:
    return fit(steps=20, evaluate_every=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evaluate_every", [4, 5, 20])
def test_the_steps_are_those_of_the_epochs(by_epochs, kind: str, evaluate_every: int) -> None:
    state, history = fit(KINDS[kind](), steps=20, evaluate_every=evaluate_every)
    assert_identical(state.params, by_epochs[0].params)
    assert_identical(history.step_losses, by_epochs[1].step_losses)
    rows = np.arange(evaluate_every, 21, evaluate_every)
    np.testing.assert_array_equal(history["step"], rows)
    assert state.epoch == len(history["epoch"]) == len(rows)


def test_a_row_has_the_mean_over_its_own_steps_and_an_evaluation(by_steps) -> None:
    """The fourth batch of each pass has two examples."""
    losses = by_steps[1].step_losses
    weights = np.tile([16, 16, 16, 2], 5)
    expected = [np.average(losses[i : i + 5], weights=weights[i : i + 5]) for i in range(0, 20, 5)]
    np.testing.assert_allclose(by_steps[1]["train_loss"], expected, rtol=1e-6)
    state, history = fit(test=DATA, steps=3)
    assert history["test_loss"] == [jt.evaluate(state, DATA, LOSS)["loss"]]
    assert "step" not in fit(epochs=1)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_continue_a_run(by_steps, kind: str) -> None:
    """A generator has lost no batch between them."""
    data = KINDS[kind]()
    if kind == "an iterable without a length":
        pytest.skip("its next pass starts with the call")
    state, _ = fit(data, steps=15, evaluate_every=5)
    state, history = fit(data, state, steps=5)
    assert_identical(state, by_steps[0])
    assert list(history["step"]) == [20]


RESUMABLE = {**KINDS, "an endless data set of Grain": endless_grain}


@pytest.mark.parametrize("kind", RESUMABLE)
@pytest.mark.parametrize("stop", [(2, 3), (3, 1)])
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, kind: str, stop: tuple[int, int]
) -> None:
    make = RESUMABLE[kind]
    has_position = kind in ("in memory", "a stream", "an endless data set of Grain")
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2 if has_position else None)
    straight = fit(make(), steps=20, evaluate_every=5)
    with pytest.raises(Stop):
        fit(make(), steps=20, evaluate_every=5, callbacks=[checkpoint, stop_at(*stop)])
    resumed = fit(make(), steps=20, evaluate_every=5, callbacks=[checkpoint])
    assert_same_run(resumed, straight)


def test_a_checkpoint_of_other_epochs_is_another_run(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path)
    fit(steps=10, evaluate_every=5, callbacks=[checkpoint])
    with pytest.raises(jt.errors.InputError, match="in epochs of 5 steps"):
        fit(steps=20, evaluate_every=10, callbacks=[checkpoint])
    fit(steps=15, evaluate_every=5, callbacks=[checkpoint])  # longer


def test_every_step_is_reported(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    fit(steps=20, evaluate_every=5, callbacks=[jt.callbacks.json_lines(log)])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 21))
    assert [row["step"] for row in rows if row["event"] == "epoch"] == [5, 10, 15, 20]


def test_the_picture_of_a_run_has_its_steps() -> None:
    figure = fit(test=DATA, steps=20, evaluate_every=5)[1].plot()
    (ax,) = figure.axes
    assert ax.get_xlabel() == "step"
    lines = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    np.testing.assert_allclose(lines["test, after epoch"], [5, 10, 15, 20])
    np.testing.assert_allclose(lines["training step"], np.arange(1, 21))


def test_callbacks_count_evaluations() -> None:
    worse = jt.callbacks.early_stopping(2, monitor="train_loss", mode="max")
    _, history = fit(steps=1000, evaluate_every=20, callbacks=[worse])
    assert list(history["step"]) == [20, 40, 60]


def test_gradients_accumulate_across_epochs_and_passes() -> None:
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(0.1), 3)
    state = jt.init_state(MODEL, optimizer, DATA.inputs[:1], key=KEY)
    ends = [fit(DATA, state, steps=10, evaluate_every=every)[0] for every in (2, 10)]
    assert_identical(ends[0].params, ends[1].params)
    batches = itertools.chain(STREAM.epoch(1), STREAM.epoch(2), STREAM.epoch(3))
    for batch in itertools.islice(batches, 10):
        state, _ = jt.train_step(state, batch, LOSS)
    assert_close(ends[0].params, state.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4, "epochs": 2}, "epochs is 2 and steps is 4; expected one of them"),
        (
            {"steps": 10, "evaluate_every": 4},
            "steps is 10 and evaluate_every is 4; expected a multiple of it, such as 8 or 12 steps",
        ),
        ({"steps": 3, "evaluate_every": 4}, "such as 4 steps"),
        ({"evaluate_every": 200}, "evaluate_every is 200 and steps is None; .* steps=1000 for 5"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 4, "evaluate_every": 0}, "evaluate_every is 0"),
        (
            {"train": endless()},
            "train is a generator, which is read once, and there are 5 epochs; .* or steps=",
        ),
        ({"test": endless(), "steps": 4, "evaluate_every": 2}, "test is a generator"),
        ({"train": iter([]), "steps": 4}, "train has no batches in epoch 1"),
        ({"train": iter(list(STREAM)), "steps": 8}, "train has no batches in pass 2"),
    ],
)
def test_lengths_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    data = {"data": options.pop("train")} if "train" in options else {}
    with pytest.raises(jt.errors.InputError, match=message):
        fit(**data, **options)


def test_a_stream_that_may_never_end_is_named() -> None:
    batch = (np.ones((1, 6), np.float32), np.zeros(1, np.int32))
    with pytest.warns(UserWarning, match=r"no len\(\) and has returned 10000 batches .* steps="):
        fit(itertools.repeat(batch, 10_001), epochs=1)


def test_examples_may_be_drawn_with_replacement() -> None:
    """Some of the 50 occur several times; the passes differ, and are the same in each call."""
    data = jt.Dataset(np.arange(50.0, dtype=np.float32)[:, None])
    stream = jt.data.stream(data, 16, KEY, replacement=True)
    passes = [
        np.concatenate([batch.inputs[:, 0] for batch in stream.epoch(number)])
        for number in (1, 2, 1)
    ]
    assert [len(each) for each in passes] == [50, 50, 50]
    assert all(len(np.unique(each)) < 45 for each in passes)
    np.testing.assert_array_equal(passes[0], passes[2])
    assert not np.array_equal(passes[0], passes[1])
    assert "drawn with replacement" in repr(stream)
    with pytest.raises(jt.errors.InputError, match="key is None with replacement=True"):
        jt.data.stream(data, 16, replacement=True)


class MeanOverTime(nn.Module):
    """A network for sequences of any length."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(jnp.mean(jnp.tanh(nn.Dense(4)(x)), axis=1))


def sequences(time: int, examples: int = 4) -> jt.Dataset:
    inputs = RNG.normal(size=(examples, time, 2)).astype(np.float32)
    return jt.Dataset(inputs, np.arange(examples, dtype=np.int32) % 3)


def test_batches_may_have_several_shapes() -> None:
    state = jt.init_state(MeanOverTime(), jt.optimizers.sgd(0.1), np.ones((1, 5, 2)), key=KEY)
    lengths = [(5, 4), (7, 6), (7, 6), (5, 4), (5, 3), (9, 2)]
    batches = [sequences(*each) for each in lengths]
    expected, losses = state, []
    for batch in batches:
        expected, metrics = jt.train_step(expected, batch, LOSS)
        losses.append(metrics["loss"])
    trained, history = fit(batches, state, test=batches, epochs=1)
    np.testing.assert_allclose(history.step_losses, losses, rtol=1e-6)
    assert_close(trained.params, expected.params)
    each = [float(jt.evaluate(trained, batch, LOSS)["loss"]) for batch in batches]
    expected_loss = np.average(each, weights=[len(batch) for batch in batches])
    np.testing.assert_allclose(history["test_loss"], [expected_loss], rtol=1e-6)


def test_shapes_that_a_stream_cannot_have_are_named() -> None:
    state = jt.init_state(MeanOverTime(), jt.optimizers.sgd(0.1), np.ones((1, 5, 2)), key=KEY)
    with pytest.raises(jt.errors.InputError, match=r"batch 9 of train .* at most 8, .* pad the"):
        fit([sequences(time) for time in range(5, 15)], state, epochs=1)
    batches = [DATA[:8], jt.Dataset(np.ones((8, 7), np.float32), LABELS[:8])]
    message = r"the model does not take the inputs of batch 2 of {} .* float32\[1, 7\]"
    with pytest.raises(jt.errors.InputError, match=message.format("train")):
        fit(batches, epochs=1)
    with pytest.raises(jt.errors.InputError, match=message.format("dataset")):
        jt.evaluate(STATE, batches, LOSS)
    with pytest.warns(UserWarning, match="batch 9 of train has 9 examples, the 9th size"):
        fit([DATA[:size] for size in range(1, 10)], epochs=1)
