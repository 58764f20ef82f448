"""fit, evaluate and train_epoch on streams: the bits of data in memory, resuming, and faults."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import list_checkpoints
from tests.training.helpers import (
    Stop,
    assert_close,
    assert_identical,
    assert_same_run,
    stop_at,
    without_clock,
)

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}
KEY = jax.random.key(3)
OPTIMIZER = jt.optimizers.sgd(0.1)
MODEL = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)


def make_data(features: int = 6) -> jt.Dataset:
    """50 examples in 3 classes."""
    labels = np.arange(50, dtype=np.int32) % 3
    inputs = 0.3 * np.random.default_rng(7).normal(size=(50, features)).astype(np.float32)
    inputs[np.arange(50), labels] += 1
    return jt.Dataset(inputs, labels)


def in_batches(data: jt.Dataset) -> list[jt.Dataset]:
    """Three batches of 16 examples and one of 2."""
    return [data[start : start + 16] for start in range(0, 50, 16)]


DATA = make_data()
BATCHES = in_batches(DATA)


@functools.cache
def make_state(optimizer: Any = OPTIMIZER, features: int = 6) -> jt.TrainState:
    """A small network with dropout."""
    return jt.init_state(MODEL, optimizer, np.ones((1, features)), key=jax.random.key(0))


class Repeatable:
    """Batches that can be iterated over again and again, and perhaps a length."""

    def __init__(self, batches: Any, length: int | None = None) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("unknown")
        return self.length


class Examples:
    """Random access to examples, of which one may fail when it is read the second time."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.reads, self.total = bad, 0, 0

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        self.total += 1
        if index == self.bad:
            self.reads += 1
            if self.reads > 1:
                raise OSError("the disk is gone")
        return DATA.inputs[index], DATA.targets[index]


class InBatches(Examples):
    """Examples that are read several at a time; iterable, as those of Hugging Face."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def fit(data: Any, state: jt.TrainState | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"loss_fn": LOSS, "epochs": 2, "callbacks": []}
    return jt.fit(state or make_state(), data, **{**defaults, **options})


def fit_in_memory(data: Any = DATA, state: Any = None, **options: Any) -> Any:
    return fit(data, state, **{"batch_size": 16, "key": KEY, **options})


class Recorder(jt.callbacks.Callback):
    """Keeps the runs after blocks of steps, without their arrays."""

    def __init__(self, interval: int = 0) -> None:
        self.interval = interval
        self.start: Any = None
        self.steps: list[jt.Run] = []

    def on_start(self, run: jt.Run) -> None:
        self.start = run

    def next_pause(self, run: jt.Run) -> int | None:
        return (run.step // self.interval + 1) * self.interval if self.interval else None

    def on_steps(self, run: jt.Run) -> None:
        self.steps.append(run.replace(state=None))


@pytest.fixture(scope="module")
def shuffled() -> Any:
    """The run on data in memory, shuffled by a key."""
    return fit_in_memory()


@pytest.fixture(scope="module")
def ordered() -> Any:
    """The run on data in memory in their stored order."""
    return fit_in_memory(key=None)


def torch_examples() -> Any:
    torch = pytest.importorskip("torch")
    return torch.utils.data.TensorDataset(
        torch.tensor(DATA.inputs), torch.tensor(DATA.targets, dtype=torch.int64)
    )


def torch_loader() -> Any:
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(torch_examples(), batch_size=16)


def grain_batches() -> Any:
    import grain

    return grain.MapDataset.source(BATCHES)


def grain_loader(shuffle: bool = False) -> Any:
    import grain

    return grain.DataLoader(
        data_source=list(zip(DATA.inputs, DATA.targets, strict=True)),
        sampler=grain.samplers.IndexSampler(50, shuffle=shuffle, seed=1, num_epochs=1),
        operations=[grain.transforms.Batch(16)],
    )


ORDERED = {
    "datasets": lambda: BATCHES,
    "tuples": lambda: [(batch.inputs, batch.targets) for batch in BATCHES],
    "lists": lambda: [[batch.inputs, batch.targets] for batch in BATCHES],
    "dicts": lambda: [{"targets": each.targets, "inputs": each.inputs} for each in BATCHES],
    "arrays of JAX": lambda: [jax.tree.map(jnp.asarray, batch) for batch in BATCHES],
    "without a length": lambda: Repeatable(BATCHES),
    "a MapDataset of Grain": grain_batches,
    "an IterDataset of Grain": lambda: grain_batches().to_iter_dataset(),
    "a DataLoader of Grain": grain_loader,
    "a DataLoader of PyTorch": torch_loader,
}
SHUFFLED = {
    "examples": Examples,
    "examples in batches": InBatches,
    "a Dataset of PyTorch": torch_examples,
}


@pytest.mark.parametrize("kind", ORDERED)
def test_batches_of_any_kind_give_the_bits_of_data_in_memory(ordered, kind: str) -> None:
    assert_same_run(fit(ORDERED[kind]()), ordered)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_examples_of_any_kind_give_the_bits_of_data_in_memory(shuffled, kind: str) -> None:
    assert_same_run(fit_in_memory(SHUFFLED[kind]()), shuffled)


def test_mapped_files_and_streams_of_them_give_the_bits_of_data_in_memory(
    tmp_path: Path, shuffled
) -> None:
    np.save(tmp_path / "inputs.npy", DATA.inputs)
    mapped = DATA.replace(inputs=np.load(tmp_path / "inputs.npy", mmap_mode="r"))
    assert_same_run(fit_in_memory(mapped), shuffled)
    assert_same_run(fit(jt.data.stream(mapped, 16, KEY)), shuffled)
    copied = mapped.replace(inputs=mapped.inputs.copy())  # which is a memmap without a file
    assert_same_run(fit_in_memory(copied), shuffled)


def clipped() -> Any:
    optimizer = jt.optimizers.clip_gradients(jt.optimizers.adam(0.05), 0.5)
    return jt.optimizers.accumulate_gradients(optimizer, 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_large_batches_that_come_in_several_segments_change_no_parameter(weighted: bool) -> None:
    """A batch has 2 MiB and a segment at most 8; gradients are accumulated across segments."""
    weights = np.arange(50, dtype=np.float32) % 3 / 4 if weighted else None
    data = make_data(features=2**15).replace(weights=weights)
    state, recorder = make_state(clipped(), 2**15), Recorder(2)
    found = fit(jt.data.stream(data, 16, KEY), state, callbacks=[recorder])
    expected = fit_in_memory(data, state)
    if not weighted:
        assert_same_run(found, expected)
    assert_identical(found[0], expected[0])
    # XLA adds up the reported, weighted losses in another order.
    assert_close(found[1].step_losses, expected[1].step_losses)
    assert_close(found[1]["train_loss"], expected[1]["train_loss"])
    assert sum(len(run.losses) for run in recorder.steps) == 2 * 4


def test_a_slow_stream_closes_its_segments_early(ordered) -> None:
    """Training starts before all batches are read, and ends in the same bits."""

    def slow() -> Iterator[jt.Dataset]:
        for batch in BATCHES[:3]:
            yield batch
            time.sleep(0.6)

    recorder = Recorder()
    _, history = fit(Repeatable(slow(), 3), epochs=1, callbacks=[recorder])
    assert recorder.steps[0].step < 3
    assert_identical(history.step_losses, ordered[1].step_losses[:3])


def test_pauses_do_not_change_the_run(shuffled) -> None:
    for interval in (1, 3):
        recorder = Recorder(interval)
        run = fit(jt.data.stream(DATA, 16, KEY), callbacks=[recorder])
        assert_same_run(run, shuffled)
        start = recorder.start
        assert (start.last_epoch, start.steps_per_epoch, start.examples_per_epoch) == (2, 4, 50)
        reached = {(each.epoch, each.step): each.examples for each in recorder.steps}
        for epoch in (0, 1):
            assert {(epoch, step) for step in (*range(interval, 4, interval), 4)} <= set(reached)
        assert all(seen == min(50, 16 * step) for (_, step), seen in reached.items())
        losses = np.concatenate([each.losses for each in recorder.steps])
        assert_identical(losses, run[1].step_losses)


def test_batches_of_other_sizes_are_averaged_over_their_own_examples() -> None:
    batches = [DATA[:16], DATA[16:23], DATA[23:39]]
    recorder, state, losses = Recorder(1), make_state(), []
    found, history = fit(batches, epochs=1, callbacks=[recorder])
    for batch in batches:
        state, metrics = jt.train_step(state, batch, LOSS)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(history.step_losses, losses, rtol=1e-5)
    assert_close(found.params, state.params, rtol=1e-4)
    np.testing.assert_allclose(
        history["train_loss"], [np.average(losses, weights=[16, 7, 16])], rtol=1e-5
    )
    assert (recorder.start.steps_per_epoch, recorder.start.examples_per_epoch) == (3, 0)
    assert [run.examples for run in recorder.steps] == [16, 23, 39]


def test_held_out_data_may_be_streams_and_stop_the_run_early() -> None:
    contrary = DATA.replace(targets=(DATA.targets + 1) % 3)
    options = {"callbacks": [jt.callbacks.early_stopping(2)], "epochs": 20, "test_batch_size": 16}
    expected = fit_in_memory(validation=contrary, **options)
    assert 2 < len(expected[1]["epoch"]) < 20
    found = fit(jt.data.stream(DATA, 16, KEY), validation=in_batches(contrary), **options)
    assert_identical(found[0].params, expected[0].params)
    assert_close(without_clock(found[1]), without_clock(expected[1]))


@pytest.mark.parametrize("weights", [None, np.arange(50, dtype=np.float32) % 4])
def test_evaluate_accepts_streams(weights: Any) -> None:
    state, data = make_state(), DATA.replace(weights=weights)
    expected = jt.evaluate(state, data, LOSS, METRICS, batch_size=16)
    streams = [in_batches(data), iter(in_batches(data)), jt.data.stream(data, 16, KEY)]
    for stream in [*streams, Examples()] if weights is None else streams:
        found = jt.evaluate(state, stream, LOSS, METRICS, batch_size=16)
        assert found.keys() == expected.keys()
        assert_close(found, expected)


@pytest.mark.parametrize("key", [None, KEY])
def test_train_epoch_accepts_streams(key) -> None:
    """A source of examples is shuffled like data in memory."""
    expected, losses = jt.train_epoch(make_state(), DATA, LOSS, batch_size=16, key=key)
    streams = [BATCHES, iter(BATCHES), jt.data.stream(DATA, 16)] if key is None else []
    for stream in [*streams, Examples()]:
        trained, found = jt.train_epoch(make_state(), stream, LOSS, batch_size=16, key=key)
        assert_identical(found, losses)
        assert_identical(trained.params, expected.params)
        assert (trained.epoch, trained.step) == (1, 4)


def add_noise(example: Any, rng: np.random.Generator) -> Any:
    return example[0] + rng.normal(size=6).astype(np.float32), example[1]


SAFEGUARDED = jt.optimizers.skip_nonfinite(OPTIMIZER)
RESUMABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformed, with a safeguard": (
        lambda: jt.data.stream(DATA, 16, KEY, transform=add_noise),
        {"optimizer": SAFEGUARDED},
    ),
    "an IterDataset of Grain": (lambda: grain_batches().shuffle(seed=1).to_iter_dataset(), {}),
    "a DataLoader of Grain": (lambda: grain_loader(shuffle=True), {}),
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_run_resumes_within_an_epoch_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    make, options = RESUMABLE[kind]
    options = dict(options)
    state = make_state(options.pop("optimizer", OPTIMIZER))
    straight = fit(make(), state, **options)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop) as raised:
        fit(make(), state, callbacks=[checkpoint, stop_at(2, 3)], **options)
    error: Any = raised.value
    assert error.state.epoch == 1
    assert list(error.history["epoch"]) == [1]
    assert list_checkpoints(tmp_path)[-1] == (1, 2)
    assert (tmp_path / "epoch-1-step-2.safetensors").exists()
    recorder = Recorder()
    resumed = fit(make(), state, callbacks=[checkpoint, recorder], **options)
    assert_same_run(resumed, straight)
    start = recorder.start
    assert (start.resumed, start.epoch, start.step) == (True, 1, 2)
    assert list_checkpoints(tmp_path)[-1] == (2, 0)


def test_a_resumed_run_reads_and_reports_only_the_rest_of_an_epoch(tmp_path: Path) -> None:
    source, recorder = Examples(), Recorder(1)
    stream = jt.data.stream(source, 16, KEY)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop):
        fit(stream, callbacks=[checkpoint, stop_at(2, 3)])
    source.total = 0
    fit(stream, callbacks=[checkpoint, recorder])
    assert source.total == 16 + 18  # The first batch shows the shapes.
    steps = [(run.epoch, run.step, run.examples) for run in recorder.steps]
    assert steps == [(1, 3, 48), (1, 4, 50)]


def test_a_continued_run_resumes_within_its_first_epoch(tmp_path: Path) -> None:
    """It starts from the state of another run, so the history begins with the second epoch."""
    stream = jt.data.stream(DATA, 16, KEY)
    state, _ = fit(stream, epochs=1)
    straight = fit(stream, state)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop):
        fit(stream, state, callbacks=[checkpoint, stop_at(2, 3)])
    assert list_checkpoints(tmp_path) == [(1, 2)]
    assert_same_run(fit(stream, state, callbacks=[checkpoint]), straight)


def test_a_run_interrupted_many_times_ends_in_the_same_bits(tmp_path: Path, shuffled) -> None:
    """The steps of an epoch come from several calls, and segments differ."""
    data = jt.data.stream(DATA, 16, KEY)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=1, keep=2)
    for epoch, step in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 3)):
        with pytest.raises(Stop):
            fit(data, callbacks=[checkpoint, stop_at(epoch, step)])
    # The newest checkpoint of a complete epoch is kept.
    assert list_checkpoints(tmp_path) == [(1, 0), (1, 1), (1, 2)]
    assert_same_run(fit(data, callbacks=[checkpoint]), shuffled)


def test_a_run_resumes_after_the_last_step_of_an_epoch(tmp_path: Path, ordered) -> None:
    """Without a length, the last step is known only when the epoch ends."""
    make = ORDERED["an IterDataset of Grain"]
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=4)

    def stop(run: jt.Run) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(make(), callbacks=[checkpoint, stop])
    assert_same_run(fit(make(), callbacks=[checkpoint]), ordered)


@pytest.mark.parametrize("kind", ["datasets", "a DataLoader of PyTorch"])
def test_a_stream_without_a_position_resumes_at_the_start_of_an_epoch(
    tmp_path: Path, ordered, kind: str
) -> None:
    data, checkpoint = ORDERED[kind](), jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.warns(UserWarning, match="position") as warned, pytest.raises(Stop):
        fit(data, callbacks=[checkpoint, stop_at(2, 3)])
    assert len(warned) == 1
    assert list_checkpoints(tmp_path) == [(1, 0)]
    with pytest.warns(UserWarning, match="position") as warned:
        assert_same_run(fit(data, callbacks=[checkpoint]), ordered)
    assert len(warned) == 1


def test_another_stream_is_another_run(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path)
    fit(jt.data.stream(DATA, 16, KEY), epochs=1, callbacks=[checkpoint])
    noisy = jt.data.stream(DATA, 16, KEY, transform=add_noise)
    for other in (jt.data.stream(DATA, 16), jt.data.stream(DATA[:49], 16, KEY), DATA, noisy):
        message = "transformed by add_noise" if other is noisy else r"train data was Stream\(50"
        with pytest.raises(jt.errors.InputError, match=rf"another run:.*{message}"):
            fit(other, batch_size=16, callbacks=[checkpoint])


class Scaled(Examples):
    """Examples times a factor, which another class or another object has otherwise."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def __repr__(self) -> str:
        return "Scaled"

    def __getitem__(self, index: int) -> Any:
        inputs, label = super().__getitem__(index)
        return self.factor * inputs, label


class ScaledTwice(Scaled):
    def __getitem__(self, index: int) -> Any:
        inputs, label = super().__getitem__(index)
        return inputs + inputs, label


class Locked(Examples):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def grain_examples(seed: int = 1, factor: float = 1.0) -> Any:
    import grain

    def scale(factor: float, index: int) -> Any:
        return factor * DATA.inputs[index], DATA.targets[index]

    examples = grain.MapDataset.range(50).seed(seed).shuffle()
    return examples.map(functools.partial(scale, factor)).batch(16).to_iter_dataset()


CHANGES: dict[str, tuple[Any, Any]] = {
    "a seed of Grain": (grain_examples, lambda: grain_examples(seed=2)),
    "a bound argument": (grain_examples, lambda: grain_examples(factor=2.0)),
    "an iterator": (lambda: iter(grain_examples()), lambda: iter(grain_examples(seed=2))),
    "a field": (Scaled, lambda: Scaled(2.0)),
    "a method": (lambda: Scaled(), lambda: ScaledTwice()),
    "values": (
        lambda: jt.data.stream(DATA, 16),
        lambda: jt.data.stream(DATA.replace(inputs=DATA.inputs + 1), 16),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_way_to_read_resumes_with_a_warning(tmp_path: Path, case: str) -> None:
    make, make_other = CHANGES[case]
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=1)
    options: Any = {"epochs": 1, "batch_size": 16}
    with pytest.raises(Stop):
        fit(make(), callbacks=[checkpoint, stop_at(1, 2)], **options)
    with pytest.raises(Stop):
        fit(make(), callbacks=[checkpoint, stop_at(1, 2)], **options)
    with pytest.warns(UserWarning, match=r"what reads train was \w+ \w+ and is now \w+ ") as warned:
        fit(make_other(), callbacks=[checkpoint], **options)
    assert len(warned) == 1


def test_a_source_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="train reads from an object with lock, which cannot be"):
        fit(Locked(), epochs=1, batch_size=16, callbacks=[checkpoint])


class ByWorkers:
    """Batches whose positions belong to a number of workers, as those of Grain do."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __iter__(self) -> Iterator[Any]:
        workers = self.workers

        class Batches:
            at = 0

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> Any:
                if self.at == len(BATCHES):
                    raise StopIteration
                self.at += 1
                return BATCHES[self.at - 1]

            def get_state(self) -> Any:
                return {f"worker {workers - 1}": self.at}

            def set_state(self, state: Any) -> None:
                self.at = state[f"worker {workers - 1}"]

        return Batches()


def test_a_position_for_other_workers_offers_the_start_of_the_epoch(
    tmp_path: Path, ordered
) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop):
        fit(ByWorkers(2), callbacks=[checkpoint, stop_at(2, 3)])
    message = (
        r"a position in epoch 2 that train does not take \(KeyError: 'worker 2'\); "
        "expected an iterator with the same .* workers: or delete the checkpoint to resume"
    )
    with (
        pytest.warns(UserWarning, match="what reads train was"),
        pytest.raises(jt.errors.InputError, match=message),
    ):
        fit(ByWorkers(3), callbacks=[checkpoint])
    (tmp_path / "epoch-1-step-2.safetensors").unlink()
    with pytest.warns(UserWarning, match="what reads train was"):
        assert_same_run(fit(ByWorkers(3), callbacks=[checkpoint]), ordered)


def test_a_mesh_of_eight_devices_gives_the_numbers_of_one(shuffled) -> None:
    """Eight does not divide the last batch of two examples."""
    mesh = jax.make_mesh((8,), ("data",))
    stream = jt.data.stream(DATA, 16, KEY)
    state, history = fit(stream, mesh=mesh, validation=stream)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.params))
    assert_close(state.params, shuffled[0].params, rtol=1e-5)
    np.testing.assert_allclose(history.step_losses, shuffled[1].step_losses, rtol=1e-5)
    final = jt.evaluate(shuffled[0], DATA, LOSS)["loss"]
    np.testing.assert_allclose(history["validation_loss"][-1], final, rtol=1e-5)
    with pytest.raises(jt.errors.InputError, match="batch_size is 12 on 8 devices"):
        fit(jt.data.stream(DATA, 12), mesh=mesh)


def test_the_reader_is_at_most_three_segments_ahead() -> None:
    """A batch has 2 MiB and a segment at most 8, so that three batches are a segment."""
    batch, read, ahead = make_data(features=2**15)[:16], 0, []

    def batches() -> Iterator[jt.Dataset]:
        nonlocal read
        for _ in range(24):
            read += 1
            yield batch

    def look(run: jt.Run) -> None:
        if run.step in (3, 12):
            time.sleep(0.3)  # The training is blocked; the reader is not.
        ahead.append(read - run.step)

    callbacks = [jt.callbacks.every_steps(3, look)]
    state = make_state(features=2**15)
    fit(Repeatable(batches()), state, epochs=1, callbacks=callbacks)
    assert read == 24
    # One is in use, one waits, one is filled; and one batch more is read to find the end.
    assert 3 <= max(ahead) <= 3 * 3 + 1, ahead


def test_many_epochs_leave_no_threads_and_no_open_files() -> None:
    streams = [BATCHES, jt.data.stream(DATA, 16, KEY), grain_batches().to_iter_dataset()]

    def resources() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    for stream in streams:
        fit(stream, epochs=1, test=stream)
    before = resources()
    for stream in streams:
        fit(stream, epochs=12, test=stream)
    deadline = time.monotonic() + 10
    while any(np.greater(resources(), before)) and time.monotonic() < deadline:
        time.sleep(0.05)  # threads that are ending
    assert not any(np.greater(resources(), before))


def run_program(folder: Path, program: str) -> Any:
    """Runs a program that ends within two minutes."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    return subprocess.run(
        [sys.executable, path.name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Faults. Each is one clear sentence, and what was completed is kept.


def changed(**fields: Any) -> list[Any]:
    """Batches of which the third differs."""
    return [*BATCHES[:2], BATCHES[2].replace(**fields), BATCHES[3]]


BAD = {
    "shape": (
        changed(inputs=DATA.inputs[:16, :5]),
        r"the model does not take the inputs of batch 3 of train .* float32\[1, 5\] per example",
    ),
    "dtype": (
        changed(inputs=DATA.inputs[:16].astype(np.float64)),
        r"batch 3 of train is Dataset\(inputs=float64\[16,6\].*; expected at least one "
        r"example, and the dtypes and numbers of axes of the first batch, Dataset\(inputs=float32",
    ),
    "empty": ([*BATCHES[:2], DATA[:0]], "batch 3 of train is .*; expected at least one example"),
    "an array": (
        [*BATCHES[:2], DATA.inputs[:16]],
        r"^batch 3 of train is a ndarray; expected \(inputs, targets\), .* a dict with these",
    ),
    "text": ([*BATCHES[:2], "ab"], "^batch 3 of train is a str; expected"),
    "other names": (
        [*BATCHES[:2], {"inputs": DATA.inputs[:16], "targets": DATA.targets[:16], "id": 1}],
        "^batch 3 of train is a dict of inputs, targets, id; expected",
    ),
    "too few": (Repeatable(BATCHES, 10), "train ended after 4 batches in epoch 1; expected 10"),
    "too many": (
        Repeatable(BATCHES, 3),
        "train has more than 3 batches in epoch 1; expected 3, its len",
    ),
    "a label": (
        changed(targets=np.full(16, 7, np.int32)),
        "train.* label 7; expected labels from 0 to 2, since the model has 3 outputs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_named(case: str) -> None:
    batches, message = BAD[case]
    with pytest.raises(jt.errors.InputError, match=message) as raised:
        fit(batches)
    error: Any = raised.value
    assert "\n" not in str(error)
    assert error.state.epoch == 0
    assert len(error.history["epoch"]) == 0


def weighted(*weights: float) -> list[Any]:
    """Batches of which the first examples have these weights, and the others 1 or 0."""
    others = [1.0] if any(weights) else [0.0]
    return [
        each.replace(weights=np.array([weight, *others * (len(each) - 1)], np.float32))
        for each, weight in zip(BATCHES, weights, strict=True)
    ]


def test_weights_are_checked_in_streams_and_in_memory_in_training_and_evaluation() -> None:
    message = r"weights (ranges from (-1.0 to 1.0|nan)|holds nan|is 0 (everywhere|in all batches))"
    for weights in ((1, 1, -1, 1), (1, 1, np.nan, 1), (0, 0, 0, 0)):
        stream = weighted(*weights)
        in_memory = jax.tree.map(lambda *leaves: np.concatenate(leaves), *stream)
        for data in (stream, in_memory):
            for call in (
                lambda data: fit(data, epochs=1),
                lambda data: fit(data, epochs=None, steps=8, evaluate_every=4),
                lambda data: fit(BATCHES, test=data, epochs=1),
                lambda data: jt.train_epoch(make_state(), data, LOSS),
                lambda data: jt.evaluate(make_state(), data, LOSS),
            ):
                with pytest.raises(jt.errors.InputError, match=message):
                    call(data)
    padding = [weighted(1, 1, 1, 1)[0], weighted(0, 0, 0, 0)[0]]  # changes nothing
    losses = jt.train_epoch(make_state(), padding, LOSS)[1]
    assert losses[0] > 0 == losses[1]


def test_what_conversions_would_change_is_named() -> None:
    """The mask of an array, and integers that need more than 32 bits."""
    masked = np.ma.masked_array(DATA.inputs, DATA.inputs > 1)
    for data in ((masked, DATA.targets), [(masked, DATA.targets)], [*BATCHES[:1], (masked, 0)]):
        with pytest.raises(jt.errors.InputError, match="inputs is a masked array; expected one wi"):
            fit(data)
    large = [DATA.replace(targets=DATA.targets + np.array([0, 2**32])[i]) for i in (0, 1)]
    message = r"batch 2 of dataset.targets holds 4294967296 at \[0\]; expected integers that int32"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.train_epoch(make_state(), large, LOSS)


class Miscounted(InBatches):
    """Examples that are read several at a time, one too many or one too few."""

    def __init__(self, change: int) -> None:
        super().__init__()
        self.change = change

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return super().__getitems__((indices + indices[:1])[: len(indices) + self.change])


class Resized(Examples):
    """Examples whose number changes."""

    length = 50

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("change", [-16, -1, 1])
def test_another_number_of_examples_than_asked_for_is_refused(change: int) -> None:
    message = rf"Miscounted returned {16 + change} examples for 16 indices; expected one for each"
    with pytest.raises(jt.errors.InputError, match=message):
        fit(Miscounted(change), batch_size=16)
    source = Resized()

    def resize(run: jt.Run) -> None:
        source.length += change

    message = f"has {50 + change} examples, and had 50 when the stream was made; expected a source"
    with pytest.raises(jt.errors.InputError, match=message) as raised:
        fit(source, batch_size=16, callbacks=[resize])
    assert raised.value.state.epoch == 1


class Unprintable(Exception):
    """An error of which nothing can be read, and that takes no attributes."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__traceback__":
            raise RuntimeError("no attributes")


def test_errors_that_cannot_be_printed_are_passed_on(tmp_path: Path) -> None:
    def failing(found: Any) -> None:
        raise Unprintable

    def batches() -> Iterator[Any]:
        yield BATCHES[0]
        raise Unprintable

    callbacks = [jt.callbacks.csv(tmp_path / "log.csv"), jt.callbacks.checkpoint(tmp_path / "run")]
    with pytest.raises(Unprintable):
        fit(BATCHES, callbacks=[failing, *callbacks])
    assert list_checkpoints(tmp_path / "run") == []
    with pytest.raises(jt.errors.StreamError, match=r"raised Unprintable at .* \(Unprintable"):
        fit(batches(), epochs=1)


def test_a_bad_first_batch_is_named_before_anything_compiles() -> None:
    for batches in ([DATA.inputs], [(DATA.inputs, DATA.targets[:3])], [(["a"], [1])]):
        with pytest.raises(jt.errors.InputError, match="batch 1 of train"):
            fit(batches)
    with pytest.raises(jt.errors.InputError, match="does not take the inputs of train"):
        fit([DATA.replace(inputs=DATA.inputs[:, :5])])


def test_a_label_out_of_range_in_held_out_batches_is_named() -> None:
    bad = BAD["a label"][0]
    with pytest.raises(jt.errors.InputError, match=r"validation.* label 7; expected labels from 0"):
        fit(BATCHES, validation=bad)
    with pytest.raises(
        jt.errors.InputError, match=r"dataset.* label 7; expected labels from 0 to 2"
    ):
        jt.evaluate(make_state(), bad, LOSS)


@pytest.mark.parametrize("where", ["inputs", "targets", "test"])
def test_nan_in_a_batch_names_the_array_and_the_row(where: str) -> None:
    state = jt.init_state(
        jt.models.LinearRegression(), OPTIMIZER, DATA.inputs[:1], key=jax.random.key(0)
    )
    good = [jt.Dataset(batch.inputs, batch.inputs[:, :1]) for batch in BATCHES]
    field = "targets" if where == "targets" else "inputs"
    values = getattr(good[2], field).copy()
    values[5, 0] = np.nan
    bad = [*good[:2], good[2].replace(**{field: values}), good[3]]
    options: Any = {"test": bad} if where == "test" else {}
    part = "test" if where == "test" else "train"
    message = rf"became nan .*batch 3 of {part}\.{field} holds nan at \[5, 0\]; expected finite"
    with pytest.raises(jt.errors.NonFiniteError, match=message):
        jt.fit(
            *(state, good if where == "test" else bad),
            **options,
            loss_fn=jt.losses.mean_squared_error,
            callbacks=[],
        )


def test_nan_in_a_later_batch_names_the_epoch_and_the_step() -> None:
    """In the third batch of the second epoch."""
    epochs = iter([BATCHES, changed(inputs=np.full((16, 6), np.nan, np.float32))])

    class Changing:
        def __iter__(self) -> Iterator[Any]:
            return iter(next(epochs))

    message = "training loss became nan in epoch 2, step 3"
    with pytest.raises(jt.errors.NonFiniteError, match=message) as raised:
        fit(Changing())
    error = raised.value
    assert (error.epoch, error.step, error.state.epoch) == (2, 3, 1)
    assert list(error.history["epoch"]) == [1]


def test_an_iterator_is_empty_in_the_second_epoch() -> None:
    message = r"no batches in epoch 2; .* not a generator"
    with pytest.raises(jt.errors.InputError, match=message) as raised:
        fit(iter(BATCHES))
    error: Any = raised.value
    assert error.state.epoch == 1
    assert list(error.history["epoch"]) == [1]
    fit(iter(BATCHES), epochs=1)


@pytest.mark.parametrize("empty", [[], Repeatable([]), iter([])])
def test_a_stream_without_batches_is_named(empty: Any) -> None:
    with pytest.raises(jt.errors.InputError, match="train has no batches in epoch 1"):
        fit(empty)
    with pytest.raises(jt.errors.InputError, match="dataset has no batches in epoch 1"):
        jt.evaluate(make_state(), empty, LOSS)


def test_a_stream_that_repeats_for_ever_is_refused() -> None:
    message = r"never ends; expected one epoch .* its repeat\(\)"
    with pytest.raises(jt.errors.InputError, match=message):
        fit(grain_batches().repeat(), callbacks=[stop_at(1, 1)])


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_a_stream_that_never_ends_stops_with_the_callback() -> None:
    def endless() -> Iterator[jt.Dataset]:
        while True:
            yield BATCHES[0]

    with pytest.raises(Stop) as raised:
        fit(Repeatable(endless()), callbacks=[stop_at(1, 200)])
    error: Any = raised.value
    assert error.state.epoch == 0
    assert not readers()


def test_a_stream_that_hangs_does_not_delay_the_end() -> None:
    """The call returns while the reader still waits for the stream."""
    batch, release = make_data(features=2**15)[:16], threading.Event()

    def hanging() -> Iterator[jt.Dataset]:
        for _ in range(4):  # those of a segment, and one more
            yield batch
        release.wait(600)

    try:
        with pytest.raises(Stop):
            fit(Repeatable(hanging()), make_state(features=2**15), callbacks=[stop_at(1, 1)])
        assert readers()
    finally:
        release.set()
        for thread in readers():
            thread.join(60)


def test_an_error_of_the_source_names_the_example_and_keeps_the_epochs(tmp_path: Path) -> None:
    """In the second epoch."""
    message = r"^example 45 of .* \(OSError: the disk is gon"
    with pytest.raises(jt.errors.InputError, match=message) as raised:
        fit(Examples(bad=45), batch_size=16, callbacks=[jt.callbacks.checkpoint(tmp_path)])
    error: Any = raised.value
    assert "\n" not in str(error)
    assert list_checkpoints(tmp_path) == [(1, 0)]
    assert error.state.epoch == 1
    assert list(error.history["epoch"]) == [1]


def test_an_error_of_an_iterable_names_the_batch() -> None:
    class Failing:
        def __iter__(self) -> Iterator[jt.Dataset]:
            yield from BATCHES[:2]
            raise ValueError("no more\nlines")

    message = r"^train raised ValueError at batch 3 of ep"
    with pytest.raises(jt.errors.StreamError, match=message) as raised:
        fit(Failing())
    error = raised.value
    assert (error.name, error.epoch, error.batch) == ("train", 1, 3)
    assert "(no more); fix the stream" in str(error)
    assert "\n" not in str(error)
    assert error.state.epoch == 0
    message = r"^validation raised ValueError at batch 3"
    with pytest.raises(jt.errors.StreamError, match=message):
        fit(BATCHES, validation=Failing())
    with pytest.raises(jt.errors.StreamError, match=r"^train raised .* at batch 3 of pass 1 \("):
        fit(Failing(), epochs=None, steps=8, evaluate_every=1)
    with pytest.raises(jt.errors.StreamError, match=r"^dataset raised ValueError at batch 3"):
        jt.evaluate(make_state(), Failing(), LOSS)


def test_options_that_streams_do_not_take_are_refused() -> None:
    for stream in (BATCHES, jt.data.stream(DATA, 16), grain_batches(), iter(BATCHES)):
        message = r"key is given, but train is a .*; expected ke"
        with pytest.raises(jt.errors.InputError, match=message):
            fit(stream, key=KEY)
    with pytest.raises(jt.errors.InputError, match=r"batch_size is 16 .* line search \(L-BFGS\)"):
        fit(BATCHES, make_state(jt.optimizers.lbfgs()))


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
def test_train_needs_data_in_memory() -> None:
    for stream in (BATCHES, jt.data.stream(DATA, 16)):
        message = r"train is a stream; expected a jaxtrain.Dataset"
        with pytest.raises(jt.errors.InputError, match=message):
            jt.train(make_state(), stream, loss_fn=LOSS)


def test_numbers_in_64_bits_are_converted_without_a_warning(ordered) -> None:
    """Also in the unused part of a segment, whose memory may hold any values."""
    for _ in range(99):
        np.full((8, 16, 6), 1e300)
    wide = [(batch.inputs.astype(np.float64), batch.targets.astype(np.int64)) for batch in BATCHES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_run(fit(wide), ordered)


def test_a_stream_may_fill_the_same_arrays_again(ordered) -> None:
    class Buffered:
        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            inputs, targets = np.empty((16, 6), np.float32), np.empty(16, np.int32)
            for batch in BATCHES:
                inputs[: len(batch)], targets[: len(batch)] = batch.inputs, batch.targets
                yield inputs[: len(batch)], targets[: len(batch)]

    assert_same_run(fit(Buffered()), ordered)
    found = [jt.evaluate(make_state(), each, LOSS)["loss"] for each in (Buffered(), BATCHES)]
    assert found[0] == found[1]


WORKERS = """
import os, signal
import numpy as np


class Examples:
    def __len__(self):
        return 2000

    def __getitem__(self, index):
        if index == 1000 and os.path.exists("second epoch"):
            os.kill(os.getpid(), signal.SIGKILL)
        return np.ones(6, np.float32), np.int64(index % 3)


if __name__ == "__main__":
    import jax
    import jaxtrain as jt

    state = jt.init_state(
        jt.models.FeedForward(features=(3,)), jt.optimizers.sgd(0.1), np.ones((1, 6), np.float32),
        key=jax.random.key(0),
    )

    def mark(run):
        open("second epoch", "w").close()

    stream = jt.data.stream(Examples(), 16, workers=1)
    try:
        jt.fit(state, stream, loss_fn=jt.losses.cross_entropy, epochs=2, callbacks=[mark])
    except Exception as error:
        print(type(error).__name__, int(error.state.epoch), error, sep="|")
"""


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_an_error(tmp_path: Path) -> None:
    """In the second epoch, so that the state and the history are those of the first."""
    result = run_program(tmp_path, WORKERS)
    [line] = [line for line in result.stdout.splitlines() if "|" in line] or [result.stderr]
    message = "Worker process was terminated unexpectedly with exit code"
    assert re.match(rf"StreamError\|1\|.*{message}", line), line
    assert result.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Dataset", "Source"])
def test_a_mapped_file_is_not_loaded_and_may_be_cut_while_it_is_read(
    tmp_path: Path, kind: str
) -> None:
    """In a process of its own, which reading past the end of the file would kill."""
    program = """
    import os
    from pathlib import Path
    import numpy as np, jax, jaxtrain as jt

    class Source:
        def __init__(self, rows):
            self.inner = {"rows": rows}

        def __len__(self):
            return len(self.inner["rows"])

        def __getitem__(self, index):
            return self.inner["rows"][index], np.zeros(1, np.float32)

    def fit(examples, callback):
        rows = np.memmap("inputs.bin", np.float32, "r", shape=(examples, 2**14))
        data = jt.Dataset(rows, np.zeros((examples, 1), np.float32))
        data = Source(rows) if KIND == "Source" and examples > 16 else data
        state = jt.init_state(
            jt.models.LinearRegression(), jt.optimizers.sgd(1e-4), rows[:1], key=jax.random.key(0)
        )
        jt.fit(
            state, data, loss_fn=jt.losses.mean_squared_error, batch_size=8, callbacks=[callback]
        )

    def peak():
        # Not `getrusage`, whose maximum includes that of the parent before `exec`.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    def stop(run):
        print(peak() - before)
        raise KeyboardInterrupt

    open("inputs.bin", "wb").truncate(2**31)
    before = peak()
    try:
        fit(2**15, jt.callbacks.every_steps(1200, stop))
    except KeyboardInterrupt:
        pass
    np.ones((16, 2**14), np.float32).tofile("inputs.bin")
    try:
        fit(16, lambda run: os.truncate("inputs.bin", 9000))
    except jt.errors.InputError as error:
        print(int(error.state.epoch), len(error.history["epoch"]), error)
    """
    result = run_program(tmp_path, f"KIND = {kind!r}\n" + textwrap.dedent(program))
    growth, _, message = result.stdout.partition("\n")
    assert 10 < float(growth) < 500, "MiB, of a file of 2048"
    assert message.startswith("1 1 the file "), result.stderr
    assert f"has 9000 bytes, and had {2**20} when it was opened" in message
