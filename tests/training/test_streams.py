"""fit, evaluate and train_epoch on streams: the bits of data in memory, resuming, and faults."""

from __future__ import annotations

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
from jaxtrain.checkpoint._store import list_checkpoints
from jaxtrain.training import sources

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}
KEY = jax.random.key(3)
OPTIMIZER = jt.optimizers.sgd(0.1)
MODEL = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)


def make_data() -> jt.Dataset:
    """50 examples of 6 features in 3 classes."""
    labels = np.arange(50, dtype=np.int32) % 3
    noise = np.random.default_rng(7).normal(size=(50, 6))
    return jt.Dataset((np.eye(6)[labels] + 0.3 * noise).astype(np.float32), labels)


def make_state(optimizer: Any = OPTIMIZER) -> jt.TrainState:
    """A small network with dropout."""
    return jt.init_state(MODEL, optimizer, DATA.inputs[:1], key=jax.random.key(0))


DATA = make_data()
BATCHES = [DATA[start : start + 16] for start in range(0, 50, 16)]


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

    def __init__(self, count: int = 50, bad: int | None = None) -> None:
        self.count, self.bad, self.reads, self.total = count, bad, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.total += 1
        if index == self.bad:
            self.reads += 1
            if self.reads > 1:
                raise OSError("the disk is gone")
        return DATA.inputs[index % 50], DATA.targets[index % 50]


class InBatches(Examples):
    """Examples that are read several at a time; iterable, as those of Hugging Face."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class Stop(Exception):
    """Ends a run."""


def fit(data: Any, state: jt.TrainState | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"loss_fn": LOSS, "epochs": 3, "callbacks": []}
    return jt.fit(state or make_state(), data, **{**defaults, **options})


def fit_in_memory(data: jt.Dataset = DATA, state: Any = None, **options: Any) -> Any:
    return fit(data, state, **{"batch_size": 16, "key": KEY, **options})


def assert_identical(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def assert_same_run(ours: Any, theirs: Any) -> None:
    """Asserts that states and histories have the same bits."""
    (state, history), (other_state, other_history) = ours, theirs
    for name in ("params", "model_state", "opt_state", "step", "epoch"):
        assert_identical(getattr(state, name), getattr(other_state, name))
    one, other = ({k: v for k, v in h.items() if k != "seconds"} for h in (history, other_history))
    assert_identical(history.step_losses, other_history.step_losses)
    assert_identical(one, other)


def stop_at(epoch: int, step: int, error: type[BaseException] = Stop) -> Any:
    """A callback that ends the run at a step."""

    def stop(run: jt.Run) -> None:
        if (run.epoch + 1, run.step) >= (epoch, step):
            raise error

    return jt.callbacks.every_steps(1, stop)


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


def set_capacity(monkeypatch: Any, steps: int) -> None:
    """Limits the number of batches of a segment."""
    monkeypatch.setattr(sources, "_SEGMENT_STEPS", steps)


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


def test_data_sets_of_tfds_give_the_bits_of_data_in_memory(tmp_path: Path) -> None:
    from tests.test_tfds import prepare

    prepare(tmp_path)
    source = jt.data.open_tfds("little", data_dir=tmp_path, keys=("row", "label"))
    examples = [(row[:1], label % 3) for row, label in source]
    data = jt.Dataset(*(np.stack(column) for column in zip(*examples, strict=True)))
    state = jt.init_state(jt.models.FeedForward(features=(3,)), OPTIMIZER, data.inputs[:1], key=KEY)
    stream = jt.data.stream(source, 5, KEY, transform=lambda each, _: (each[0][:1], each[1] % 3))
    options = {"state": state, "epochs": 2}
    assert_same_run(fit(stream, **options), fit_in_memory(data, batch_size=5, **options))


def test_two_epochs_and_then_three_equal_five() -> None:
    stream = jt.data.stream(DATA, 16, KEY)
    straight, history = fit(stream, epochs=5)
    state, first = fit(stream, epochs=2)
    state, second = fit(stream, state, epochs=3)
    assert_identical(state.params, straight.params)
    for name in history.keys() - {"seconds"}:
        assert_identical(history[name], np.concatenate([first[name], second[name]]))


def clipped() -> Any:
    optimizer = jt.optimizers.clip_gradients(jt.optimizers.adam(0.05), 0.5)
    return jt.optimizers.accumulate_gradients(optimizer, 3)


CASES = {
    "plain": (OPTIMIZER, None),
    "accumulated and clipped": (clipped(), None),
    "weighted": (OPTIMIZER, np.random.default_rng(1).random(50).astype(np.float32)),
    "accumulated, weighted": (clipped(), np.arange(50, dtype=np.float32) % 3 / 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_batches_per_segment_changes_no_parameter(monkeypatch, case: str) -> None:
    """With batches of 8, the last segment and the last batch are partial."""
    optimizer, weights = CASES[case]
    data, state = DATA.replace(weights=weights), make_state(optimizer)
    expected = fit_in_memory(data, state, batch_size=8)
    for size in (1, 3, 8):
        set_capacity(monkeypatch, size)
        recorder = Recorder()
        found = fit(jt.data.stream(data, 8, KEY), state, callbacks=[recorder])
        if weights is None:
            assert_same_run(found, expected)
        else:  # XLA adds up the reported, weighted losses in another order
            assert_identical(found[0].params, expected[0].params)
            assert_identical(found[0].opt_state, expected[0].opt_state)
            assert_close(found[1].step_losses, expected[1].step_losses)
            assert_close(found[1]["train_loss"], expected[1]["train_loss"])
        assert sum(len(run.losses) for run in recorder.steps) == 3 * 7


def test_a_slow_stream_closes_its_segments_early(monkeypatch, ordered) -> None:
    monkeypatch.setattr(sources, "_SEGMENT_SECONDS", -1.0)
    source = sources.Streamed(BATCHES, "train", 16, None, 1)
    found = [(segment.start, segment.steps, segment.last) for segment in source.segments(1)]
    assert found == [(0, 1, -1), (1, 1, -1), (2, 1, -1), (3, 1, 0)]
    assert_same_run(fit(BATCHES), ordered)


def test_pauses_do_not_change_the_run(monkeypatch, shuffled) -> None:
    set_capacity(monkeypatch, 8)
    for interval in (1, 3):
        recorder = Recorder(interval)
        run = fit(jt.data.stream(DATA, 16, KEY), callbacks=[recorder])
        assert_same_run(run, shuffled)
        start = recorder.start
        assert (start.last_epoch, start.steps_per_epoch, start.examples_per_epoch) == (3, 4, 50)
        reached = {(each.epoch, each.step): each.examples for each in recorder.steps}
        for epoch in (0, 1, 2):
            assert {(epoch, step) for step in {1: [1, 2, 3, 4], 3: [3, 4]}[interval]} <= set(
                reached
            )
        assert all(seen == min(50, 16 * step) for (_, step), seen in reached.items())
        losses = np.concatenate([each.losses for each in recorder.steps])
        assert_identical(losses, run[1].step_losses)


def test_batches_of_other_sizes_are_averaged_over_their_own_examples() -> None:
    sizes = [16, 16, 7, 16, 1, 16]
    rng = np.random.default_rng(0)
    rows = [rng.integers(50, size=size) for size in sizes]
    batches = [jax.tree.map(lambda leaf, r=each: leaf[r], DATA) for each in rows]
    recorder = Recorder(1)
    state, history = fit(batches, epochs=2, callbacks=[recorder])
    expected, losses = make_state(), []
    for _ in range(2):
        for batch in batches:
            expected, metrics = jt.train_step(expected, batch, LOSS)
            losses.append(metrics["loss"])
    np.testing.assert_allclose(history.step_losses, losses, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        state.params,
        expected.params,
    )
    mean = np.average(history.step_losses.reshape(2, 6), axis=1, weights=sizes)
    np.testing.assert_allclose(history["train_loss"], mean, rtol=1e-6)
    assert (recorder.start.steps_per_epoch, recorder.start.examples_per_epoch) == (6, 0)
    assert [run.examples for run in recorder.steps] == 2 * np.cumsum(sizes).tolist()


def test_held_out_data_may_be_streams_and_stop_the_run_early() -> None:
    contrary = DATA.replace(targets=(DATA.targets + 1) % 3)
    callbacks = [jt.callbacks.early_stopping(3)]
    options = {"metric_fns": METRICS, "callbacks": callbacks, "epochs": 30}
    expected = fit_in_memory(DATA, validation=contrary, **options)
    assert 3 < len(expected[1]["epoch"]) < 30
    train = jt.data.stream(DATA, 16, KEY)
    assert_same_run(fit(train, validation=contrary, **options), expected)
    held_out = Repeatable([contrary[start : start + 16] for start in range(0, 50, 16)])
    state, history = fit(train, validation=held_out, **options)
    assert_identical(state.params, expected[0].params)
    for name in expected[1].keys() - {"seconds"}:
        np.testing.assert_allclose(history[name], expected[1][name], rtol=1e-6)


@pytest.mark.parametrize("weights", [None, np.arange(50, dtype=np.float32) % 4])
def test_evaluate_accepts_streams(weights: Any) -> None:
    state, data = make_state(), DATA.replace(weights=weights)
    expected = jt.evaluate(state, data, LOSS, METRICS, batch_size=16)
    batches = [data[start : start + 16] for start in range(0, 50, 16)]
    for stream in (batches, iter(batches), jt.data.stream(data, 16, KEY)):
        found = jt.evaluate(state, stream, LOSS, METRICS)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-6)


def test_evaluate_reads_examples_of_the_source_in_batches() -> None:
    expected = jt.evaluate(make_state(), DATA, LOSS, batch_size=16)["loss"]
    found = jt.evaluate(make_state(), Examples(), LOSS, batch_size=16)["loss"]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_train_epoch_accepts_streams() -> None:
    state = make_state()
    expected, losses = jt.train_epoch(state, DATA, LOSS, batch_size=16)
    for stream in (BATCHES, iter(BATCHES), Examples(), jt.data.stream(DATA, 16)):
        trained, found = jt.train_epoch(state, stream, LOSS, batch_size=16)
        assert_identical(found, losses)
        assert_identical(trained.params, expected.params)
        assert (trained.epoch, trained.step) == (1, 4)


def test_train_epoch_shuffles_a_source_like_data_in_memory() -> None:
    expected, losses = jt.train_epoch(make_state(), DATA, LOSS, batch_size=16, key=KEY)
    trained, found = jt.train_epoch(make_state(), Examples(), LOSS, batch_size=16, key=KEY)
    assert_identical(found, losses)
    assert_identical(trained.params, expected.params)


def add_noise(example: Any, rng: np.random.Generator) -> Any:
    return example[0] + rng.normal(size=6).astype(np.float32), example[1]


RESUMABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "in memory": (lambda: DATA, {"batch_size": 16, "key": KEY}),
    "a stream": (lambda: jt.data.stream(DATA, 16, KEY), {}),
    "with weights": (
        lambda: jt.data.stream(DATA.replace(weights=np.arange(50, dtype=np.float32)), 16, KEY),
        {},
    ),
    "transformed": (lambda: jt.data.stream(DATA, 16, KEY, transform=add_noise), {}),
    "with a worker": (lambda: jt.data.stream(DATA, 16, KEY, transform=add_noise, workers=1), {}),
    "with a safeguard": (
        lambda: jt.data.stream(DATA, 16, KEY),
        {"state": make_state(jt.optimizers.skip_nonfinite(OPTIMIZER))},
    ),
    "an IterDataset of Grain": (lambda: grain_batches().shuffle(seed=1).to_iter_dataset(), {}),
    "a DataLoader of Grain": (lambda: grain_loader(shuffle=True), {}),
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_run_resumes_within_an_epoch_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    make, options = RESUMABLE[kind]
    epochs = 2
    # Starting workers takes seconds.
    uninterrupted, _ = RESUMABLE["transformed" if kind == "with a worker" else kind]
    straight = fit(uninterrupted(), epochs=epochs, **options)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    stop = stop_at(2, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(make(), epochs=epochs, callbacks=[checkpoint, stop], **options)
    error: Any = raised.value
    assert error.state.epoch == 1
    assert list(error.history["epoch"]) == [1]
    assert list_checkpoints(tmp_path)[-1] == (1, 2)
    assert (tmp_path / "epoch-1-step-2.safetensors").exists()
    recorder = Recorder()
    resumed = fit(make(), epochs=epochs, callbacks=[checkpoint, recorder], **options)
    assert_same_run(resumed, straight)
    start = recorder.start
    assert (start.resumed, start.epoch, start.step) == (True, 1, 2)
    assert list_checkpoints(tmp_path)[-1] == (2, 0)


def test_a_resumed_run_reads_and_reports_only_the_rest_of_an_epoch(tmp_path: Path) -> None:
    source, recorder = Examples(), Recorder(1)
    stream = jt.data.stream(source, 16, KEY)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop):
        fit(stream, epochs=2, callbacks=[checkpoint, stop_at(2, 3)])
    source.total = 0
    fit(stream, epochs=2, callbacks=[checkpoint, recorder])
    assert source.total == 16 + 18  # The first batch shows the shapes.
    steps = [(run.epoch, run.step, run.examples) for run in recorder.steps]
    assert steps == [(1, 3, 48), (1, 4, 50)]


def test_a_continued_run_resumes_within_its_first_epoch(tmp_path: Path) -> None:
    """It starts from the state of another run, so the history begins with the third epoch."""
    stream = jt.data.stream(DATA, 16, KEY)
    state, _ = fit(stream, epochs=2)
    straight = fit(stream, state, epochs=2)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=2)
    with pytest.raises(Stop):
        fit(stream, state, epochs=2, callbacks=[checkpoint, stop_at(3, 3)])
    assert list_checkpoints(tmp_path) == [(2, 2)]
    assert_same_run(fit(stream, state, epochs=2, callbacks=[checkpoint]), straight)


def test_a_run_interrupted_many_times_ends_in_the_same_bits(tmp_path: Path, shuffled) -> None:
    """The steps of an epoch come from several processes, and groups of batches differ."""
    data = jt.data.stream(DATA, 16, KEY)
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=1, keep=1)
    for epoch, step in ((1, 1), (1, 2), (1, 4), (2, 3), (3, 1), (3, 4)):
        with pytest.raises(Stop):
            fit(data, callbacks=[checkpoint, stop_at(epoch, step)])
    assert_same_run(fit(data, callbacks=[checkpoint]), shuffled)


def test_a_run_resumes_after_the_last_step_of_an_epoch(tmp_path: Path, ordered) -> None:
    """Without a length, the last step is known only when the epoch ends."""
    make, checkpoint = (
        ORDERED["an IterDataset of Grain"],
        jt.callbacks.checkpoint(tmp_path, every_steps=4),
    )

    def stop(run: jt.Run) -> None:
        if run.epoch == 2:
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


def test_every_steps_keeps_the_newest_checkpoints(tmp_path: Path, shuffled) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=3, keep=4)
    assert_same_run(fit(jt.data.stream(DATA, 16, KEY), callbacks=[checkpoint]), shuffled)
    assert list_checkpoints(tmp_path) == [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)][-4:]


def test_another_stream_is_another_run(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path)
    fit(jt.data.stream(DATA, 16, KEY), epochs=1, callbacks=[checkpoint])
    for other in (jt.data.stream(DATA, 16), jt.data.stream(DATA[:49], 16, KEY), DATA):
        with pytest.raises(jt.errors.InputError, match=r"another run:.*train data was Stream\(50"):
            fit(other, batch_size=16, callbacks=[checkpoint])


def test_a_mesh_of_eight_devices_gives_the_numbers_of_one(shuffled) -> None:
    """Eight does not divide the last batch of two examples."""
    mesh = jax.make_mesh((8,), ("data",))
    stream = jt.data.stream(DATA, 16, KEY)
    state, history = fit(stream, mesh=mesh, validation=stream)
    params = jax.tree.leaves(state.params)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in params)
    for ours, theirs in zip(params, jax.tree.leaves(shuffled[0].params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history.step_losses, shuffled[1].step_losses, rtol=1e-5)
    final = jt.evaluate(shuffled[0], DATA, LOSS)["loss"]
    np.testing.assert_allclose(history["validation_loss"][-1], final, rtol=1e-5)


def test_the_reader_is_at_most_three_segments_ahead(monkeypatch) -> None:
    set_capacity(monkeypatch, 4)
    read, ahead = 0, []

    def batches() -> Iterator[jt.Dataset]:
        nonlocal read
        for _ in range(64):
            read += 1
            yield BATCHES[0]

    def look(run: jt.Run) -> None:
        if run.step in (4, 16):
            time.sleep(0.3)  # The training is blocked; the reader is not.
        ahead.append(read - run.step)

    fit(Repeatable(batches()), epochs=1, callbacks=[jt.callbacks.every_steps(4, look)])
    assert read == 64
    # One is in use, one waits, one is filled; and one batch more is read to find the end.
    assert 4 <= max(ahead) <= 3 * 4 + 1, ahead


def test_thirty_epochs_leave_no_threads_and_no_open_files() -> None:
    streams = [BATCHES, jt.data.stream(DATA, 16, KEY), grain_batches().to_iter_dataset()]

    def resources() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    for stream in streams:
        fit(stream, epochs=2, test=stream)
    before = resources()
    for stream in streams:
        fit(stream, epochs=30, test=stream)
    deadline = time.monotonic() + 10
    while any(np.greater(resources(), before)) and time.monotonic() < deadline:
        time.sleep(0.05)  # threads that are ending
    assert not any(np.greater(resources(), before))


def test_a_mapped_file_is_read_and_not_loaded(tmp_path: Path) -> None:
    program = """
    from pathlib import Path
    import numpy as np, jax, jaxtrain as jt

    open("inputs.bin", "wb").truncate(2**31)
    data = jt.Dataset(
        np.memmap("inputs.bin", np.float32, "r", shape=(2**15, 2**14)), np.zeros((2**15, 1))
    )
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(0.1), data.inputs[:1], key=jax.random.key(0)
    )

    def peak():
        # Not `getrusage`, whose maximum includes that of the parent before `exec`.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    def stop(run):
        print(run.step, peak() - before)
        raise KeyboardInterrupt

    before = peak()
    jt.fit(
        state, data, loss_fn=jt.losses.mean_squared_error, key=jax.random.key(0), batch_size=8,
        callbacks=[jt.callbacks.every_steps(100, stop)],
    )
    """
    result = run_program(tmp_path, program)
    step, growth = result.stdout.split()
    assert step == "100"
    assert 10 < float(growth) < 500, "MiB, of a file of 2048"


def run_program(folder: Path, program: str, *arguments: str) -> Any:
    """Runs a program that ends within two minutes."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    return subprocess.run(
        [sys.executable, path.name, *arguments],
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
        r"batch 3 of train is Dataset\(inputs=float32\[16,5\].*; expected the shapes and "
        r"dtypes of the first batch, Dataset\(inputs=float32\[16,6\].*, and at most 16 examples",
    ),
    "dtype": (
        changed(inputs=DATA.inputs[:16].astype(np.float16)),
        r"batch 3 of train is Dataset\(inputs=float16\[16,6\].*; expected the shapes and dty",
    ),
    "weights": (
        changed(weights=np.ones(16, np.float32)),
        r"batch 3 of train is .*weights=float32\[16\]\); expected the shapes and dtypes of",
    ),
    "structure": (changed(inputs={"x": DATA.inputs[:16]}), "batch 3 of train is .*the first"),
    "no targets": (
        changed(targets=None),
        "batch 3 of train is .*; expected the shapes",
    ),
    "lengths": (
        changed(targets=DATA.targets[:15]),
        "batch 3 of train is .*; expected the shapes",
    ),
    "a scalar": (
        changed(targets=np.int32(1)),
        "batch 3 of train is .*; expected the shapes",
    ),
    "larger": ([*BATCHES[:2], DATA[:17]], "batch 3 of train .* at most 16 examples"),
    "empty": (
        [*BATCHES[:2], DATA[:0]],
        "batch 3 of train is .*; expected the shapes",
    ),
    "an array": (
        [*BATCHES[:2], DATA.inputs[:16]],
        r"^batch 3 of train is a ndarray; expected \(inputs, targets\), .* a dict with these",
    ),
    "a number": ([*BATCHES[:2], 3], "^batch 3 of train is a int; expected"),
    "text": ([*BATCHES[:2], "ab"], "^batch 3 of train is a str; expected"),
    "four fields": ([*BATCHES[:2], (1, 2, 3, 4)], "^batch 3 of train is a tuple of 4; exp"),
    "other names": (
        [*BATCHES[:2], {"image": 1, "label": 2}],
        "^batch 3 of train is a dict of image, label; expected",
    ),
    "another name": (
        [*BATCHES[:2], {"inputs": DATA.inputs[:16], "targets": DATA.targets[:16], "id": 1}],
        "^batch 3 of train is a dict of inputs, targets, id; expected",
    ),
    "too few": (
        Repeatable(BATCHES, 10),
        "train ended after 4 batches in epoch 1; expected 10",
    ),
    "too many": (
        Repeatable(BATCHES, 3),
        "train has more than 3 batches in epoch 1; expected 3, its len",
    ),
    "a label": (
        changed(targets=np.full(16, 7, np.int32)),
        "train.* label 7; expected labels from 0 to 2, since the model has 3 outputs",
    ),
    "a negative label": (changed(targets=np.full(16, -1, np.int32)), "train.* label -1; exp"),
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


def test_nan_in_a_later_batch_names_the_epoch_and_the_step() -> None:
    """In the third batch of the second epoch."""
    bad = changed(inputs=np.full((16, 6), np.nan, np.float32))
    epochs = iter([BATCHES, bad])

    class Changing:
        def __iter__(self) -> Iterator[Any]:
            return iter(next(epochs))

    with pytest.raises(
        jt.errors.NonFiniteError, match="training loss became nan in epoch 2, step 3"
    ) as e:
        fit(Changing())
    assert (e.value.epoch, e.value.step) == (2, 3)
    assert e.value.state.epoch == 1
    assert list(e.value.history["epoch"]) == [1]


def test_a_generator_is_empty_in_the_second_epoch() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"no batches in epoch 2; .* not a generator"
    ) as raised:
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
    with pytest.raises(
        jt.errors.InputError, match=r"never ends; expected one epoch .* its repeat\(\)"
    ):
        fit(grain_batches().repeat(), callbacks=[stop_at(1, 1)])


def test_a_stream_that_never_ends_stops_with_the_callback() -> None:
    def endless() -> Iterator[jt.Dataset]:
        while True:
            yield BATCHES[0]

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(Repeatable(endless()), callbacks=[stop_at(1, 200, KeyboardInterrupt)])
    assert time.perf_counter() - started < 10
    error: Any = raised.value
    assert error.state.epoch == 0
    assert not [each for each in threading.enumerate() if each.name == "batches"]


def test_a_stream_that_hangs_does_not_delay_the_end(monkeypatch) -> None:
    """The call returns while the reader still waits for the stream."""
    set_capacity(monkeypatch, 1)
    release = threading.Event()

    def hanging() -> Iterator[jt.Dataset]:
        yield from BATCHES[:3]
        release.wait(600)

    try:
        with pytest.raises(KeyboardInterrupt):
            fit(Repeatable(hanging()), callbacks=[stop_at(1, 1, KeyboardInterrupt)])
        assert [thread for thread in threading.enumerate() if thread.name == "batches"]
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "batches":
                thread.join(60)


def test_an_error_of_the_source_names_the_example_and_keeps_the_epochs(tmp_path: Path) -> None:
    """In the second epoch."""
    source = Examples(12_400, bad=12_345)
    with pytest.raises(
        jt.errors.InputError, match=r"^example 12345 of .* \(OSError: the disk is gon"
    ) as e:
        fit(source, batch_size=16, callbacks=[jt.callbacks.checkpoint(tmp_path)])
    error: Any = e.value
    assert "\n" not in str(error)
    assert list_checkpoints(tmp_path) == [(1, 0)]
    assert error.state.epoch == 1
    assert list(error.history["epoch"]) == [1]


def test_an_error_of_an_iterable_names_the_batch() -> None:
    class Failing:
        def __iter__(self) -> Iterator[jt.Dataset]:
            yield from BATCHES[:2]
            raise ValueError("no more\nlines")

    with pytest.raises(
        jt.errors.StreamError, match=r"^train raised ValueError at batch 3 of ep"
    ) as e:
        fit(Failing())
    error = e.value
    assert (error.name, error.epoch, error.batch) == ("train", 1, 3)
    assert "(no more); fix the stream" in str(error)
    assert "\n" not in str(error)
    assert error.state.epoch == 0
    with pytest.raises(
        jt.errors.StreamError, match=r"^validation raised ValueError at batch 3"
    ) as e:
        fit(BATCHES, validation=Failing())
    with pytest.raises(jt.errors.StreamError, match=r"^dataset raised ValueError at batch 3"):
        jt.evaluate(make_state(), Failing(), LOSS)


def test_a_key_for_batches_that_have_an_order_is_refused() -> None:
    for stream in (BATCHES, jt.data.stream(DATA, 16), grain_batches(), iter(BATCHES)):
        with pytest.raises(
            jt.errors.InputError, match=r"key is given, but train is a .*; expected ke"
        ):
            fit(stream, key=KEY)


def test_a_line_search_needs_one_batch() -> None:
    state = make_state(jt.optimizers.lbfgs())
    with pytest.raises(jt.errors.InputError, match=r"batch_size is 16 .* line search \(L-BFGS\)"):
        fit(BATCHES, state)


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
def test_train_needs_data_in_memory() -> None:
    for stream in (BATCHES, jt.data.stream(DATA, 16)):
        with pytest.raises(
            jt.errors.InputError, match=r"train is a stream; expected a jaxtrain.Dataset"
        ):
            jt.train(make_state(), stream, loss_fn=LOSS)


def test_numbers_in_64_bits_are_converted_without_a_warning(monkeypatch, ordered) -> None:
    """Also in the unused part of a group, whose memory may hold any values."""
    set_capacity(monkeypatch, 8)
    for _ in range(99):
        np.full((8, 16, 6), 1e300)
    wide = [(batch.inputs.astype(np.float64), batch.targets.astype(np.int64)) for batch in BATCHES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_run(fit(wide), ordered)


WORKERS = """
import os, signal, sys
import numpy as np


class Examples:
    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 2000

    def __getitem__(self, index):
        if index == 1000 and os.path.exists("second epoch"):
            if self.fault == "exits":
                os._exit(1)
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is gone")
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

    for fault in sys.argv[2:3]:
        if sys.argv[1] == "torch":
            from torch.utils.data import DataLoader

            stream = DataLoader(Examples(fault), 16, num_workers=1)
        else:
            stream = jt.data.stream(Examples(fault), 16, workers=1)
        try:
            jt.fit(
                state, stream, loss_fn=jt.losses.cross_entropy, epochs=2, callbacks=[mark]
            )
        except Exception as error:
            print(fault, type(error).__name__, int(error.state.epoch), error, sep="|")
        os.remove("second epoch")
"""


# PyTorch notices a dead process by a signal, or by its closed pipe.
DEAD = (
    r"RuntimeError\|1\|DataLoader worker \(pid|StreamError\|1\|.*(DataLoader worker|Connection|EOF)"
)
DEATHS = {
    "torch": {
        "exits": DEAD,
        "killed": DEAD,
        "raises": r"StreamError\|1\|.*raised OSError at batch 63",
    },
    "grain": {
        "killed": r"StreamError\|1\|.*Worker process was terminated unexpectedly with exit code",
        "raises": r"InputError\|1\|example 1000 of .* cannot be read \(OSError: the disk is gone\)",
    },
}


@pytest.mark.parametrize("library", DEATHS)
def test_a_worker_that_dies_ends_the_run_with_an_error(tmp_path: Path, library: str) -> None:
    """In the second epoch, so that the state and the history are those of the first."""
    if library == "torch":
        pytest.importorskip("torch")
    messages = DEATHS[library]
    for fault, message in messages.items():
        result = run_program(tmp_path, WORKERS, library, fault)
        [line] = [line for line in result.stdout.splitlines() if "|" in line] or [result.stderr]
        assert re.match(rf"{fault}\|({message})", line), line
        assert result.returncode == 0


def test_a_mapped_file_cut_while_it_is_read_ends_the_run_with_an_error(tmp_path: Path) -> None:
    """In a process of its own, which reading past the end of the file would kill."""
    program = """
    import os
    import numpy as np, jax, jaxtrain as jt

    np.ones((64, 1024), np.float32).tofile("inputs.bin")
    data = jt.Dataset(
        np.memmap("inputs.bin", np.float32, "r", shape=(64, 1024)), np.zeros((64, 1), np.float32)
    )
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(1e-4), data.inputs[:1],
        key=jax.random.key(0),
    )

    def cut(run):
        os.truncate("inputs.bin", 9000)

    try:
        jt.fit(
            state, data, loss_fn=jt.losses.mean_squared_error, batch_size=8, callbacks=[cut],
            epochs=9,
        )
    except jt.errors.InputError as error:
        print(int(error.state.epoch), len(error.history["epoch"]), error)
    """
    result = run_program(tmp_path, program)
    assert result.stdout.startswith("1 1 the file "), result.stderr
    assert f"has 9000 bytes, and had {64 * 4096} when it was opened" in result.stdout


def test_a_stream_may_fill_the_same_arrays_again() -> None:
    class Buffered:
        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            inputs, targets = np.empty((16, 6), np.float32), np.empty(16, np.int32)
            for batch in BATCHES[:3]:
                inputs[:], targets[:] = batch.inputs, batch.targets
                yield inputs, targets

    state, expected = make_state(), BATCHES[:3]
    ours, theirs = (fit(stream, test=stream) for stream in (Buffered(), expected))
    assert_same_run(ours, theirs)
    found = [jt.evaluate(state, stream, LOSS)["loss"] for stream in (Buffered(), expected)]
    assert found[0] == found[1]


def test_a_mapped_array_that_was_copied_is_data_in_memory(tmp_path: Path) -> None:
    DATA.inputs.astype(np.float32).tofile(tmp_path / "data.bin")
    mapped = np.memmap(tmp_path / "data.bin", np.float32, "r", shape=DATA.inputs.shape)
    for copied in (mapped.astype(np.float32), mapped.copy()):
        assert isinstance(copied, np.memmap)
        assert_same_run(fit_in_memory(DATA.replace(inputs=copied)), fit_in_memory())


def test_nan_in_a_stream_on_a_mesh_names_the_step() -> None:
    targets = np.array(DATA.targets)
    inputs = np.array(DATA.inputs)
    inputs[40] = np.nan
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    stream = jt.data.stream(jt.Dataset(inputs, targets), 16)
    with pytest.raises(jt.errors.NonFiniteError, match="epoch 1, step 3"):
        fit(stream, mesh=mesh)


def test_a_stream_whose_batches_the_devices_do_not_divide_is_refused() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(jt.errors.InputError, match="batch_size is 12 on 8 devices"):
        fit(jt.data.stream(DATA, 12), mesh=mesh)


def test_another_transform_is_another_run(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path)
    fit(jt.data.stream(DATA, 16, KEY), callbacks=[checkpoint], epochs=1)
    with pytest.raises(
        jt.errors.InputError, match=r"belongs to another run: .*transformed by add_noise"
    ):
        fit(jt.data.stream(DATA, 16, KEY, transform=add_noise), callbacks=[checkpoint], epochs=2)


def test_the_newest_checkpoint_of_a_complete_epoch_is_kept(tmp_path: Path) -> None:
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=1, keep=2)
    with pytest.raises(Stop):
        fit(jt.data.stream(DATA, 16, KEY), callbacks=[checkpoint, stop_at(2, 3)])
    assert list_checkpoints(tmp_path)[0] == (1, 0)
