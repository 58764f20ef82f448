"""sweep: the runs of a grid against the same runs alone, batches, memory, bad input."""

from __future__ import annotations

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from jaxtrain.sweeps import _program

LOSS = jt.losses.cross_entropy
# The type checker of `make test TYPES=1` raises before these checks do.
wrong_types = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first"
)


@pytest.fixture(scope="module")
def run():
    """A run of two axes on small data, which returns (state, history)."""
    labels = jnp.arange(50) % 3
    inputs = jax.nn.one_hot(labels, 6) + 0.3 * jax.random.normal(jax.random.key(7), (50, 6))
    train, validation = jt.Dataset(inputs, labels).split(0.2, jax.random.key(0))

    def run(learning_rate, seed):
        key = jax.random.key(seed)
        model = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
        optimizer = jt.optimizers.sgd(learning_rate, momentum=0.9)
        state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
        return jt.train(state, train, validation, loss_fn=LOSS, epochs=3, batch_size=16, key=key)

    return run


@pytest.fixture(scope="module")
def alone(run):
    """The run by itself, compiled once for all configurations."""
    return jax.jit(run)


def line(slope, offset=0.0):
    """A run that is solved by hand: the loss after step t is slope / t + offset."""
    return {"loss": slope / jnp.arange(1.0, 5.0) + offset, "slope": slope}


AXES = {"learning_rate": [0.01, float("inf"), 0.3], "seed": range(2)}


@pytest.mark.parametrize("at_once", [1, 5])
def test_every_run_equals_the_run_alone(run, alone, small_classes, at_once) -> None:
    """One that diverges is NaN in its own row; the state of the best one trains on."""
    result = jt.sweep(run, AXES, at_once=at_once)
    assert result["test_loss"].shape == (3, 2, 3)
    assert result["step_losses"].shape == (3, 2, 3, 3)
    for i, rate in enumerate(AXES["learning_rate"]):
        for j, seed in enumerate(AXES["seed"]):
            found = result.run(2 * i + j)
            assert found.configuration == {"learning_rate": rate, "seed": seed}
            if rate == float("inf"):
                assert np.isnan(result["test_loss"][i, j]).all()
                continue
            state, history = alone(jnp.float32(rate), jnp.int32(seed))
            np.testing.assert_allclose(
                result["test_loss"][i, j], history["test_loss"], rtol=1e-5, atol=1e-6
            )
            for ours, theirs in zip(
                jax.tree.leaves(found.state.params), jax.tree.leaves(state.params), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            assert found.state.key == state.key
    state, history = jt.fit(result.best("test_loss").state, small_classes, loss_fn=LOSS, epochs=1)
    assert history["epoch"].tolist() == [4]


def test_columns_keep_their_order_and_numbers_their_types() -> None:
    def run(count, rate):
        assert count.dtype == jnp.int32
        assert rate.dtype == jnp.float32
        return {"rate": rate * jnp.ones(3), "count": count, "epochs": 5}

    result = jt.sweep(run, {"count": np.arange(2), "rate": [1, 0.5]})
    assert result.axes == {"count": (0, 1), "rate": (1.0, 0.5)}
    assert result.columns == ["rate", "count", "epochs"]
    assert result["count"].dtype == np.int32
    assert result["epochs"].tolist() == [[5, 5], [5, 5]]


def test_axes_of_other_values_than_numbers_compile_once_for_each_value() -> None:
    traced = []

    def run(width, kind, scale):
        traced.append((width, kind))
        ones = jnp.ones(width) if kind == "ones" else jnp.arange(float(width))
        return {"total": ones.sum() * scale}

    axes = {"width": [2, 3], "kind": ["ones", "range"], "scale": [1.0, 10.0]}
    result = jt.sweep(run, axes, static_argnames=["width"], at_once=2)
    assert set(traced) == {(2, "ones"), (2, "range"), (3, "ones"), (3, "range")}
    assert result["total"].tolist() == [[[2, 20], [1, 10]], [[3, 30], [3, 30]]]


class AlwaysEqual:
    """An object that claims to equal all others."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


def test_static_values_that_only_compare_equal_are_runs_of_their_own() -> None:
    values = [0, False, 0.0, -0.0, AlwaysEqual(), AlwaysEqual()]

    def run(value):
        return {"at": jnp.float32([each is value for each in values].index(True))}

    result = jt.sweep(run, {"value": values}, static_argnames="value")
    assert result["at"].tolist() == list(range(len(values)))


def scaled(factor):
    return lambda outputs, targets: factor * jt.losses.mean_squared_error(outputs, targets)


class Network(nnx.Module):
    """An NNX module, whose weights depend on its seed."""

    def __init__(self, seed: int) -> None:
        self.layer = nnx.Linear(2, 1, rngs=nnx.Rngs(seed))

    def __call__(self, inputs):
        return self.layer(inputs)


MLP = functools.partial(eqx.nn.MLP, 2, 1, depth=1, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "values", "labels"),
    [
        (
            "model",
            [nn.Dense(1), jt.models.FeedForward((1,), 0.0, 0.0, 1.0), MLP(width_size=2)],
            ["Dense", "FeedForward", "MLP"],
        ),
        ("model", [Network(0), Network(1)], ["Network 1", "Network 2"]),
        (
            "model",
            [MLP(width_size=2), MLP(width_size=3)],
            ["MLP(width_size=2)", "MLP(width_size=3)"],
        ),
        (
            "loss_fn",
            [jt.losses.mean_squared_error, scaled(2), scaled(3)],
            ["mean_squared_error", "<lambda> 1", "<lambda> 2"],
        ),
        (
            "make_optimizer",
            [optax.adam, functools.partial(optax.sgd, momentum=0.9)],
            ["adam", "sgd(momentum=0.9)"],
        ),
    ],
)
def test_an_axis_may_have_modules_or_functions(name, values, labels, tmp_path) -> None:
    data = jt.Dataset(jnp.array([[1.0, 0.0], [0.5, -1.0]]), jnp.ones((2, 1)))

    def run(rate, **options):
        arguments = {"model": nn.Dense(1), "loss_fn": jt.losses.mean_squared_error}
        arguments |= {"make_optimizer": optax.sgd, **options}
        optimizer = arguments["make_optimizer"](rate)
        key = jax.random.key(0)
        state = jt.init_state(arguments["model"], optimizer, data.inputs, key=key)
        state, _ = jt.train_step(state, data, arguments["loss_fn"])
        return state, {"test_loss": jt.eval_step(state, data, arguments["loss_fn"])["loss"]}

    result = jt.sweep(run, {name: values, "rate": [0.01, 0.1]}, at_once=1)
    assert result.table(["test_loss"], over="rate").frame[name].tolist() == labels
    assert result.to_pandas()[name].tolist() == [each for each in labels for _ in range(2)]
    _, expected = run(jnp.float32(0.1), **{name: values[-1]})
    np.testing.assert_allclose(result["test_loss"][-1, -1], expected["test_loss"], rtol=1e-5)
    assert result.run(-1).configuration == {name: values[-1], "rate": 0.1}
    result.save(tmp_path / "sweep.safetensors")
    loaded = jt.load_sweep(tmp_path / "sweep.safetensors")
    assert str(loaded.table()) == str(result.table())
    assert loaded.axes[name] == tuple(labels)


def test_zipped_axes_are_paired() -> None:
    result = jt.sweep(line, {"slope": [1, 2, 3], "offset": [0.0, 10.0, 20.0]}, zipped=True)
    assert result["loss"].shape == (3, 4)
    assert result["loss"][:, 0].tolist() == [1, 12, 23]
    assert result.configurations[1] == {"slope": 2, "offset": 10.0}


def test_any_pytree_may_be_returned() -> None:
    def run(slope):
        return (slope, {"a": slope + 1}, jax.random.key(slope))

    first, second, key = jt.sweep(run, {"slope": [3, 4]}).outputs
    assert first.tolist() == [3, 4]
    assert second["a"].tolist() == [4, 5]
    assert key[1] == jax.random.key(4)
    assert jt.sweep(lambda seed: seed * 2, {"seed": [1, 2]}).outputs.tolist() == [2, 4]


def sizes(events: list) -> list[int]:
    return [event.at_once for event in events if event.kind == "trained"]


@pytest.mark.parametrize(
    ("at_once", "expected"), [(1, [1] * 10), (4, [4, 4, 4]), (5, [5, 5]), (100, [10])]
)
def test_runs_are_trained_in_batches_of_equal_size(at_once, expected) -> None:
    events = []
    jt.sweep(line, {"slope": range(10)}, at_once=at_once, callbacks=[events.append])
    assert sizes(events) == expected
    assert (events[-1].done, events[-1].total) == (10, 10)


@pytest.mark.parametrize(
    ("runs", "seconds", "compile_seconds", "expected"),
    [
        # A larger batch saves no time: 8, 2 and 2 seconds per run.
        (97, {1: 8.0, 8: 16.0, 64: 128.0}, 0.0, [1, 8, 64, 8, 8, 8]),
        # A program for the last runs is compiled only where that pays.
        (18, {1: 8.0, 8: 16.0, 5: 10.0}, 6.0, [1, 8, 5, 5]),
        (18, {1: 8.0, 8: 16.0, 5: 10.0}, 24.0, [1, 8, 8, 8]),
        # So little work is left that a larger program does not pay.
        (4, {1: 8.0}, 99.0, [1, 1, 1, 1]),
    ],
)
def test_auto_trains_as_many_at_once_as_pay_off(
    monkeypatch, runs, seconds, compile_seconds, expected
) -> None:
    clock = [0.0]
    train, compile_ = _program.Program.train, _program.Program.compile

    def slow(self, positions, size):
        clock[0] += seconds[size]
        return train(self, positions, size)

    def compile_in(self, size):
        compile_(self, size)
        return compile_seconds

    monkeypatch.setattr(_program.Program, "train", slow)
    monkeypatch.setattr(_program.Program, "compile", compile_in)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    events = []
    jt.sweep(line, {"slope": range(runs)}, callbacks=[events.append])
    assert sizes(events) == expected


@pytest.mark.parametrize("by", ["estimate", "compiler"])
def test_auto_takes_only_what_fits_in_memory(monkeypatch, by) -> None:
    compile_ = _program.Program._compile

    def limited(self, size):
        if size > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return compile_(self, size)

    if by == "estimate":
        monkeypatch.setattr(_program.Program, "fits", lambda self, size: size <= 8)
    else:
        monkeypatch.setattr(_program.Program, "_compile", limited)
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)  # a second per call
    events = []
    jt.sweep(line, {"slope": range(73)}, callbacks=[events.append])
    assert sizes(events) == [1] + 9 * [8]


def test_callbacks_are_told_of_the_start_and_of_the_end() -> None:
    calls = []

    class Recorder(jt.callbacks.Callback):
        def on_runs(self, progress):
            calls.append(progress)

        def on_runs_end(self, error):
            calls.append(error)

    jt.sweep(line, {"slope": range(3)}, at_once=2, callbacks=[Recorder()])
    assert calls[0] == jt.callbacks.SweepProgress(0, 3, kind="started")
    assert [(each.done, each.at_once) for each in calls[1:-1]] == [(2, 2), (3, 2)]
    assert calls[-1] is None

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jt.sweep(line, {"slope": range(3)}, callbacks=[Recorder(), stop])
    assert isinstance(calls[-1], KeyboardInterrupt)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch) -> None:
    train = _program.Program.train

    def limited(self, positions, size):
        if size > 3:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory")
        return train(self, positions, size)

    monkeypatch.setattr(_program.Program, "train", limited)
    events = []
    result = jt.sweep(line, {"slope": range(9)}, at_once=9, callbacks=[events.append])
    assert [event.at_once for event in events if event.kind == "halved"] == [4, 2]
    assert result["loss"][:, 0].tolist() == list(range(9))


@pytest.mark.parametrize("kind", [MemoryError, jax.errors.JaxRuntimeError])
def test_a_run_that_alone_does_not_fit_is_an_error(monkeypatch, kind) -> None:
    def full(self, positions, size):
        raise kind("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(_program.Program, "train", full)
    with pytest.raises(MemoryError, match="a single run does not fit in memory; use a smaller"):
        jt.sweep(line, {"slope": range(4)}, at_once=2)


@wrong_types
@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({}, {}, "axes is empty; expected a dict of at least one axis"),
        ([1, 2], {}, r"axes is \[1, 2\]; expected a dict"),
        ({"slope": []}, {}, "the axis slope is empty; expected at least one value"),
        ({"slope": 0.1}, {}, "the axis slope is 0.1; expected a sequence"),
        ({"slope": "abc"}, {}, "the axis slope is 'abc'; expected a sequence"),
        ({"slope": np.ones((2, 2))}, {}, "the axis slope is .*; expected a sequence"),
        ({"slope": [0.1, "a"]}, {}, "the axis slope mixes 0.1 and 'a'; expected values of one"),
        ({"slope": [0.1, None]}, {}, "the axis slope mixes 0.1 and None"),
        ({"slope": [1, float("nan")]}, {}, "the axis slope has nan; expected numbers"),
        (
            {"slope": [2**40]},
            {},
            "the axis slope has 1099511627776; expected integers from -2147483648",
        ),
        ({"slope": [1e300]}, {}, r"the axis slope has 1e\+300, which float32 cannot hold"),
        ({"slope": [1e-60, 1.0]}, {}, "the axis slope has 1e-60, which float32 cannot hold"),
        ({"seed": [0, 0.5]}, {}, "the axis seed has 0.5; expected integers"),
        ({"rate": [1]}, {}, r"the axes are rate, but run takes \(slope, offset=0.0\)"),
        ({"offset": [1]}, {}, "missing a required argument: 'slope'"),
        ({"slope": [1]}, {"static_argnames": ["width"]}, "static_argnames has 'width'; expected"),
        ({"slope": [np.ones(2)]}, {}, "the axis slope has arrays; expected numbers"),
        (
            {"slope": [1]},
            {"callbacks": [3]},
            "callbacks has 3; expected what jaxtrain.callbacks returns",
        ),
        ({"slope": [1]}, {"callbacks": print}, "callbacks is <built-in .*; expected a list"),
        (
            {"slope": [1]},
            {"callbacks": [jt.callbacks.early_stopping(2)]},
            "callbacks has the callback EarlyStopping, which a sweep does not call",
        ),
        ({"slope": [1]}, {"at_once": 0}, "at_once is 0; expected an integer of at least 1"),
        (
            {"slope": [1], "offset": [1, 2]},
            {"zipped": True},
            "the axes differ in length: slope has 1, offset has 2 values",
        ),
    ],
)
def test_bad_grids_are_named(axes, options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.sweep(line, axes, **options)


@pytest.mark.parametrize(
    ("run", "axes", "message"),
    [
        pytest.param(
            *(3, {"slope": [1]}, r"run is 3; expected a function, run\(slope\)"), marks=wrong_types
        ),
        (
            lambda width: {"sum": jnp.ones(width).sum()},
            {"width": [1, 2]},
            r"traced \(.+\); .*jt\.train .* without float\(\).*width.*static_argnames",
        ),
        (
            lambda slope: {"x": slope if slope > 1 else 1},
            {"slope": [1, 2]},
            r"traced \(.+\); .*slope.*static_argnames",
        ),
        (lambda slope: {"x": float(slope)}, {"slope": [1, 2]}, r"traced \(.+\)"),
        (
            lambda slope: {"x": slope, "name": "a"},
            {"slope": [1, 2]},
            "run returns 'a'; expected arrays or numbers",
        ),
        (
            lambda name: {name: 1.0},
            {"name": ["a", "b"]},
            "run returns the columns b with name b, but the columns a",
        ),
    ],
)
def test_a_run_that_cannot_be_swept_is_named(run, axes, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.sweep(run, axes)


def test_a_run_that_calls_fit_is_pointed_to_train(small_state, small_classes) -> None:
    def run(seed):
        return jt.fit(small_state, small_classes, loss_fn=LOSS, key=jax.random.key(seed))

    with pytest.raises(jt.errors.InputError, match=r"call jaxtrain\.train"):
        jt.sweep(run, {"seed": range(2)})


def test_a_column_of_different_shapes_is_refused_when_it_is_read() -> None:
    result = jt.sweep(
        lambda width: {"all": jnp.ones(width), "sum": jnp.ones(width).sum()},
        {"width": [1, 2]},
        static_argnames="width",
    )
    assert result["sum"].tolist() == [1, 2]
    with pytest.raises(
        jt.errors.InputError, match=r"'all' has the shapes \(1,\), \(2,\) in different"
    ):
        result["all"]
    result = jt.sweep(lambda kind: ([1.0] * len(kind), {"loss": 2.0}), {"kind": ["a", "bc"]})
    assert result["loss"].tolist() == [2, 2]
    with pytest.raises(jt.errors.InputError, match="return different numbers of arrays"):
        _ = result.outputs
