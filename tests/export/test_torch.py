"""load_torch and to_torch: the outputs and the next steps are those of the model in PyTorch."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from jaxtrain.export import load_torch, to_torch
from jaxtrain.optimizers._inspect import current_learning_rate

torch = pytest.importorskip("torch")
eqx = pytest.importorskip("equinox")

from benchmarks import torch_reference  # noqa: E402
from benchmarks.networks import linen as linen_networks  # noqa: E402
from benchmarks.networks import torch as torch_networks  # noqa: E402

needs_unchecked_types = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="passes values of the wrong type"
)


def state_of(model, inputs, optimizer=None) -> jt.TrainState:
    optimizer = jt.optimizers.sgd(0.1) if optimizer is None else optimizer
    return jt.init_state(model, optimizer, jnp.asarray(inputs[:1]), key=jax.random.key(0))


def randomize(module: Any) -> Any:
    """Sets all parameters and running statistics of a PyTorch module to other values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim < 3 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


def outputs_of(module: Any, inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(inputs)).numpy()


def assert_same_model(module: Any, state: jt.TrainState, inputs: np.ndarray) -> None:
    """Checks that a state has the outputs of a module, and that the module can be restored."""
    expected = outputs_of(module, inputs)
    loaded = load_torch(state, module.state_dict())
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(jt.predict(loaded, jnp.asarray(inputs)), expected, atol=1e-5)
    returned = to_torch(loaded, module.state_dict())
    for name, tensor in module.state_dict().items():
        if "num_batches" not in name and "bias_ih" not in name and "bias_hh" not in name:
            np.testing.assert_array_equal(returned[name], tensor)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.load_state_dict(returned)
    np.testing.assert_allclose(outputs_of(module, inputs), expected, atol=1e-6)


IMAGES = np.random.default_rng(0).normal(size=(4, 28, 28)).astype(np.float32)


def test_t2_trained_in_pytorch_has_the_same_logits_here_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (512, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (512,), generator=generator)
    inputs = (pixels / 255 - 0.1307) / 0.3081
    module = torch_reference.feed_forward((256, 128, 64, 10), 784, 0.2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in range(0, 512, 64):
        optimizer.zero_grad()
        logits = module(inputs[batch : batch + 64])
        torch.nn.functional.cross_entropy(logits, labels[batch : batch + 64]).backward()
        optimizer.step()
    module.eval()
    state = load_torch(state_of(jt.models.FeedForward(), pixels.numpy()), module.state_dict())
    expected = module(inputs).detach().numpy()
    np.testing.assert_allclose(jt.predict(state, pixels.numpy()), expected, atol=1e-5)

    data = jt.Dataset(jnp.asarray(pixels.numpy()), jnp.asarray(labels.numpy()))
    trained, _ = jt.train_epoch(state, data, jt.losses.cross_entropy)
    module.load_state_dict(to_torch(trained, module))
    expected = jt.predict(trained, data.inputs)
    np.testing.assert_allclose(module(inputs).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "model"),
    [
        (torch_networks.ConvNet((0.25, 0.5)), linen_networks.ConvNet((0.25, 0.5))),
        (torch_networks.ResNet(), linen_networks.ResNet()),
        (torch_networks.RowLSTM(), linen_networks.RowLSTM()),
        (torch_networks.ViT(), linen_networks.ViT()),
    ],
    ids=lambda network: type(network).__name__,
)
def test_networks_have_the_same_outputs_in_both_directions(module, model) -> None:
    assert_same_model(randomize(module), state_of(model, IMAGES), IMAGES)


class TorchConvNet(torch.nn.Module):
    """Has batch norm, flattened features, and dense layers of equal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)
        self.conv2, self.bn2 = torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)
        self.fc1, self.fc2 = torch.nn.Linear(64, 8), torch.nn.Linear(8, 8)
        self.fc3 = torch.nn.Linear(8, 8)

    def forward(self, images):
        x = torch.relu(self.bn1(self.conv1(images[:, None])))
        x = torch.relu(self.bn2(self.conv2(x))).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
        x = images[..., None]
        for _ in range(2):
            x = nn.Conv(4, (3, 3), padding="VALID")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(8)(nn.relu(nn.Dense(8)(nn.relu(nn.Dense(8)(x)))))


class NnxConvNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
        self.bn1, self.bn2 = nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), padding="VALID", rngs=rngs)
        self.linears = nnx.List([nnx.Linear(size, 8, rngs=rngs) for size in (64, 8, 8)])

    def __call__(self, images):
        x = nnx.relu(self.bn1(self.conv1(images[..., None])))
        x = nnx.relu(self.bn2(self.conv2(x))).reshape(len(x), -1)
        return self.linears[2](nnx.relu(self.linears[1](nnx.relu(self.linears[0](x)))))


class EquinoxConvNet(eqx.Module):
    convs: list
    norms: list
    linears: list

    def __init__(self, mode: str) -> None:
        key = jax.random.key(0)
        self.convs = [eqx.nn.Conv2d(size, 4, 3, key=key) for size in (1, 4)]
        self.norms = [eqx.nn.BatchNorm(4, "batch", mode=mode) for _ in range(2)]
        self.linears = [eqx.nn.Linear(size, 8, key=key) for size in (64, 8, 8)]

    def __call__(self, image, state):
        x = image[None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
            x = jax.nn.relu(x)
        x = x.reshape(-1)
        for linear in self.linears[:-1]:
            x = jax.nn.relu(linear(x))
        return self.linears[-1](x), state


CONV_NETS = {
    "Linen": LinenConvNet,
    "NNX": NnxConvNet,
    "Equinox": lambda: eqx.nn.make_with_state(EquinoxConvNet)("batch"),
}
SMALL_IMAGES = IMAGES[:, :8, :8].copy()


@pytest.mark.parametrize("framework", CONV_NETS)
def test_every_framework_has_the_outputs_of_a_convolutional_network(framework: str) -> None:
    state = state_of(CONV_NETS[framework](), SMALL_IMAGES)
    assert_same_model(randomize(TorchConvNet()), state, SMALL_IMAGES)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_trained_running_statistics_return_to_pytorch(mode: str) -> None:
    data = jt.Dataset(jnp.asarray(SMALL_IMAGES), jnp.arange(4))
    state = state_of(eqx.nn.make_with_state(EquinoxConvNet)(mode), SMALL_IMAGES)
    state, _ = jt.train_step(state, data, jt.losses.cross_entropy)
    module = TorchConvNet()
    module.load_state_dict(to_torch(state, module))
    expected = jt.predict(state, SMALL_IMAGES)
    np.testing.assert_allclose(outputs_of(module, SMALL_IMAGES), expected, atol=1e-5)


class TorchSequences(torch.nn.Module):
    """An embedding, a layer norm, a deep LSTM and attention, over a sequence of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.start = torch.nn.Parameter(torch.zeros(6))
        self.embedding, self.norm = torch.nn.Embedding(11, 6), torch.nn.LayerNorm(6)
        self.lstm = torch.nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)
        self.output = torch.nn.Linear(6, 3, bias=False)

    def forward(self, tokens):
        x = self.lstm(self.norm(self.embedding(tokens) + self.start))[0]
        return self.output(self.attention(x, x, x)[0])


class LinenSequences(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        start = self.param("start", nn.initializers.normal(), (6,))
        x = nn.Embed(11, 6)(tokens)
        x = nn.LayerNorm(epsilon=1e-5)(x + jnp.broadcast_to(start, x.shape))
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
        x = nn.MultiHeadDotProductAttention(2)(x, x, x)
        return nn.Dense(3, use_bias=False)(x)


class NnxSequences(nnx.Module):
    def __init__(self, cell: type) -> None:
        rngs = nnx.Rngs(0)
        self.start = nnx.Param(jnp.zeros(6))
        self.embedding = nnx.Embed(11, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.lstms = nnx.List([nnx.RNN(cell(6, 6, rngs=rngs), rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.output = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + jnp.broadcast_to(self.start[...], x.shape))
        for lstm in self.lstms:
            x = lstm(x)
        return self.output(self.attention(x))


@pytest.mark.parametrize(
    "model",
    [
        LinenSequences(),
        NnxSequences(nnx.LSTMCell),
    ],
    ids=["Linen", "NNX, one gate at a time"],
)
def test_sequence_layers_have_the_same_outputs(model) -> None:
    tokens = np.random.default_rng(0).integers(0, 11, (4, 5))
    assert_same_model(randomize(TorchSequences()), state_of(model, tokens), tokens)


class EquinoxCell(eqx.Module):
    cell: eqx.nn.LSTMCell
    norm: eqx.nn.LayerNorm

    def __init__(self) -> None:
        self.cell = eqx.nn.LSTMCell(3, 4, key=jax.random.key(0))
        self.norm = eqx.nn.LayerNorm(4)

    def __call__(self, example):
        return self.norm(self.cell(example, (jnp.zeros(4), jnp.zeros(4)))[0])


class TorchCell(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.last = torch.nn.LSTMCell(3, 4), torch.nn.LayerNorm(4)

    def forward(self, inputs):
        return self.last(self.recurrent(inputs)[0])


def test_equinox_cells_have_the_same_outputs() -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert_same_model(randomize(TorchCell()), state_of(EquinoxCell(), inputs), inputs)


def dense(*widths: int, bias: bool = True) -> Any:
    layers = [torch.nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths)]
    return torch.nn.Sequential(*layers)


class Dense(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs):
        for width in self.widths:
            inputs = nn.Dense(width)(inputs)
        return inputs


INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def test_names_with_two_digits_are_in_the_order_of_their_numbers() -> None:
    assert_same_model(randomize(dense(*[4] * 13)), state_of(Dense((4,) * 12), INPUTS), INPUTS)


def test_equal_names_match_before_the_order() -> None:
    class Named(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dense(4, name="first")(nn.Dense(4, name="second")(inputs))

    module = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)})
    module.forward = lambda inputs: module["first"](module["second"](inputs))
    assert_same_model(randomize(module), state_of(Named(), INPUTS), INPUTS)


class Nested(nn.Module):
    """Is called in another order than its layers are named: the outer one is created first."""

    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(4)(nn.tanh(nn.Dense(4)(inputs)))


def test_the_order_of_calls_decides_not_that_of_names() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    state = state_of(Nested(), INPUTS)
    assert_same_model(randomize(module), state, INPUTS)
    loaded = load_torch(state, randomize(module).state_dict())
    expected = module[0].weight.detach().T
    np.testing.assert_array_equal(loaded.params["Dense_1"]["kernel"], expected)


class Branches(nn.Module):
    """Two layers of equal shape, one of which has another layer before it."""

    @nn.compact
    def __call__(self, inputs):
        query = nn.Dense(4, name="query")(nn.Dense(6, name="first")(inputs))
        return query - 2 * nn.Dense(4, name="key")(nn.Dense(6, name="second")(inputs))


class TorchBranches(torch.nn.Module):
    """Creates its layers in another order than `Branches` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.q = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.k, self.two = torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)

    def forward(self, inputs):
        return self.q(self.one(inputs)) - 2 * self.k(self.two(inputs))


def test_an_order_that_is_unknown_needs_a_mapping() -> None:
    module, state = randomize(TorchBranches()), state_of(Branches(), INPUTS)
    message = (
        "the order of the layers does not determine which of one, two in PyTorch is which of "
        "first, second in the model (the orders first differ at k and second); expected a mapping, "
        "such as mapping={'one': 'first'}"
    )
    with pytest.raises(jt.errors.InputError, match=re.escape(message)):
        load_torch(state, module.state_dict())
    pinned = {"one": "first"}
    for mapping in (pinned | {"q": "query", "k": "key", "two": "second"}, pinned | {"k": "key"}):
        loaded = load_torch(state, module.state_dict(), mapping=mapping)
        expected = outputs_of(module, INPUTS)
        np.testing.assert_allclose(jt.predict(loaded, INPUTS), expected, atol=1e-6)
    returned = to_torch(loaded, module, mapping={"one": "first", "q": "query"})
    np.testing.assert_array_equal(returned["q.weight"], module.q.weight.detach())


def test_single_parameters_of_equal_shape_need_a_mapping() -> None:
    class Scales(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            first = self.param("outer", nn.initializers.ones, inputs.shape[1:])
            second = self.param("inner", nn.initializers.ones, inputs.shape[1:])
            return inputs * jnp.broadcast_to(first, inputs.shape) + second[None]

    state = state_of(Scales(), INPUTS)
    tensors = {"scale": torch.arange(4.0), "offset": torch.ones(4)}
    with pytest.raises(
        jt.errors.InputError, match="which of scale, offset in PyTorch is which of outer"
    ):
        load_torch(state, tensors)
    loaded = load_torch(state, tensors, mapping={"scale": "outer"})
    np.testing.assert_array_equal(loaded.params["outer"], np.arange(4))


def test_a_mapping_names_known_layers_of_equal_shapes() -> None:
    module, state = dense(4, 3, 4), state_of(Dense((3, 4)), INPUTS)
    for mapping, message in (
        ({"5": "Dense_0"}, "mapping has the layer '5', which PyTorch does not have; expected one"),
        ({"0": "Dense_7"}, "mapping has the layer 'Dense_7', which the model does not have; exp"),
        ({"0": "Dense_0", "1": "Dense_0"}, "mapping has two layers for 'Dense_0'; expected each"),
        ({"0": "Dense_1"}, "0.weight has the shape [3, 4], not [4, 3] for Dense_1 (it looks tran"),
    ):
        with pytest.raises(jt.errors.InputError, match=re.escape(message)):
            load_torch(state, module.state_dict(), mapping=mapping)


def test_cells_in_one_loop_are_in_the_order_of_their_names() -> None:
    class Stacked(nn.Module):
        """Two cells in one loop over the rows of an image."""

        def setup(self):
            self.cells = [nn.OptimizedLSTMCell(8) for _ in range(2)]

        def __call__(self, images):
            def step(module, carry, outputs):
                carry = list(carry)
                for index, cell in enumerate(module.cells):
                    carry[index], outputs = cell(carry[index], outputs)
                return tuple(carry), outputs

            start = ((jnp.zeros((len(images), 8)),) * 2,) * 2
            options = {"variable_broadcast": "params", "split_rngs": {"params": False}}
            _, outputs = nn.scan(step, in_axes=1, out_axes=1, **options)(self, start, images)
            return outputs[:, -1]

    module = torch.nn.ModuleList([torch.nn.LSTM(8, 8, num_layers=2, batch_first=True)])
    module.forward = lambda images: module[0](images)[0][:, -1]
    assert_same_model(randomize(module), state_of(Stacked(), SMALL_IMAGES), SMALL_IMAGES)


def test_functions_with_a_convolution_need_the_flattened_channels() -> None:
    def init(key, inputs):
        shapes = {"classifier": (144, 3), "features": (3, 3, 1, 4)}
        return {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}, {}

    def apply(params, model_state, inputs, *, train, key):
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            inputs[..., None],
            params["features"]["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=dimensions,
        )
        return x.reshape(len(x), -1) @ params["classifier"]["kernel"], model_state

    layers = {"features": torch.nn.Conv2d(1, 4, 3, bias=False)}
    module = torch.nn.ModuleDict(layers | {"classifier": torch.nn.Linear(144, 3, bias=False)})
    module.forward = lambda x: module["classifier"](module["features"](x[:, None]).flatten(1))
    expected = outputs_of(randomize(module), SMALL_IMAGES)
    state = state_of(jt.Model(init, apply), SMALL_IMAGES)
    with pytest.raises(
        jt.errors.InputError, match="classifier may flatten the features of a convolution"
    ):
        load_torch(state, module.state_dict())
    loaded = load_torch(state, module.state_dict(), channels={"classifier": 4})
    np.testing.assert_allclose(jt.predict(loaded, SMALL_IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_transposed_convolution_is_refused(strides: int) -> None:
    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, images):
            name = "up" if strides > 1 else None  # without strides, the name of the class tells
            x = nn.Conv(4, (3, 3))(images[..., None])
            return nn.ConvTranspose(4, (3, 3), (strides, strides), name=name)(x)

    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.ConvTranspose2d(4, 4, 3, strides)]
    with pytest.raises(
        jt.errors.InputError, match="is a transposed convolution, whose weights are not"
    ):
        load_torch(state_of(Transposed(), SMALL_IMAGES), torch.nn.Sequential(*layers).state_dict())


class Named(nn.Module):
    """Uses its second layer first, as `torch_named` does."""

    outputs: int = 4

    @nn.compact
    def __call__(self, inputs):
        x = nn.Dense(4, name="first")(nn.Dense(4, name="second")(inputs))
        return nn.Dense(self.outputs, name="head")(x)


def torch_named() -> Any:
    layers = {name: torch.nn.Linear(4, 4) for name in ("first", "second")}
    module = torch.nn.ModuleDict(layers | {"head": torch.nn.Linear(4, 3)})
    module.forward = lambda x: module["head"](module["first"](module["second"](x)))
    return randomize(module)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_names_decide_also_behind_the_prefix_of_a_wrapper(prefix: str) -> None:
    module = torch_named()
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    loaded = load_torch(state_of(Named(3), INPUTS), tensors)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    assert to_torch(loaded, tensors).keys() == tensors.keys()


def test_further_buffers_are_kept_without_strict() -> None:
    module = randomize(dense(4, 3))
    module.register_buffer("mean", torch.ones(2))
    state = state_of(Dense((3,)), INPUTS)
    with pytest.raises(jt.errors.InputError, match=r"mean \[2\] has no counterpart in the model"):
        load_torch(state, module)
    loaded = load_torch(state, module, strict=False)
    returned = to_torch(loaded, module, strict=False)
    assert returned.keys() == module.state_dict().keys()
    np.testing.assert_array_equal(returned["0.weight"], module[0].weight.detach())


def test_a_state_dict_of_another_network_is_an_error_without_strict() -> None:
    for tensors in ({}, dense(9, 9).state_dict()):
        with pytest.raises(
            jt.errors.InputError, match="no layer of the state dict has a counterpart"
        ):
            load_torch(state_of(Dense((3,)), INPUTS), tensors, strict=False)


def test_without_strict_a_new_last_layer_is_kept() -> None:
    module, state = randomize(dense(4, 6, 5, 3)), state_of(Dense((6, 5, 2)), INPUTS)
    loaded = load_torch(state, module.state_dict(), strict=False)
    for index in range(2):
        expected = module[index].weight.detach().numpy().T
        np.testing.assert_array_equal(loaded.params[f"Dense_{index}"]["kernel"], expected)
    np.testing.assert_array_equal(
        loaded.params["Dense_2"]["kernel"], state.params["Dense_2"]["kernel"]
    )


def test_without_a_template_the_names_are_our_paths() -> None:
    state = state_of(LinenConvNet(), SMALL_IMAGES)
    found = to_torch(state)
    assert found["Conv_1.weight"].shape == (4, 4, 3, 3)
    assert found["BatchNorm_0.running_var"].shape == (4,)
    assert to_torch(load_torch(state, found)).keys() == found.keys()
    loaded = load_torch(state_of(LinenConvNet(), SMALL_IMAGES), found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, state.params))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_without_weight_or_bias(scale: bool, bias: bool) -> None:
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            options = {"use_scale": scale, "use_bias": bias}
            return nn.BatchNorm(use_running_average=not train, **options)(inputs)

    state = state_of(Norm(), INPUTS)
    module = randomize(torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=scale or bias)))
    tensors = module.state_dict()
    if scale != bias:
        missing = "0.bias" if scale else "0.weight"
        module.get_submodule("0").get_parameter(missing[2:]).data.fill_(
            float(missing[2:] != "bias")
        )
        del tensors[missing]
    loaded = load_torch(state, tensors)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    assert to_torch(loaded, tensors).keys() == tensors.keys()


def test_a_grouped_convolution_in_three_dimensions_and_group_norm() -> None:
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(8, (3, 3, 3), padding="VALID", feature_group_count=2)(images)
            return nn.Dense(3)(nn.GroupNorm(4, epsilon=1e-5)(x).reshape(len(x), -1))

    inputs = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 4)).astype(np.float32)
    layers = [torch.nn.Conv3d(4, 8, 3, groups=2), torch.nn.GroupNorm(4, 8), torch.nn.Flatten()]
    module = randomize(torch.nn.Sequential(*layers, torch.nn.Linear(64, 3)))
    loaded = load_torch(state_of(Layers(), inputs), module)
    expected = outputs_of(module, np.ascontiguousarray(np.moveaxis(inputs, -1, 1)))
    np.testing.assert_allclose(jt.predict(loaded, inputs), expected, atol=1e-5)


def test_an_average_of_the_parameters_starts_with_the_loaded_ones(tmp_path: Path) -> None:
    optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(0.1))
    state = state_of(Dense((3,)), INPUTS, optimizer)
    data = jt.Dataset(jnp.asarray(INPUTS), jnp.arange(5) % 3)
    trained, _ = jt.train_step(state, data, jt.losses.cross_entropy)
    module = randomize(dense(4, 3))
    loaded = load_torch(trained, module.state_dict())
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    jt.save(tmp_path / "model.safetensors", loaded)
    restored = jt.load(tmp_path / "model.safetensors", trained)
    np.testing.assert_array_equal(jt.predict(restored, INPUTS), jt.predict(loaded, INPUTS))


def test_bfloat16_arrays_are_converted_both_ways() -> None:
    class Half(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dense(3, param_dtype=jnp.bfloat16)(inputs)

    state = state_of(Half(), INPUTS)
    found = to_torch(state)
    assert found["Dense_0.weight"].dtype == torch.bfloat16
    loaded = load_torch(state, found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, state.params))


def test_arrays_stay_on_the_mesh_of_the_state() -> None:
    mesh = jax.make_mesh((2,), ("data",))
    state = jt.parallel.replicate(state_of(Dense((3,)), INPUTS), mesh)
    loaded = load_torch(state, dense(4, 3).state_dict())
    assert loaded.params["Dense_0"]["kernel"].sharding == state.params["Dense_0"]["kernel"].sharding


# Files


def test_files_of_pytorch_and_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module, state = randomize(torch_networks.ConvNet((0.25, 0.5))), None
    state = state_of(linen_networks.ConvNet((0.25, 0.5)), IMAGES)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    expected = outputs_of(module, IMAGES)
    for name in ("model.pt", "model.safetensors"):
        loaded = load_torch(state, tmp_path / name)
        np.testing.assert_allclose(jt.predict(loaded, IMAGES), expected, atol=1e-5)


def test_a_safetensors_file_has_sorted_names_so_only_numbers_tell_the_order(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dense(*[4] * 13).state_dict(), tmp_path / "deep.safetensors")
    loaded = load_torch(state_of(Dense((4,) * 12), INPUTS), tmp_path / "deep.safetensors")
    assert loaded.params["Dense_11"]["kernel"].any()
    save_file(TorchBranches().state_dict(), tmp_path / "branches.safetensors")
    with pytest.raises(
        jt.errors.InputError, match=r"or module.state_dict\(\) in place of a safetensors"
    ):
        load_torch(state_of(Branches(), INPUTS), tmp_path / "branches.safetensors")


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        import os

        return (os.mkdir, (str(self.trace),))


def test_files_of_the_two_kinds_are_told_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = state_of(Dense((3,)), INPUTS)
    jt.save(tmp_path / "ours.safetensors", state)
    save_file(dense(4, 3).state_dict(), tmp_path / "theirs.safetensors")
    with pytest.raises(jt.errors.InputError, match=r"load a file of save by jaxtrain.load"):
        load_torch(state, tmp_path / "ours.safetensors")
    with pytest.raises(
        jt.errors.InputError, match=r"jaxtrain.export.load_torch loads weights of PyTorch"
    ):
        jt.load(tmp_path / "theirs.safetensors", state)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state, module = state_of(Dense((3,)), INPUTS), dense(4, 3)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        for cut in (0, 1, 9, len(content) // 2, len(content) - 1):
            path = tmp_path / f"cut-{name}"
            path.write_bytes(content[:cut])
            with pytest.raises(jt.errors.InputError) as caught:
                load_torch(state, path)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "model.txt").write_text("")
    torch.save({"model": module.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"x": Bomb(tmp_path / "trace")}, tmp_path / "code.pt")
    for name, message in (
        ("missing.pt", "missing.pt cannot be read: No such file or directory"),
        ("missing.safetensors", "missing.safetensors cannot be read: No such file or directory"),
        ("folder.pt", "folder.pt cannot be read: not a regular file"),
        ("folder.safetensors", "folder.safetensors cannot be read: not a regular file"),
        ("model.txt", "has the suffix '.txt'; expected a file of PyTorch weights"),
        ("run.pt", "has a value of type OrderedDict for 'model'; expected a tensor for each name"),
        ("list.pt", "is a list; expected a state dict of PyTorch"),
        ("code.pt", "contains objects other than tensors, which could run code, or is damaged"),
        ("null\0.pt", "cannot be read: embedded null"),
        ("cut-model.pt", "is not a complete file of PyTorch"),
        ("cut-model.safetensors", "is not a complete safetensors file"),
    ):
        with pytest.raises(jt.errors.InputError, match=re.escape(message)):
            load_torch(state, tmp_path / name)
    assert not (tmp_path / "trace").exists()


# State dicts that do not fit


def changed(**changes: Any) -> dict[str, Any]:
    """Returns the state dict of a network with some entries replaced, or removed by None."""
    state_dict = dict(dense(4, 6, 3).state_dict())
    state_dict |= {name.replace("_", ".", 1): value for name, value in changes.items()}
    return {name: value for name, value in state_dict.items() if value is not None}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (changed(**{"1_bias": None}), "1.bias [3] is missing for Dense_1; expected a state dict"),
        (
            changed(**{"0_weight": torch.zeros(4, 6)}),
            "0.weight has the shape [4, 6], not [6, 4] for Dense_0 (it looks transposed); expected",
        ),
        (
            changed(**{"0_weight": torch.zeros(7, 4), "0_bias": torch.zeros(7)}),
            "0.weight has the shape [7, 4], not [6, 4] for Dense_0; 0.bias has the shape [7], not "
            "[6] for Dense_0; expected",
        ),
        (
            changed(**{"2_weight": torch.zeros(2, 3), "2_bias": torch.zeros(2)}),
            "2.weight [2, 3] has no counterpart in the model; 2.bias [2] has no counterpart in the",
        ),
        (
            changed(**{"1_weight": None, "1_bias": None}),
            "Dense_1 needs weight [3, 6], bias [3], which the state dict does not have; expected",
        ),
        (changed(scale=torch.zeros(2)), "scale [2] has no counterpart in the model; expected"),
        (
            changed(**{"0_weight": torch.zeros(6, 4).half(), "1_bias": torch.zeros(3).double()}),
            "the dtype is float16, where the model has float32, for 0.weight; the dtype is "
            "float64, where the model has float32, for 1.bias; expected the dtypes of the model",
        ),
        ({}, "Dense_0 needs weight [6, 4], bias [6], which the state dict does not have; Dense_1"),
    ],
    ids=["missing", "transposed", "shapes", "layer", "no-layer", "extra", "half", "empty"],
)
def test_every_tensor_that_does_not_fit_is_named(state_dict, message: str) -> None:
    with pytest.raises(jt.errors.InputError, match=re.escape(message)) as caught:
        load_torch(state_of(Dense((6, 3)), INPUTS), state_dict)
    assert "\n" not in str(caught.value)


@needs_unchecked_types
def test_something_else_than_a_state_dict_is_refused() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"state_dict is a int; expected a state dict of PyT"
    ):
        load_torch(state_of(Dense((6, 3)), INPUTS), 3)
    with pytest.raises(
        jt.errors.InputError, match=r"state_dict has a value of type int for 'epoch'"
    ):
        load_torch(state_of(Dense((6, 3)), INPUTS), {"epoch": 3})
    with pytest.raises(
        jt.errors.InputError, match=r"state is a builtins.dict; expected a jaxtrain.Tra"
    ):
        to_torch({})


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, device="meta"), torch.eye(3).to_sparse(), torch.zeros(3).to(torch.float8_e5m2)],
    ids=["meta", "sparse", "float8"],
)
def test_a_tensor_that_numpy_cannot_have_is_named(tensor) -> None:
    with pytest.raises(jt.errors.InputError, match="bias of state_dict cannot be read") as caught:
        load_torch(state_of(Dense((3,)), INPUTS), {"weight": torch.zeros(3, 4), "bias": tensor})
    assert "\n" not in str(caught.value)


@needs_unchecked_types
@pytest.mark.parametrize(
    "options",
    [
        {"mapping": ["0"]},
        {"mapping": {"0": 1}},
        {"channels": ["0"]},
        {"channels": {"0": "4"}},
    ],
)
def test_options_of_a_wrong_type_are_refused(options) -> None:
    (name,) = options
    with pytest.raises(
        jt.errors.InputError, match=f"^{name} is .*; expected .* by names of layers, such"
    ):
        load_torch(state_of(Dense((3,)), INPUTS), dense(4, 3).state_dict(), **options)


# Optimizers

OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, jt.optimizers.sgd),
    (torch.optim.SGD, {}, jt.optimizers.sgd),
    (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.9)}, jt.optimizers.adam),
    (torch.optim.AdamW, {"weight_decay": 0.1}, jt.optimizers.adamw),
]


def torch_steps(module: Any, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = module.train()(torch.from_numpy(SMALL_IMAGES))
        loss = torch.nn.functional.cross_entropy(outputs, torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_steps(state: jt.TrainState, steps: int) -> tuple[jt.TrainState, list[float]]:
    data, losses = jt.Dataset(jnp.asarray(SMALL_IMAGES), jnp.arange(4)), []
    for _ in range(steps):
        state, metrics = jt.train_step(state, data, jt.losses.cross_entropy)
        losses.append(float(metrics["loss"]))
    return state, losses


class TorchLayers(torch.nn.Module):
    """A convolution, flattened features and dense layers, without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1 = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 8)
        self.fc2 = torch.nn.Linear(8, 5)

    def forward(self, images):
        x = torch.tanh(self.conv(images[:, None])).flatten(1)
        return self.fc2(torch.tanh(self.fc1(x)))


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.tanh(nn.Conv(4, (3, 3), padding="VALID")(images[..., None])).reshape(len(images), -1)
        return nn.Dense(5)(nn.tanh(nn.Dense(8)(x)))


@pytest.mark.parametrize(
    ("theirs", "options", "ours"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_pytorch_run_continues_with_the_same_numbers(theirs, options, ours) -> None:
    module = randomize(TorchLayers())
    optimizer = theirs(module.parameters(), lr=0.3, **options)
    optimizer.param_groups[0]["lr"] = 0.02  # as after a scheduler
    torch_steps(module, optimizer, 5)
    solver = jt.optimizers.clip_gradients(ours(0.5, **options), 1e6)
    state = load_torch(
        state_of(LinenLayers(), SMALL_IMAGES, solver),
        module.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    expected = torch_steps(module, optimizer, 5)
    state, losses = our_steps(state, 5)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for name, tensor in to_torch(state, module).items():
        np.testing.assert_allclose(tensor, module.state_dict()[name], atol=2e-6)


def test_a_partly_filled_optimizer_is_refused() -> None:
    module = TorchLayers()
    optimizer = torch.optim.Adam(module.parameters())
    torch_steps(module, optimizer, 2)
    for change in ({"exp_avg": None}, {"step": torch.tensor(7.0)}):
        found = optimizer.state_dict()
        found["state"] = found["state"] | {0: found["state"][0] | change}
        with pytest.raises(
            jt.errors.InputError, match=r"has updated . of 6 parameters, or some of them mo"
        ):
            load_torch(
                state_of(LinenLayers(), SMALL_IMAGES, jt.optimizers.adam()),
                module.state_dict(),
                optimizer=found,
            )


def test_an_optimizer_of_optax_continues_a_run_with_batch_norm() -> None:
    module = randomize(TorchConvNet())
    optimizer = torch.optim.Adam(module.named_parameters(), lr=0.01)
    torch_steps(module, optimizer, 3)
    with pytest.warns(UserWarning, match="does not record its learning rate, so PyTorch's 0.01"):
        state = load_torch(
            state_of(NnxConvNet(), SMALL_IMAGES, optax.adam(0.01)),
            module.state_dict(),
            optimizer=optimizer.state_dict(),
        )
    expected = torch_steps(module, optimizer, 3)
    _, losses = our_steps(state, 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_a_schedule_continues_at_the_step_of_pytorch() -> None:
    module = randomize(TorchLayers())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(5):
        torch_steps(module, optimizer, 1)
        scheduler.step()
    rate = jt.optimizers.step_lr(0.02, 2, 0.5, steps_per_epoch=1)
    state = load_torch(
        state_of(LinenLayers(), SMALL_IMAGES, jt.optimizers.adam(rate)),
        module.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    expected = torch_steps(module, optimizer, 1)
    state, losses = our_steps(state, 1)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert current_learning_rate(state.opt_state) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            lambda module: torch.optim.Adam(module.parameters()),
            jt.optimizers.sgd(0.1, momentum=0.9),
            "the PyTorch optimizer has exp_avg, exp_avg_sq for each parameter, where the optimizer "
            "of the state has momentum_buffer; expected the same kind of optimizer with the same",
        ),
        (
            lambda module: torch.optim.Adam(module.fc1.parameters()),
            jt.optimizers.adam(0.1),
            "the PyTorch optimizer has 2 parameters, where the model has 6; expected the optimizer",
        ),
        (
            lambda module: torch.optim.Adam([{"params": [p]} for p in module.parameters()]),
            jt.optimizers.adam(0.1),
            "the PyTorch optimizer has 6 parameter groups without names; expected one group, or an",
        ),
        (
            lambda module: torch.optim.Adam(
                [{"params": [p], "lr": i / 8} for i, p in enumerate(module.named_parameters())]
            ),
            jt.optimizers.adam(0.1),
            "the PyTorch optimizer has the learning rates [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]; e",
        ),
        (
            lambda module: torch.optim.Adam(list(module.parameters())[::-1]),
            jt.optimizers.adam(0.1),
            "the PyTorch optimizer has exp_avg of shape [5] for conv.weight, which has the shape "
            "[4, 1, 3, 3]; expected the optimizer of this model",
        ),
        (
            lambda module: torch.optim.RAdam(module.parameters()),
            jt.optimizers.adam(0.1),
            "; expected those of SGD, Adam or AdamW, whose state can be loaded",
        ),
        (
            lambda module: torch.optim.Adam(module.parameters(), maximize=True),
            jt.optimizers.adam(0.1),
            "the PyTorch optimizer has maximize=True; expected one that minimizes",
        ),
    ],
    ids=[
        "kind",
        "other-parameters",
        "groups",
        "rates",
        "order",
        "RAdam",
        "maximize",
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(theirs, ours, message: str) -> None:
    module = TorchLayers()
    optimizer = theirs(module)
    torch_steps(module, optimizer, 1)
    with pytest.raises(jt.errors.InputError, match=re.escape(message)):
        load_torch(
            state_of(LinenLayers(), SMALL_IMAGES, ours),
            module.state_dict(),
            optimizer=optimizer.state_dict(),
        )


def test_the_optimizer_of_an_lstm_with_two_biases_is_refused() -> None:
    module = TorchCell()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(2, 3)).sum().backward()
    optimizer.step()
    inputs = np.zeros((1, 3), np.float32)
    with pytest.raises(
        jt.errors.InputError, match="recurrent has two biases in PyTorch, which are train"
    ):
        load_torch(
            state_of(EquinoxCell(), inputs, jt.optimizers.adam()),
            module.state_dict(),
            optimizer=optimizer.state_dict(),
        )
