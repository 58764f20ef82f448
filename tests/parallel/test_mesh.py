"""Training on a mesh of eight simulated devices: the numbers of one device, an eighth of its work.

`test_processes.py` tests several processes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxtrain as jt

DEVICES = 8
pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 8 devices")

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}
# The devices divide batches of training examples, and not the last batch of 333 test examples.
EXAMPLES, BATCH_SIZE, TEST_BATCH_SIZE = 333, 32, 100
KEY = jax.random.key(1)
PLACES = {"copied": jt.parallel.replicate, "sharded": jt.parallel.shard}

Mesh = jax.sharding.Mesh


class Network(nn.Module):
    """A convolution, statistics over the batch, and both kinds of dropout."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False)(images[..., None])
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(10)(jt.models.Dropout(0.2)(x, train))


class Masks(nn.Module):
    """Returns ones, some of them dropped: by Flax in the first half, by jaxtrain in the second."""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        ones = inputs * self.param("one", nn.initializers.ones, ())
        flax = nn.Dropout(0.5, deterministic=not train)(ones)
        return jnp.concatenate([flax, jt.models.Dropout(0.5)(ones, train)], axis=1)


class Alone(NamedTuple):
    """What one device computes: the start, and the state and history at the end."""

    start: jt.TrainState
    train: jt.Dataset
    test: jt.Dataset | None
    state: jt.TrainState
    history: jt.History


def random_images(examples: int, size: int, seed: int = 0) -> jt.Dataset:
    images, labels = jax.random.split(jax.random.key(seed))
    return jt.Dataset(
        jax.random.uniform(images, (examples, size, size)),
        jax.random.randint(labels, (examples,), 0, 10),
    )


def fit(state, train, test, *, epochs=1, **options):
    return jt.fit(
        state,
        train,
        test,
        loss_fn=LOSS,
        metric_fns=METRICS,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        test_batch_size=TEST_BATCH_SIZE,
        key=KEY,
        **options,
    )


@pytest.fixture(scope="module")
def alone() -> Alone:
    train = random_images(109, 8)  # three batches that the devices divide, and one of 13
    start = jt.init_state(Network(), jt.optimizers.sgd(0.1), train.inputs[:1], key=KEY)
    return Alone(start, train, None, *fit(start, train, None))


@pytest.fixture(scope="module")
def small() -> Alone:
    """A network that compiles in less time, and whose optimizer has a state."""
    train, test = random_images(128, 8), random_images(EXAMPLES, 8, seed=1)
    model = jt.models.FeedForward(features=(16, 10), mean=0.5, std=0.3)
    optimizer = jt.optimizers.sgd(0.05, momentum=0.9)
    start = jt.init_state(model, optimizer, train.inputs[:1], key=KEY)
    return Alone(start, train, test, *fit(start, train, test, epochs=3))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """The mesh that `jax.make_mesh` returns by default, whose axes are explicit."""
    return jax.make_mesh((DEVICES,), ("data",))


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=lambda axis: axis.name)
def each_mesh(request) -> Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(request.param,))


def assert_close(found, expected, tolerance=1e-5) -> None:
    """Compares all arrays of two pytrees, and their structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def assert_same_state(found: jt.TrainState, expected: jt.TrainState, tolerance=1e-5) -> None:
    """Compares parameters, batch statistics, optimizer state and counters."""
    variables = ("params", "model_state", "opt_state", "step", "epoch")
    for name in variables:
        assert_close(getattr(found, name), getattr(expected, name), tolerance)


def assert_same_history(found, expected) -> None:
    assert list(found) == [name for name in expected if name in found]
    for name in found:
        if name != "seconds":
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def device_count_of(tree) -> set[int]:
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(tree)}


_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-done)?\("
)


def collectives(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Returns the operations by which devices communicate, and the bytes of their results."""
    found = []
    for shape, kind in _COLLECTIVE.findall(program.as_text()):
        arrays = re.findall(r"\b([a-z]+)(\d*)\[([\d,]*)\]", shape)  # such as f32[256,10]
        sizes = [
            int(bits or 8) // 8 * math.prod(map(int, filter(None, dimensions.split(","))))
            for _, bits, dimensions in arrays
        ]
        found.append((kind, sum(sizes)))
    return found


# The numbers of one device.


def test_fit_gives_the_numbers_of_one_device(alone: Alone, each_mesh: Mesh) -> None:
    state, history = fit(alone.start, alone.train, alone.test, mesh=each_mesh)
    assert_same_state(state, alone.state)
    assert_same_history(history, alone.history)
    assert list(history) == list(alone.history)
    np.testing.assert_allclose(history.step_losses, alone.history.step_losses, rtol=0, atol=1e-5)
    assert device_count_of(state) == {DEVICES}
    assert jax.tree.leaves(alone.state.model_state), "the network has no batch statistics"


def test_fit_takes_the_mesh_of_set_mesh_or_of_the_data(small: Alone, mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        state, _ = fit(small.start, small.train, small.test, epochs=3)
    assert device_count_of(state) == {DEVICES}
    assert_same_state(state, small.state)
    state, _ = fit(small.start, jt.parallel.replicate(small.train, mesh), small.test, epochs=3)
    assert device_count_of(state) == {DEVICES}
    assert_same_state(state, small.state)


def test_train_gives_the_numbers_of_one_device(small: Alone, mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        state, history = jt.train(
            small.start,
            small.train,
            small.test,
            loss_fn=LOSS,
            metric_fns=METRICS,
            epochs=3,
            batch_size=BATCH_SIZE,
            test_batch_size=TEST_BATCH_SIZE,
            key=KEY,
        )
    assert device_count_of(state) == {DEVICES}
    assert_same_state(state, small.state)
    losses = np.concatenate(history.pop("step_losses"))
    np.testing.assert_allclose(losses, small.history.step_losses, rtol=0, atol=1e-5)
    assert_same_history(history, small.history)


@pytest.mark.parametrize("place", PLACES)
def test_train_epoch_gives_the_numbers_of_one_device(small: Alone, mesh: Mesh, place: str) -> None:
    data, options = small.train[:64], {"batch_size": BATCH_SIZE, "key": jax.random.key(2)}
    expected, expected_losses = jt.train_epoch(small.start, data, LOSS, **options)
    state = jt.parallel.replicate(small.start, mesh)
    state, losses = jt.train_epoch(state, PLACES[place](data, mesh), LOSS, **options)
    assert device_count_of(state) == {DEVICES}
    assert_same_state(state, expected)
    assert_close(losses, expected_losses)


def test_a_loss_that_receives_all_parameters_gives_the_numbers_of_one_device(
    small: Alone, mesh: Mesh
) -> None:
    def loss_fn(predictions, targets, *, params, model_state, inputs, key):
        noise = jax.random.uniform(key, (len(targets),)) + inputs.mean(axis=(1, 2))
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((params, model_state)))
        return noise * LOSS(predictions, targets) + 0.01 * squares

    def run(state, train):
        after, losses = jt.train_epoch(state, train, loss_fn, batch_size=64, key=KEY)
        return after.params, losses, jt.evaluate(after, train, loss_fn, key=KEY)

    found = run(jt.parallel.replicate(small.start, mesh), jt.parallel.shard(small.train, mesh))
    assert_close(found, run(small.start, small.train))


@pytest.mark.parametrize("size", [32, 13])
def test_a_step_gives_the_numbers_of_one_device(small: Alone, mesh: Mesh, size: int) -> None:
    batch = small.train[:size]
    state, copy = jt.parallel.replicate((small.start, batch), mesh)
    found, expected = (
        (*jt.train_step(*each, LOSS), jt.eval_step(*each, LOSS, METRICS))
        for each in ((state, copy), (small.start, batch))
    )
    assert_same_state(found[0], expected[0])
    assert_close(found[1:], expected[1:])


def own_step(state: jt.TrainState, batch: jt.Dataset) -> tuple[jt.TrainState, dict]:
    (loss, aux), grads = jt.gradients(state, batch, LOSS)
    return jt.apply_gradients(state, grads, model_state=aux.model_state), {"loss": loss}


@pytest.mark.parametrize("step", [functools.partial(jt.train_step, loss_fn=LOSS), own_step])
def test_a_step_inside_a_function_of_the_user_gives_the_numbers_of_one_device(
    small: Alone, mesh: Mesh, step: Callable
) -> None:
    batch = small.train[:32]
    expected = jt.train_step(small.start, batch, LOSS)
    with jax.set_mesh(mesh):
        state = jt.parallel.replicate(small.start, mesh)
        batch = jt.parallel.shard(batch, mesh)
        program = jax.jit(step).lower(state, batch).compile()
        found = program(state, batch)
    assert_same_state(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert collectives(program), "the devices did not divide the batch"


# Batches, dropout and errors.


def squares(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((predictions - targets) ** 2, axis=1)


def test_the_devices_draw_the_dropout_of_one_device_and_each_its_own(mesh: Mesh) -> None:
    ones = jt.Dataset(jnp.ones((16, 50)), jnp.zeros((16, 100)))
    start = jt.init_state(Masks(), jt.optimizers.sgd(0.1), ones.inputs, key=KEY)

    def masks(state: jt.TrainState, batch: jt.Dataset) -> np.ndarray:
        masks = jax.jit(lambda state, batch: jt.gradients(state, batch, squares)[0][1].predictions)
        return np.asarray(masks(state, batch)) != 0

    with jax.set_mesh(mesh):
        found = masks(*jt.parallel.replicate((start, ones), mesh))
    np.testing.assert_array_equal(found, masks(start, ones))
    # Each device has two of the examples, which are equal: no two are dropped at the same places.
    for half in (found[:, :50], found[:, 50:]):
        assert 0.4 < half.mean() < 0.6
        assert len(np.unique(half, axis=0)) == len(half)


@pytest.mark.parametrize("function", ["fit", "train", "train_epoch"])
@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (128, "batch_size is 100 on 8 devices; expected a multiple of 8, such as 96 or 104"),
        (50, "batch_size is 50 on 8 devices; expected a multiple of 8, such as 48$"),
        (5, "or use a larger data set"),
    ],
)
def test_a_batch_size_that_the_devices_do_not_divide_is_refused(
    small: Alone, mesh: Mesh, function: str, examples: int, message: str
) -> None:
    data, options = small.train[:examples], {"loss_fn": LOSS, "batch_size": 100}
    with jax.set_mesh(mesh), pytest.raises(jt.errors.InputError, match=message) as caught:
        getattr(jt, function)(small.start, data, **options)
    assert caught.value.argument == "batch_size"


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
def test_a_mesh_and_a_data_set_that_do_not_fit_are_refused(small: Alone, mesh: Mesh) -> None:
    rows = jax.make_mesh((DEVICES,), ("rows",))
    with pytest.raises(jt.errors.InputError, match=r'axes .*rows.*; expected one named "data"'):
        fit(small.start, small.train, small.test, mesh=rows)
    with pytest.raises(jt.errors.InputError, match="mesh is 8; expected a mesh"):
        jt.parallel.replicate(small.start, 8)
    with pytest.raises(jt.errors.InputError, match=r"333 examples for 8 devices.*dataset\[:328\]"):
        jt.parallel.shard(small.test, mesh)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("rows")])
def test_a_rule_that_does_not_fit_names_the_array(small: Alone, mesh: Mesh, spec: P) -> None:
    def rule(path: str, leaf: jax.Array) -> P:
        return spec if path.endswith("params.Dense_1.bias") else P()

    message = r"params\.Dense_1\.bias, of shape \(10,\), is P"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.parallel.replicate(small.start, mesh, rule)


def test_initialize_after_jax_has_started_is_refused() -> None:
    before, message = (
        jax.config.jax_cpu_collectives_implementation,
        r"the processes could not be joined .*port 1",
    )
    try:
        with pytest.raises(jt.errors.InputError, match=message):
            jt.parallel.initialize("port 1", 2)
    finally:
        jax.config.update("jax_cpu_collectives_implementation", before)


# Evaluation.


@pytest.mark.parametrize(("examples", "batch_size"), [(333, 100), (328, 100), (5, 3)])
def test_evaluate_and_predict_agree_with_one_device_at_any_size(
    small: Alone, mesh: Mesh, examples: int, batch_size: int
) -> None:
    data, options = small.test[:examples], {"batch_size": batch_size}
    place = jt.parallel.replicate if examples % DEVICES else jt.parallel.shard
    state, placed = jt.parallel.replicate(small.state, mesh), place(data, mesh)
    expected = jt.evaluate(small.state, data, LOSS, METRICS, **options)
    assert_close(jt.evaluate(state, placed, LOSS, METRICS, **options), expected)
    # In the order of the examples, whose predictions all differ.
    predictions = jt.predict(small.state, data.inputs, **options)
    assert_close(jt.predict(state, placed.inputs, **options), predictions)
    assert len(np.unique(predictions, axis=0)) == examples


def test_weights_and_metrics_of_pairs_agree_with_one_device(small: Alone, mesh: Mesh) -> None:
    def sums(predictions, targets, weights):
        return jnp.sum(weights * LOSS(predictions, targets)), jnp.sum(weights)

    metrics = {"perplexity": (sums, lambda sums: jnp.exp(sums[0] / sums[1]))} | METRICS
    metrics |= {"auc": jt.metrics.roc_auc(), "recall": jt.metrics.recall(None)}
    data = small.test.replace(weights=jnp.arange(EXAMPLES) % 3 / 2)
    expected = jt.evaluate(small.state, data, LOSS, metrics, batch_size=TEST_BATCH_SIZE)
    state, copy = jt.parallel.replicate((small.state, data), mesh)
    found = jt.evaluate(state, copy, LOSS, metrics, batch_size=TEST_BATCH_SIZE)
    assert_close(found, expected)
    found = jt.train_step(state, copy[:32], LOSS)[0]
    assert_same_state(found, jt.train_step(small.state, data[:32], LOSS)[0])


# The work and the communication of T2.


@jax.jit
def epoch(state: jt.TrainState, data: jt.Dataset) -> tuple[jt.TrainState, jax.Array]:
    return jt.train_epoch(state, data, LOSS, batch_size=64, key=jax.random.key(1))


@jax.jit
def evaluation(state: jt.TrainState, data: jt.Dataset) -> dict[str, jax.Array]:
    return jt.evaluate(state, data, LOSS, METRICS, batch_size=128)


def flops(program: jax.stages.Compiled) -> float:
    """Returns the operations of one device; XLA counts one step of a loop."""
    return program.cost_analysis()["flops"]


def test_each_device_does_an_eighth_of_the_work_and_exchanges_gradients(mesh: Mesh) -> None:
    data = random_images(512, 28)
    data = data.replace(inputs=(255 * data.inputs).astype(jnp.uint8))
    state = jt.init_state(
        jt.models.FeedForward(dropout_rate=0.0),
        jt.optimizers.sgd(0.01),
        data.inputs[:1],
        key=KEY,
    )
    gradients_and_loss = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) + 4
    batch = 64 * (28 * 28 + 4)
    alone = [flops(each.lower(state, data).compile()) for each in (epoch, evaluation)]
    state = jt.parallel.replicate(state, mesh)
    for place, put in PLACES.items():
        with jax.set_mesh(mesh):
            programs = [
                each.lower(state, put(data, mesh)).compile() for each in (epoch, evaluation)
            ]
        for program, expected in zip(programs, alone, strict=True):
            assert flops(program) / expected == pytest.approx(1 / DEVICES, rel=0.1)
        exchanged = sum(size for _, size in collectives(programs[0])) - gradients_and_loss
        if place == "copied":
            assert exchanged == 0
        else:  # each step collects its batch, and not the data set
            assert batch <= exchanged < 2 * batch
        assert sum(size for _, size in collectives(programs[1])) < 1000  # the data stay


# A state that a rule divides.


def by_rule(path: str, leaf: jax.Array) -> P:
    """Divides the weights of a layer, and their momentum, over the devices."""
    return P("data") if path.endswith("Dense_0.weight") else P()


def divided_paths(state: jt.TrainState) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [
        jax.tree_util.keystr(path) for path, leaf in leaves if leaf.sharding.spec[:1] == ("data",)
    ]


def test_a_state_divided_by_a_rule_gives_the_numbers_of_one_device_and_stays_divided(
    small: Alone, mesh: Mesh
) -> None:
    start = jt.parallel.replicate(small.start, mesh, by_rule)
    paths = divided_paths(start)
    assert len(paths) == 2  # the weights and their momentum
    copy = jt.parallel.replicate(small.train, mesh)
    fitted, history = fit(start, small.train, small.test, epochs=3, mesh=mesh)
    assert_same_state(fitted, small.state)
    assert_same_history(history, small.history)
    for state in (
        fitted,
        jt.train_step(start, copy[:32], LOSS)[0],
        jt.train_epoch(start, copy, LOSS, batch_size=BATCH_SIZE)[0],
    ):
        assert divided_paths(state) == paths


# Checkpoints.


def mesh_of(devices: int) -> Mesh | None:
    if devices == 1:
        return None
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


@pytest.mark.parametrize(("devices", "rule"), [(4, by_rule), (1, None)])
def test_a_checkpoint_of_eight_devices_resumes_on_any_number(
    small: Alone, tmp_path: Path, devices: int, rule: Callable | None
) -> None:
    eight, mesh = mesh_of(DEVICES), mesh_of(devices)
    checkpoint = jt.callbacks.checkpoint(tmp_path / "checkpoints")
    start = jt.parallel.replicate(small.start, eight, rule)
    fit(start, small.train, small.test, epochs=1, mesh=eight, callbacks=[checkpoint])
    start = small.start if mesh is None else jt.parallel.replicate(small.start, mesh, rule)
    runs: list[jt.Run] = []
    options = {"epochs": 3, "mesh": mesh, "callbacks": [checkpoint, runs.append]}
    with pytest.warns(UserWarning, match=f"devices was 8 and is now {devices}"):
        state, history = fit(start, small.train, small.test, **options)
    assert [(run.epoch, run.resumed) for run in runs] == [(2, True), (3, True)]
    assert device_count_of(state) == {devices}
    if rule is not None:
        assert len(divided_paths(state)) == 2
    assert_same_state(state, small.state)
    assert_same_history(history, small.history)


# Sweeps.


def test_a_sweep_spreads_its_runs_over_the_devices_which_do_not_communicate(
    small: Alone, mesh: Mesh, monkeypatch
) -> None:
    data = small.train[:40]

    def run(learning_rate, seed):
        key = jax.random.key(seed)
        model = jt.models.FeedForward((10,), mean=0.5, std=0.3)
        state = jt.init_state(model, jt.optimizers.sgd(learning_rate), data.inputs[:1], key=key)
        state, history = jt.train(state, data, loss_fn=LOSS, epochs=1, batch_size=20, key=key)
        return state.params, history

    programs: list[jax.stages.Compiled] = []
    compile_program = jax.stages.Lowered.compile

    def record(lowered, *arguments, **options):
        programs.append(compile_program(lowered, *arguments, **options))
        return programs[-1]

    axes, done = {"learning_rate": [0.01, 0.1], "seed": list(range(9))}, []
    expected = jt.sweep(run, axes, at_once=1)
    monkeypatch.setattr(jax.stages.Lowered, "compile", record)
    found = jt.sweep(run, axes, at_once=10, mesh=mesh, callbacks=[done.append])
    assert [progress.at_once % DEVICES for progress in done] == [0] * len(done)
    assert done[-1].done == done[-1].total == 18
    assert_close(found.outputs, expected.outputs, tolerance=1e-6)
    assert programs
    assert [collectives(program) for program in programs] == [[]] * len(programs)


# Parts of a data set.


@pytest.mark.parametrize("count", [1, 5])
def test_the_parts_of_a_data_set_are_disjoint_in_order_and_of_equal_size(count: int) -> None:
    parts = [jt.data.load("digits", shard=(index, count)) for index in range(count)]
    for whole, pieces in zip(jt.data.load("digits"), zip(*parts, strict=True), strict=True):
        size = len(whole) // count
        assert {len(piece) for piece in pieces} == {size}
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *pieces)
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, whole[: size * count]))


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0, 10_000)])
def test_a_part_out_of_range_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(jt.errors.InputError, match=r"shard(\[[01]\])? is .*; expected"):
        jt.data.load("digits", shard=shard)
