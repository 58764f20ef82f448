"""summary: layers, parameters, FLOPs and memory, against counts by hand, for every framework."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from jaxtrain import adapters
from jaxtrain.inspect import Summary

KEY = jax.random.key(0)
BATCH = 8
IMAGES = np.zeros((BATCH, 12, 12, 1), np.float32)
ROWS = np.zeros((BATCH, 6), np.float32)
SGD = optax.sgd(0.1)


class Cnn(nn.Module):
    """A CNN with batch norm and dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(16, (3, 3), strides=2, padding="VALID", name="second")(x)
        x = jt.models.Dropout(0.5, name="drop")(x.reshape(len(x), -1), train)
        return nn.Dense(10, name="head")(x)


class NnxCnn(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5 * 5 * 16, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.second(nnx.relu(self.norm(self.first(x))))
        return self.head(self.drop(x.reshape(len(x), -1)))


class EqxCnn(eqx.Module):
    """The same in Equinox, whose images are [channels, height, width]."""

    first: Any
    norm: Any
    second: Any
    drop: Any
    head: Any

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 8, 3, padding="SAME", key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.second = eqx.nn.Conv2d(8, 16, 3, stride=2, key=keys[1])
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(5 * 5 * 16, 10, key=keys[2])

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        x, state = self.norm(self.first(x), state)
        x = self.second(jax.nn.relu(x))
        return self.head(self.drop(x.reshape(-1), key=key)), state


class NnxRows(nnx.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(12, 16, rngs=rngs))
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.rnn(x[..., 0])[:, -1])


class Lstm(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(16), name="rnn")(x[..., 0])[:, -1])


def state_of(model: Any, inputs: Any = IMAGES, optimizer: Any = SGD) -> jt.TrainState:
    return jt.init_state(model, optimizer, inputs[:1], key=KEY)


def dense_flops(inputs: int, outputs: int) -> int:
    return 2 * BATCH * inputs * outputs + BATCH * outputs


def conv_flops(size: int, taps: int, outputs: int) -> int:
    return (2 * taps + 1) * BATCH * size * size * outputs


CNN_FLOPS = {
    "first": conv_flops(12, 9, 8),
    "second": conv_flops(5, 9 * 8, 16),
    "head": dense_flops(5 * 5 * 16, 10),
}
CNN_PARAMETERS = {"first": 80, "norm": 16, "second": 1168, "drop": 0, "head": 4010}


def check_totals(state: jt.TrainState, found: Summary) -> None:
    """The columns add up to the totals, and memory covers the parameters."""
    leaves = jax.tree.leaves(state.params)
    assert found.parameters == sum(leaf.size for leaf in leaves)
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    assert found.parameter_bytes == sum(leaf.nbytes for leaf in leaves)
    assert found.forward_flops == sum(layer.flops for layer in found.layers)
    assert found.step_flops > 1.5 * found.forward_flops
    assert min(found.memory.arguments, found.memory.outputs) >= found.parameter_bytes
    # The old state stays usable, so that none of the memory is shared.
    assert found.memory.total == sum(found.memory[:3]) > sum(found.memory[:2])


@pytest.mark.parametrize("half", [False, True])
def test_the_feed_forward_network_has_the_counts_of_its_formula(half: bool) -> None:
    images = np.zeros((32, 28, 28), np.float32)
    model: Any = jt.models.FeedForward()
    state = state_of(jt.mixed_precision(model) if half else model, images)
    found = jt.summary(state, images)
    check_totals(state, found)
    assert (found.parameters, found.batch_size) == (242_762, 32)
    layers = {layer.path: layer for layer in found.layers}
    widths = (784, 256, 128, 64, 10)
    products = 0
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layer, product = layers[f"Dense_{number}"], 2 * 32 * inputs * outputs
        assert layer.parameters == (inputs + 1) * outputs
        assert layer.flops == product + 32 * outputs
        assert layer.inputs[0].shape == (32, inputs)
        assert layer.outputs[0].shape == (32, outputs)
        assert layer.outputs[0].dtype == ("bfloat16" if half else "float32")
        # The first layer needs no gradient of its inputs.
        products += (3 if number else 2) * product
    # Biases, dropout and the update are the rest.
    assert products < found.step_flops < 1.06 * products


@pytest.mark.parametrize("framework", ["Linen", "NNX", "Equinox"])
def test_a_cnn_has_the_counts_of_its_formula(framework: str) -> None:
    is_equinox = framework == "Equinox"
    images = IMAGES.transpose(0, 3, 1, 2) if is_equinox else IMAGES
    model: Any = {
        "Linen": Cnn,
        "NNX": lambda: NnxCnn(nnx.Rngs(0)),
        "Equinox": lambda: eqx.nn.make_with_state(EqxCnn)(KEY),
    }[framework]()
    state = state_of(model, images)
    found = jt.summary(state, images)
    check_totals(state, found)
    root, *layers = found.layers
    assert (root.path, root.parameters) == ("", 0)
    assert {layer.path: layer.parameters for layer in layers} == CNN_PARAMETERS
    flops = {layer.path: layer.flops for layer in layers}
    assert {name: flops[name] for name in CNN_FLOPS} == CNN_FLOPS
    by_path = {layer.path: layer for layer in layers}
    # Equinox modules are written for one example, and their state is not an input.
    assert by_path["second"].outputs[0].shape == ((16, 5, 5) if is_equinox else (BATCH, 5, 5, 16))
    assert (len(by_path["norm"].inputs), len(by_path["norm"].outputs)) == (1, 1)
    assert found.model_state_bytes >= 2 * 8 * 4
    # A convolution's gradients cost twice the forward pass; batch norm and padding are the rest.
    first, second, head = CNN_FLOPS.values()
    products = 2 * first + 3 * second + 3 * head
    assert products < found.step_flops < 1.6 * products


def test_the_optimizer_is_part_of_the_step() -> None:
    plain, adam = (
        jt.summary(state_of(nn.Dense(50), ROWS, optimizer), ROWS)
        for optimizer in (SGD, optax.adam(0.1))
    )
    assert adam.step_flops - plain.step_flops > 10 * plain.parameters
    assert adam.optimizer_bytes >= 2 * adam.parameter_bytes
    assert adam.memory.arguments - plain.memory.arguments >= 2 * adam.parameter_bytes


@pytest.mark.parametrize("make", [Lstm, lambda: NnxRows(nnx.Rngs(0))], ids=["Linen", "NNX"])
def test_a_loop_counts_every_step(make: Any) -> None:
    """In NNX, the cell is part of the layer around it."""
    state = state_of(make())
    found = jt.summary(state, IMAGES)
    check_totals(state, found)
    assert found.parameters == (12 + 16 + 1) * 4 * 16 + 170
    products = 12 * 2 * BATCH * (12 + 16) * 4 * 16
    inside = [layer for layer in found.layers if layer.path.startswith(("rnn", "Optimized"))]
    assert products < sum(layer.flops for layer in inside) < 1.15 * products
    assert sum(layer.parameters for layer in inside) == (12 + 16 + 1) * 4 * 16


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(6, name="shared")
        return layer(layer(x))


class NnxTwice(nnx.Module):
    def __init__(self) -> None:
        self.shared = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.same = self.shared

    def __call__(self, x: Any) -> Any:
        return self.same(self.shared(x))


@pytest.mark.parametrize("make", [Twice, NnxTwice])
def test_a_shared_layer_is_one_row_that_counts_both_calls(make: Any) -> None:
    found = jt.summary(state_of(make(), ROWS), ROWS)
    assert len(found.layers) == 2
    assert found.layers[1].parameters == found.parameters == 42
    assert found.layers[1].flops == 2 * dense_flops(6, 6)


class Encoder(nn.Module):
    """Makes its layers in `setup`; only its method `encode` is called."""

    def setup(self) -> None:
        self.dense = nn.Dense(5)

    def encode(self, x: Any) -> Any:
        return nn.relu(self.dense(x))


class Classifier(nn.Module):
    """Makes its layers in `setup`."""

    def setup(self) -> None:
        self.encoder = Encoder()
        self.head = nn.Dense(3)

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder.encode(x))


def test_nested_layers_have_their_paths() -> None:
    def rows(model: Any) -> list[tuple]:
        found = jt.summary(state_of(model, ROWS), ROWS)
        return [
            (x.path, x.type, x.inputs[0].shape[-1], x.outputs[0].shape[-1]) for x in found.layers
        ]

    assert rows(Classifier()) == [
        ("", "Classifier", 6, 3),
        ("encoder", "Encoder", 6, 5),
        ("encoder/dense", "Dense", 6, 5),
        ("head", "Dense", 5, 3),
    ]
    assert rows(eqx.nn.MLP(6, 3, 5, 1, key=KEY)) == [
        ("", "MLP", 6, 3),
        ("layers/0", "Linear", 6, 5),
        ("layers/1", "Linear", 5, 3),
    ]


def test_plain_functions_are_one_row_and_shapes_suffice() -> None:
    model = jt.Model(
        lambda key, x: ({"w": jnp.zeros((6, 2)), "b": jnp.zeros((1, 2))}, {}),
        lambda params, state, x, *, train, key: (
            x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 2)),
            state,
        ),
    )
    state = state_of(model, ROWS)
    found = jt.summary(state, ROWS)
    assert [(layer.type, layer.parameters) for layer in found.layers] == [("Model", 14)]
    assert found.forward_flops == dense_flops(6, 2)
    shapes = jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype)
    assert jt.summary(state, shapes) == found
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    with_loss = jt.summary(state, shapes, labels, loss_fn=jt.losses.cross_entropy)
    assert with_loss.layers == found.layers
    assert with_loss.step_flops > found.step_flops


def test_unknown_flops_are_none() -> None:
    def apply(params: Any, state: Any, x: Any, *, train: bool, key: Any) -> Any:
        x = jax.lax.stop_gradient(x)
        return params * jax.lax.while_loop(lambda v: jnp.max(v) > 1, lambda v: v / 2, x), state

    model = jt.Model(lambda key, x: (jnp.ones(()), {}), apply)
    found = jt.summary(state_of(model, ROWS), ROWS)
    assert found.layers[0].flops is found.forward_flops is found.step_flops is None
    assert "unknown" in str(found)


def test_the_classes_of_layers_are_as_before_also_after_an_error() -> None:
    calls = nnx.Linear.__call__, eqx.nn.Linear.__call__
    with pytest.raises(jt.errors.InputError, match="the model does not take the inputs"):
        jt.summary(state_of(NnxTwice(), ROWS), ROWS[:, :5])
    jt.summary(state_of(eqx.nn.MLP(6, 3, 5, 1, key=KEY), ROWS), ROWS)
    assert (nnx.Linear.__call__, eqx.nn.Linear.__call__) == calls


@pytest.mark.parametrize("make", [Twice, NnxTwice, lambda: eqx.nn.MLP(6, 3, 5, 0, key=KEY)])
def test_a_network_that_runs_in_another_thread_is_not_recorded(make: Any) -> None:
    state = state_of(make(), ROWS)

    def run() -> None:
        state.model.apply(state.params, state.model_state, ROWS, train=False, key=None)

    with adapters.recording(state.model, state.params, state.model_state) as recorder:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert recorder.calls == []
        run()
    assert len(recorder.calls) == 2


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = jt.summary(state_of(Cnn()), IMAGES)
    print(found)
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "head" in line)
    assert [cell.strip() for cell in head.split("│")[1:-1]] == [
        *("head", "Dense", "float32[8,400]", "float32[8,10]", "4,010", "64.1 k"),
    ]
    assert lines[-2].startswith("parameters: 5,274 (20.6 KiB), model state: 64 bytes")
    assert lines[-1].startswith("a step on 8 examples: ")
    assert repr(found) == str(found)


def test_the_figures_under_a_mesh_are_those_of_one_device() -> None:
    state = state_of(nn.Dense(3), ROWS)
    alone, mesh = jt.summary(state, ROWS), jax.make_mesh((2,), ("data",))
    with jax.set_mesh(mesh):
        assert jt.summary(jt.parallel.replicate(state, mesh), ROWS) == alone


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
def test_wrong_arguments_are_named() -> None:
    state, loss = state_of(nn.Dense(3), ROWS), jt.losses.cross_entropy
    integers = jt.Model(
        lambda key, x: (jnp.ones((1, 6)), {}),
        lambda params, state, x, *, train, key: (jnp.argmax(x * params, -1), state),
    )
    for arguments, options, message in (
        ((nn.Dense(3), ROWS), {}, r"state is a .*Dense; expected a"),
        ((state, ROWS[:, :5]), {}, "the model does not take the inputs"),
        ((state, ROWS[:0]), {}, "expected at least one example"),
        ((state, ROWS, np.zeros(BATCH, np.int32)), {}, "targets is given without loss_fn"),
        ((state, ROWS), {"loss_fn": loss}, "targets is None"),
        ((state_of(integers, ROWS), ROWS), {}, r"are int32\[8\]; expected floating-point outputs"),
    ):
        with pytest.raises(jt.errors.InputError, match=message):
            jt.summary(*arguments, **options)
