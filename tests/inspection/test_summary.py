"""summary: layers, parameters, FLOPs and memory, against counts by hand, for every framework."""

from __future__ import annotations

import threading
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from benchmarks.flops import step_work
from jaxtrain import adapters
from jaxtrain.inspect._flops import count_flops

eqx = pytest.importorskip("equinox")

KEY = jax.random.key(0)
BATCH = 32
IMAGES = np.zeros((BATCH, 28, 28, 1), np.float32)


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
        self.head = nnx.Linear(13 * 13 * 16, 10, rngs=rngs)

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
        self.head = eqx.nn.Linear(13 * 13 * 16, 10, key=keys[2])

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        x, state = self.norm(self.first(x), state)
        x = self.second(jax.nn.relu(x))
        return self.head(self.drop(x.reshape(-1), key=key)), state


class Lstm(nn.Module):
    """An LSTM over the rows of an image."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(16), name="rnn")(x[..., 0])[:, -1])


def state_of(model: Any, inputs: Any, optimizer: Any = None) -> jt.TrainState:
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return jt.init_state(model, optimizer, inputs[:1], key=KEY)


def dense_flops(inputs: int, outputs: int) -> int:
    return 2 * BATCH * inputs * outputs + BATCH * outputs


def conv_flops(height: int, width: int, taps: int, outputs: int) -> int:
    return 2 * BATCH * height * width * taps * outputs + BATCH * height * width * outputs


CONV_FLOPS = {
    "first": conv_flops(28, 28, 9, 8),
    "second": conv_flops(13, 13, 9 * 8, 16),
    "head": dense_flops(13 * 13 * 16, 10),
}
CNN_PARAMETERS = {"first": 80, "norm": 16, "second": 1168, "drop": 0, "head": 27050}


def traced_flops(state: jt.TrainState, inputs: Any) -> float:
    """Counts the forward pass as one program, without layers."""
    program = jax.make_jaxpr(
        lambda params, x: state.model.apply(params, state.model_state, x, train=True, key=KEY)
    )(state.params, inputs)
    return sum(count_flops(program).values())


def check_totals(state: jt.TrainState, inputs: Any, found: jt.Summary) -> None:
    """The columns add up to the totals, and memory covers the parameters."""
    leaves = jax.tree.leaves(state.params)
    assert found.parameters == sum(leaf.size for leaf in leaves)
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    assert found.parameter_bytes == sum(leaf.nbytes for leaf in leaves)
    assert found.forward_flops == sum(layer.flops for layer in found.layers)
    assert found.forward_flops == traced_flops(state, inputs)
    assert found.step_flops > 1.5 * found.forward_flops
    assert found.memory is not None
    assert found.memory.arguments >= found.parameter_bytes
    assert found.memory.outputs >= found.parameter_bytes
    assert found.memory.temporaries > 0
    # The old state stays usable, so that none of the memory is shared.
    assert found.memory.total == sum(found.memory[:3])


@pytest.mark.parametrize("half", [False, True])
def test_the_feed_forward_network_has_the_counts_of_its_formula(half: bool) -> None:
    model: Any = jt.models.FeedForward()
    state = state_of(jt.mixed_precision(model) if half else model, IMAGES)
    found = jt.summary(state, IMAGES)
    check_totals(state, IMAGES, found)
    assert found.parameters == 242_762
    widths = {"Dense_0": (784, 256), "Dense_1": (256, 128), "Dense_2": (128, 64)}
    layers = {layer.path: layer for layer in found.layers}
    for name, (inputs, outputs) in (widths | {"Dense_3": (64, 10)}).items():
        assert layers[name].parameters == (inputs + 1) * outputs
        assert layers[name].flops == dense_flops(inputs, outputs)
        assert layers[name].inputs[0].shape == (BATCH, inputs)
        assert layers[name].outputs[0].shape == (BATCH, outputs)
        assert layers[name].outputs[0].dtype == ("bfloat16" if half else "float32")
    # Matrix products are all but a few percent: biases, dropout and the update are the rest.
    products = step_work((256, 128, 64, 10), BATCH).flops
    assert products < found.step_flops < 1.06 * products


def test_the_optimizer_is_part_of_the_step() -> None:
    plain, adam = (
        jt.summary(state_of(jt.models.FeedForward(), IMAGES, optimizer), IMAGES)
        for optimizer in (optax.sgd(0.1), optax.adam(0.1))
    )
    assert adam.step_flops - plain.step_flops > 10 * plain.parameters
    assert adam.optimizer_bytes >= 2 * adam.parameter_bytes
    assert adam.memory.arguments - plain.memory.arguments >= 2 * adam.parameter_bytes


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
def test_a_cnn_has_the_counts_of_its_formula(framework: str) -> None:
    images = IMAGES.transpose(0, 3, 1, 2) if framework == "equinox" else IMAGES
    model: Any = {
        "linen": Cnn,
        "nnx": lambda: NnxCnn(nnx.Rngs(0)),
        "equinox": lambda: eqx.nn.make_with_state(EqxCnn)(KEY),
    }[framework]()
    state = state_of(model, images)
    found = jt.summary(state, images)
    check_totals(state, images, found)
    root, *layers = found.layers
    assert root.path == ""
    assert root.parameters == 0
    assert {layer.path: layer.parameters for layer in layers} == CNN_PARAMETERS
    flops = {layer.path: layer.flops for layer in layers}
    assert {name: flops[name] for name in CONV_FLOPS} == CONV_FLOPS
    # Equinox modules are written for one example.
    batch = () if framework == "equinox" else (BATCH,)
    second = next(layer for layer in layers if layer.path == "second")
    assert second.type in ("Conv", "Conv2d")
    channels_last = framework != "equinox"
    assert second.outputs[0].shape == (*batch, *((13, 13, 16) if channels_last else (16, 13, 13)))
    assert found.model_state_bytes >= 2 * 8 * 4


def test_the_gradients_of_convolutions_cost_twice_the_forward_pass() -> None:
    state = state_of(Cnn(), IMAGES)
    found = jt.summary(state, IMAGES)
    first, second, head = CONV_FLOPS.values()
    # The first layer needs no gradient of its inputs. Batch norm and padding are the tolerance.
    products = 2 * first + 3 * second + 3 * head
    assert products < found.step_flops < 1.35 * products


def test_an_lstm_counts_every_step_of_its_loop() -> None:
    state = state_of(Lstm(), IMAGES)
    found = jt.summary(state, IMAGES)
    check_totals(state, IMAGES, found)
    assert found.parameters == (28 + 16 + 1) * 4 * 16 + 170
    products = 28 * 2 * BATCH * (28 + 16) * 4 * 16
    inside = sum(layer.flops for layer in found.layers if "LSTM" in layer.path)
    assert products < inside < 1.1 * products


def test_an_nnx_loop_is_part_of_the_layer_around_it() -> None:
    class Rows(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.rnn = nnx.RNN(nnx.LSTMCell(28, 16, rngs=rngs))
            self.head = nnx.Linear(16, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.rnn(x[..., 0])[:, -1])

    state = state_of(Rows(nnx.Rngs(0)), IMAGES)
    found = jt.summary(state, IMAGES)
    check_totals(state, IMAGES, found)
    assert [(layer.path, layer.parameters) for layer in found.layers] == [
        *(("", 0), ("rnn", (28 + 16 + 1) * 4 * 16), ("head", 170))
    ]
    assert found.layers[1].flops > 28 * 2 * BATCH * (28 + 16) * 4 * 16


def test_a_shared_layer_is_one_row_that_counts_both_calls() -> None:
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

    inputs = np.zeros((BATCH, 6), np.float32)
    for model in (Twice(), NnxTwice()):
        found = jt.summary(state_of(model, inputs), inputs)
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


def test_linen_layers_made_in_setup_have_their_inputs_and_outputs() -> None:
    inputs = np.zeros((BATCH, 6), np.float32)
    found = jt.summary(state_of(Classifier(), inputs), inputs)
    assert [
        (layer.path, layer.type, layer.inputs[0].shape[1], layer.outputs[0].shape[1])
        for layer in found.layers
    ] == [
        ("", "Classifier", 6, 3),
        ("encoder", "Encoder", 6, 5),
        ("encoder/dense", "Dense", 6, 5),
        ("head", "Dense", 5, 3),
    ]
    assert found.layers[2].flops == dense_flops(6, 5)


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
def test_a_network_that_runs_in_another_thread_is_not_recorded(framework: str) -> None:
    model: Any = {
        "linen": lambda: nn.Sequential([nn.Dense(5), nn.Dense(3)]),
        "nnx": lambda: nnx.Sequential(
            nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        ),
        "equinox": lambda: eqx.nn.MLP(6, 3, 5, 1, key=KEY),
    }[framework]()
    inputs = np.zeros((BATCH, 6), np.float32)
    state = state_of(model, inputs)

    def run() -> None:
        state.model.apply(state.params, state.model_state, inputs, train=False, key=None)

    with adapters.recording(state.model, state.params, state.model_state) as recorder:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert recorder.calls == []
        run()
    assert len(recorder.calls) == 3


def test_the_state_of_equinox_layers_is_not_an_input() -> None:
    images = IMAGES.transpose(0, 3, 1, 2)
    state = jt.init_state(
        eqx.nn.make_with_state(EqxCnn)(KEY), jt.optimizers.sgd(0.1), images[:1], key=KEY
    )
    norm = next(layer for layer in jt.summary(state, images).layers if layer.type == "BatchNorm")
    assert (len(norm.inputs), len(norm.outputs)) == (1, 1)


def test_nested_equinox_layers_have_their_paths() -> None:
    inputs = np.zeros((BATCH, 6), np.float32)
    found = jt.summary(state_of(eqx.nn.MLP(6, 3, 5, 1, key=KEY), inputs), inputs)
    names = [(layer.path, layer.type, layer.parameters) for layer in found.layers]
    assert names == [("", "MLP", 0), ("layers/0", "Linear", 35), ("layers/1", "Linear", 18)]
    assert found.layers[2].flops == dense_flops(5, 3)


def test_plain_functions_are_one_row() -> None:
    model = jt.Model(
        lambda key, x: ({"w": jnp.zeros((4, 2)), "b": jnp.zeros((1, 2))}, {}),
        lambda params, state, x, *, train, key: (
            x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 2)),
            state,
        ),
    )
    inputs = np.zeros((BATCH, 4), np.float32)
    found = jt.summary(state_of(model, inputs), inputs)
    check_totals(state_of(model, inputs), inputs, found)
    assert [(layer.type, layer.parameters) for layer in found.layers] == [("Model", 10)]
    assert found.forward_flops == dense_flops(4, 2)


def test_unknown_flops_are_none() -> None:
    def apply(params: Any, state: Any, x: Any, *, train: bool, key: Any) -> Any:
        halve = jax.lax.while_loop(
            lambda v: jnp.max(v) > 1, lambda v: v / 2, jax.lax.stop_gradient(x)
        )
        return halve * params, state

    inputs = np.zeros((BATCH, 4), np.float32)
    found = jt.summary(state_of(jt.Model(lambda key, x: (jnp.ones(()), {}), apply), inputs), inputs)
    assert found.layers[0].flops is found.forward_flops is found.step_flops is None
    assert "unknown" in str(found)


def test_shapes_suffice_and_a_loss_may_be_given() -> None:
    state = state_of(jt.models.FeedForward(), IMAGES)
    shapes = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    assert jt.summary(state, shapes) == jt.summary(state, IMAGES)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    with_loss = jt.summary(state, shapes, labels, loss_fn=jt.losses.cross_entropy)
    assert with_loss.layers == jt.summary(state, shapes).layers
    assert with_loss.step_flops > jt.summary(state, shapes).step_flops


def test_nothing_changes_and_training_after_it_has_the_same_bits() -> None:
    call = nnx.Linear.__call__, eqx.nn.Linear.__call__
    data = jt.Dataset(IMAGES, np.zeros(BATCH, np.int32))
    state = state_of(NnxCnn(nnx.Rngs(0)), IMAGES)
    before, _ = jt.train_step(state, data, jt.losses.cross_entropy)
    jt.summary(state, IMAGES)
    jt.summary(state_of(eqx.nn.MLP(6, 3, 5, 1, key=KEY), np.zeros((1, 6))), np.zeros((1, 6)))
    assert call == (nnx.Linear.__call__, eqx.nn.Linear.__call__)
    jax.clear_caches()
    after, _ = jt.train_step(state, data, jt.losses.cross_entropy)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True)
    )


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = jt.summary(state_of(Cnn(), IMAGES), IMAGES)
    print(found)
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if "head" in line)
    assert [cell.strip() for cell in head.split("│")[1:-1]] == [
        *("head", "Dense", "float32[32,2704]", "float32[32,10]", "27,050", "1.73 M"),
    ]
    assert lines[-2].startswith("parameters: 28,314 (111 KiB), model state: 64 bytes")
    assert lines[-1].startswith("a step on 32 examples: ")
    assert repr(found) == str(found)
    rich = pytest.importorskip("rich.console")
    rich.Console(width=200).print(found)
    assert "27,050" in capsys.readouterr().out


def test_the_figures_under_a_mesh_are_those_of_one_device() -> None:
    state = state_of(jt.models.FeedForward(), IMAGES)
    alone = jt.summary(state, IMAGES)
    mesh = jax.make_mesh((2,), ("data",))
    placed = jt.parallel.replicate(state, mesh)
    assert jt.summary(placed, IMAGES) == alone
    with jax.set_mesh(mesh):
        assert jt.summary(placed, IMAGES) == alone


def test_wrong_arguments_are_named() -> None:
    state = state_of(jt.models.FeedForward(), IMAGES)
    with pytest.raises(jt.errors.InputError, match="the model does not take the inputs"):
        jt.summary(state, np.zeros((BATCH, 5), np.float32))
    with pytest.raises(jt.errors.InputError, match="inputs is a Dataset"):
        jt.summary(state, jt.Dataset(IMAGES))
    with pytest.raises(jt.errors.InputError, match="expected at least one example"):
        jt.summary(state, np.zeros((0, 28, 28), np.float32))
    with pytest.raises(jt.errors.InputError, match="targets is given without loss_fn"):
        jt.summary(state, IMAGES, np.zeros(BATCH, np.int32))


def test_outputs_that_are_not_floats_need_a_loss() -> None:
    model = jt.Model(
        lambda key, x: (jnp.ones((1, 4)), {}),
        lambda params, state, x, *, train, key: (jnp.argmax(x * params, -1), state),
    )
    inputs = np.zeros((BATCH, 4), np.float32)
    state = state_of(model, inputs)
    with pytest.raises(jt.errors.InputError) as raised:
        jt.summary(state, inputs)
    assert str(raised.value) == (
        "the outputs of the model are int32[32]; expected floating-point outputs, or the loss of "
        "the model as loss_fn"
    )


@pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the types are checked at run time"
)
def test_arguments_of_wrong_types_are_named() -> None:
    with pytest.raises(jt.errors.InputError, match=r"state is a .*FeedForward; expected a"):
        jt.summary(jt.models.FeedForward(), IMAGES)
    with pytest.raises(jt.errors.InputError, match="targets is None"):
        jt.summary(
            state_of(jt.models.FeedForward(), IMAGES), IMAGES, loss_fn=jt.losses.cross_entropy
        )


def test_an_error_in_the_network_leaves_the_classes_as_they_were() -> None:
    state = state_of(NnxCnn(nnx.Rngs(0)), IMAGES)
    call = nnx.Linear.__call__
    with pytest.raises(jt.errors.InputError, match="the model does not take the inputs"):
        jt.summary(state, np.zeros((BATCH, 5, 5, 1), np.float32))
    assert nnx.Linear.__call__ is call
