"""load_torch and to_torch: the outputs and the next steps are those of the model in PyTorch."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
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
from jaxtrain.errors import InputError
from jaxtrain.export import load_torch, to_torch

torch = pytest.importorskip("torch")
eqx = pytest.importorskip("equinox")

from safetensors.torch import save_file  # noqa: E402

from benchmarks.networks import linen as linen_networks  # noqa: E402
from benchmarks.networks import torch as torch_networks  # noqa: E402

needs_unchecked_types = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="passes values of the wrong type"
)


class Port(nn.Module):
    """A network from a function of the module and the inputs."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return self.function(self, inputs)


class Torch(torch.nn.Module):
    """A network from a function of the module and the inputs, and from layers and parameters."""

    def __init__(self, function, **layers) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, inputs):
        return self.function(self, inputs)


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


def assert_same_model(module: Any, state: jt.TrainState, inputs: np.ndarray, source=None) -> None:
    """Checks that a state has the outputs of a module, and that the module can be restored."""
    expected = outputs_of(module, inputs)
    source = module.state_dict() if source is None else source
    loaded = load_torch(state, source)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(jt.predict(loaded, jnp.asarray(inputs)), expected, atol=1e-5)
    returned = to_torch(loaded, source)
    for name, tensor in module.state_dict().items():
        if "num_batches" not in name and "bias_ih" not in name and "bias_hh" not in name:
            np.testing.assert_array_equal(returned[name], tensor)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.load_state_dict(returned)
    np.testing.assert_allclose(outputs_of(module, inputs), expected, atol=1e-6)


IMAGES = np.random.default_rng(0).normal(size=(4, 28, 28)).astype(np.float32)
SMALL_IMAGES = IMAGES[:, :8, :8].copy()
INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 5))


def torch_dense(*widths: int) -> Any:
    pairs = itertools.pairwise(widths)
    return randomize(torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairs)))


def dense(*widths: int) -> nn.Module:
    return nn.Sequential([nn.Dense(width) for width in widths])


# Layers of the three libraries


def torch_cnn() -> Any:
    """Returns a network with batch norm, flattened features, and dense layers of equal shapes."""
    convolutions = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
    convolutions += [torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
    layers = [torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    first = torch.nn.Unflatten(1, (1, 8))
    return randomize(torch.nn.Sequential(first, *convolutions, torch.nn.Flatten(), *layers))


def nnx_cnn() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        lambda x: x[..., None],
        *(
            nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
        ),
        *(
            nnx.Conv(4, 4, (3, 3), padding="VALID", rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.relu,
        ),
        *(lambda x: x.reshape(len(x), -1), nnx.Linear(64, 8, rngs=rngs), nnx.relu),
        *(nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)),
    )


def equinox_cnn(mode: str = "batch") -> Any:
    key, relu = jax.random.key(0), eqx.nn.Lambda(jax.nn.relu)

    def make():
        norms = [eqx.nn.BatchNorm(4, "batch", mode=mode) for _ in range(2)]
        return eqx.nn.Sequential(
            [
                *(
                    eqx.nn.Lambda(lambda x: x[None]),
                    eqx.nn.Conv2d(1, 4, 3, key=key),
                    norms[0],
                    relu,
                ),
                *(eqx.nn.Conv2d(4, 4, 3, key=key), norms[1], relu, eqx.nn.Lambda(jnp.ravel)),
                *(eqx.nn.Linear(64, 8, key=key), relu),
                *(eqx.nn.Linear(8, 8, key=key), eqx.nn.Linear(8, 8, key=key)),
            ]
        )

    return eqx.nn.make_with_state(make)()


def torch_sequences() -> Any:
    """Returns an embedding, a layer norm, a deep LSTM and attention."""

    def forward(m, tokens):
        x = m.lstm(m.norm(m.embedding(tokens) + m.start))[0]
        return m.output(m.attention(x, x, x)[0])

    return Torch(
        forward,
        start=torch.nn.Parameter(torch.zeros(6)),
        embedding=torch.nn.Embedding(11, 6),
        norm=torch.nn.LayerNorm(6),
        lstm=torch.nn.LSTM(6, 6, num_layers=2, batch_first=True),
        attention=torch.nn.MultiheadAttention(6, 2, batch_first=True),
        output=torch.nn.Linear(6, 3, bias=False),
    )


def linen_sequences(module, tokens):
    start = module.param("start", nn.initializers.normal(), (6,))
    x = nn.Embed(11, 6)(tokens)
    x = nn.LayerNorm(epsilon=1e-5)(x + jnp.broadcast_to(start, x.shape))
    for _ in range(2):
        x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
    x = nn.MultiHeadDotProductAttention(2)(x, x, x)
    return nn.Dense(3, use_bias=False)(x)


class NnxSequences(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.start = nnx.Param(jnp.zeros(6))
        self.embedding = nnx.Embed(11, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.lstms = nnx.List([nnx.RNN(nnx.LSTMCell(6, 6, rngs=rngs), rngs=rngs) for _ in "ab"])
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.output = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + jnp.broadcast_to(self.start[...], x.shape))
        for lstm in self.lstms:
            x = lstm(x)
        return self.output(self.attention(x))


class EquinoxCell(eqx.Module):
    cell: eqx.nn.LSTMCell = eqx.nn.LSTMCell(4, 3, key=jax.random.key(0))

    def __call__(self, example):
        return self.cell(example, (jnp.zeros(3), jnp.zeros(3)))[0]


def torch_cell() -> Any:
    return Torch(lambda m, x: m.recurrent(x)[0], recurrent=torch.nn.LSTMCell(4, 3))


NETWORKS = {
    "example CNN": (torch_networks.ConvNet((0, 0)), linen_networks.ConvNet((0, 0)), IMAGES),
    "ResNet": (torch_networks.ResNet(), linen_networks.ResNet(), IMAGES),
    "LSTM": (torch_networks.RowLSTM(), linen_networks.RowLSTM(), IMAGES),
    "ViT": (torch_networks.ViT(), linen_networks.ViT(), IMAGES),
    "CNN of NNX": (torch_cnn(), nnx_cnn(), SMALL_IMAGES),
    "CNN of Equinox": (torch_cnn(), equinox_cnn(), SMALL_IMAGES),
    "sequences of Linen": (torch_sequences(), Port(linen_sequences), TOKENS),
    "sequences of NNX": (torch_sequences(), NnxSequences(), TOKENS),
    "LSTM of Equinox": (torch_cell(), EquinoxCell(), INPUTS),
    # The outer layer is made first, and so has the first name.
    "nested calls": (torch_dense(4, 4, 4), Port(lambda m, x: nn.Dense(4)(nn.Dense(4)(x))), INPUTS),
    # In the order of their numbers, not of their names as text.
    "twelve equal layers": (torch_dense(*[4] * 13), dense(*[4] * 12), INPUTS),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_have_the_same_outputs_in_both_directions(network: str) -> None:
    module, model, inputs = NETWORKS[network]
    assert_same_model(randomize(module), state_of(model, inputs), inputs)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_trained_running_statistics_return_to_pytorch(mode: str) -> None:
    data = jt.Dataset(jnp.asarray(SMALL_IMAGES), jnp.arange(4))
    state = state_of(equinox_cnn(mode), SMALL_IMAGES)
    state, _ = jt.train_step(state, data, jt.losses.cross_entropy)
    module = torch_cnn()
    module.load_state_dict(to_torch(state, module))
    expected = jt.predict(state, SMALL_IMAGES)
    np.testing.assert_allclose(outputs_of(module, SMALL_IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_batch_norm_without_weight_or_bias(scale: bool, bias: bool) -> None:
    def norm_of(module, inputs):
        train = module.is_mutable_collection("batch_stats")
        norm = nn.BatchNorm(use_running_average=not train, use_scale=scale, use_bias=bias)
        return norm(inputs)

    state = state_of(Port(norm_of), INPUTS)
    norm = randomize(torch.nn.BatchNorm1d(4))
    tensors = {f"0.{name}": tensor for name, tensor in norm.state_dict().items()}
    for name, is_used, neutral in (("weight", scale, 1.0), ("bias", bias, 0.0)):
        if not is_used:
            tensors[f"0.{name}"].fill_(neutral)
            del tensors[f"0.{name}"]
    loaded = load_torch(state, tensors)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(norm, INPUTS), atol=1e-6)
    assert to_torch(loaded, tensors).keys() == tensors.keys()


@pytest.mark.parametrize("strides", [1, 2])
def test_a_transposed_convolution_is_refused(strides: int) -> None:
    def transposed(module, images):
        name = "up" if strides > 1 else None  # without strides, the name of the class tells
        return nn.ConvTranspose(4, (3, 3), (strides, strides), name=name)(images[..., None])

    module = torch.nn.ConvTranspose2d(1, 4, 3, strides)
    with pytest.raises(InputError, match="is a transposed convolution, whose weights are not"):
        load_torch(state_of(Port(transposed), SMALL_IMAGES), module.state_dict())


def test_bfloat16_is_converted_both_ways_and_float16_to_float32() -> None:
    state = state_of(Port(lambda m, x: nn.Dense(3, param_dtype=jnp.bfloat16)(x)), INPUTS)
    found = to_torch(state)
    assert found["Dense_0.weight"].dtype == torch.bfloat16
    loaded = load_torch(state, found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, state.params))
    module = torch_dense(4, 3)
    loaded = load_torch(state_of(dense(3), INPUTS), module.half().state_dict())
    expected = outputs_of(module.float(), INPUTS)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), expected, atol=1e-6)


def test_arrays_stay_on_the_mesh_and_an_average_starts_with_the_loaded_parameters() -> None:
    optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(0.1))
    state = state_of(dense(3), INPUTS, optimizer)
    trained, _ = jt.train_step(state, (INPUTS, np.arange(5) % 3), jt.losses.cross_entropy)
    trained = jt.parallel.replicate(trained, jax.make_mesh((2,), ("data",)))
    module = torch_dense(4, 3)
    loaded = load_torch(trained, module.state_dict())
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    before, after = jax.tree.leaves(trained.params), jax.tree.leaves(loaded.params)
    assert [x.sharding for x in after] == [x.sharding for x in before]


def test_without_a_template_the_names_are_our_paths() -> None:
    state = state_of(linen_networks.ResNet(), IMAGES)
    found = to_torch(state)
    assert found["Conv_1.weight"].shape == (16, 16, 3, 3)
    assert found["BatchNorm_0.running_var"].shape == (16,)
    loaded = load_torch(state_of(linen_networks.ResNet(), IMAGES), found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, state.params))


# Which layer is which


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_equal_names_match_before_the_order_also_in_a_wrapper(prefix: str) -> None:
    layers = {name: torch.nn.Linear(4, 4) for name in ("first", "second")}
    module = randomize(Torch(lambda m, x: m.first(m.second(x)), **layers))
    model = Port(lambda m, x: nn.Dense(4, name="first")(nn.Dense(4, name="second")(x)))
    state = state_of(model, INPUTS)
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    loaded = load_torch(state, tensors)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    assert to_torch(loaded, tensors).keys() == tensors.keys()


def branches(module, inputs):
    """Two layers of equal shape, one of which has another layer before it."""
    query = nn.Dense(4, name="query")(nn.Dense(6, name="first")(inputs))
    return query - 2 * nn.Dense(4, name="key")(nn.Dense(6, name="second")(inputs))


def torch_branches() -> Any:
    """Creates its layers in another order than `branches` calls them."""
    layers = {"one": torch.nn.Linear(4, 6), "q": torch.nn.Linear(6, 4)}
    layers |= {"k": torch.nn.Linear(6, 4), "two": torch.nn.Linear(4, 6)}
    return randomize(Torch(lambda m, x: m.q(m.one(x)) - 2 * m.k(m.two(x)), **layers))


def test_an_order_that_is_unknown_needs_a_mapping() -> None:
    module, state = torch_branches(), state_of(Port(branches), INPUTS)
    message = (
        "the order of the layers does not determine which of one, two in PyTorch is which of "
        "first, second in the model (the orders first differ at k and second); expected a mapping, "
        "such as mapping={'one': 'first'}"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        load_torch(state, module.state_dict())
    mapping = {"one": "first", "k": "key"}  # the others follow
    loaded = load_torch(state, module.state_dict(), mapping=mapping)
    np.testing.assert_allclose(jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6)
    returned = to_torch(loaded, module, mapping=mapping)
    np.testing.assert_array_equal(returned["q.weight"], module.q.weight.detach())


def test_single_parameters_of_equal_shape_need_a_mapping() -> None:
    def scales(module, inputs):
        first, second = (module.param(x, nn.initializers.ones, (4,)) for x in ("outer", "inner"))
        return inputs * jnp.broadcast_to(first, inputs.shape) + second[None]

    state = state_of(Port(scales), INPUTS)
    tensors = {"scale": torch.arange(4.0), "offset": torch.ones(4)}
    with pytest.raises(InputError, match="which of scale, offset in PyTorch is which of outer"):
        load_torch(state, tensors)
    loaded = load_torch(state, tensors, mapping={"scale": "outer"})
    np.testing.assert_array_equal(loaded.params["outer"], np.arange(4))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"5": "layers_0"}, "mapping has the layer '5', which PyTorch does not have; expected one"),
        ({"0": "x"}, "mapping has the layer 'x', which the model does not have; expected one of"),
        ({"0": "layers_0", "1": "layers_0"}, "mapping has two layers for 'layers_0'; expected"),
        ({"0": "layers_1"}, "mapping has 0 (weight [3, 4], bias [3]) for layers_1 (weight [4, 3]"),
        pytest.param(["0"], "mapping is ['0']; expected", marks=needs_unchecked_types),
        pytest.param({"0": 1}, "mapping is {'0': 1}; expected", marks=needs_unchecked_types),
    ],
)
def test_a_mapping_names_known_layers_of_equal_shapes(mapping, message: str) -> None:
    tensors = torch_dense(4, 3, 4).state_dict()
    with pytest.raises(InputError, match=re.escape(message)):
        load_torch(state_of(dense(3, 4), INPUTS), tensors, mapping=mapping)


def test_without_strict_layers_without_a_counterpart_are_kept() -> None:
    module, state = torch_dense(4, 6, 5, 3), state_of(dense(6, 5, 2), INPUTS)
    module.register_buffer("mean", torch.ones(2))
    loaded = load_torch(state, module.state_dict(), strict=False)
    for index in range(2):
        expected = module[index].weight.detach().T
        np.testing.assert_array_equal(loaded.params[f"layers_{index}"]["kernel"], expected)
    assert jnp.array_equal(loaded.params["layers_2"]["kernel"], state.params["layers_2"]["kernel"])
    assert to_torch(loaded, module, strict=False).keys() == module.state_dict().keys()
    for widths, message in (
        ((9, 9), "no layer of the state dict has a counterpart"),
        ((6, 5, 6, 5), "does not determine which of 0, 2 in PyTorch is which of layers_1 in"),
    ):
        with pytest.raises(InputError, match=message):
            load_torch(state, torch_dense(*widths).state_dict(), strict=False)


def torch_tied() -> Any:
    layers = {"wte": torch.nn.Embedding(11, 4), "hidden": torch.nn.Linear(4, 4)}
    module = Torch(lambda m, x: m.head(m.hidden(m.wte(x))), **layers)
    module.head = torch.nn.Linear(4, 11, bias=False)
    module.head.weight = module.wte.weight
    return randomize(module)


def tied(module, tokens):
    embedding = nn.Embed(11, 4)
    return embedding.attend(nn.Dense(4)(embedding(tokens)))


def untied(module, tokens):
    return nn.Dense(11, use_bias=False)(nn.Dense(4)(nn.Embed(11, 4)(tokens)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("ours", [tied, untied])
def test_tied_tensors_are_one_layer_or_two(ours, strict: bool) -> None:
    module, state = torch_tied(), state_of(Port(ours), TOKENS)
    expected = outputs_of(module, TOKENS)
    if ours is untied:
        with pytest.raises(InputError, match=r"^wte.weight and head.weight are one tensor in PyT"):
            to_torch(state, module)
    loaded = load_torch(state, module, strict=strict)
    np.testing.assert_allclose(jt.predict(loaded, TOKENS), expected, atol=1e-5)
    module.load_state_dict(to_torch(loaded, module, strict=strict))
    np.testing.assert_allclose(outputs_of(module, TOKENS), expected, atol=1e-6)


# Files and state dicts that do not fit


def test_files_of_pytorch_and_safetensors_are_read(tmp_path: Path) -> None:
    module, state = torch_dense(*[4] * 13), state_of(dense(*[4] * 12), INPUTS)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        loaded = load_torch(state, tmp_path / name)
        ours, theirs = jt.predict(loaded, INPUTS), outputs_of(module, INPUTS)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # The names in a safetensors file are sorted, so only numbers tell the order.
    save_file(torch_branches().state_dict(), tmp_path / "branches.safetensors")
    with pytest.raises(InputError, match=r"or module.state_dict\(\) in place of a file"):
        load_torch(state_of(Port(branches), INPUTS), tmp_path / "branches.safetensors")
    jt.save(tmp_path / "ours.safetensors", state)
    with pytest.raises(InputError, match=r"load a file of save by jaxtrain.load"):
        load_torch(state, tmp_path / "ours.safetensors")
    with pytest.raises(InputError, match=r"jaxtrain.export.load_torch loads weights"):
        jt.load(tmp_path / "model.safetensors", state)


def test_the_content_of_a_file_tells_its_format(tmp_path: Path) -> None:
    """In Hugging Face's cache, the name is that of a link to a file without a suffix."""
    module, state = torch_dense(4, 3), state_of(dense(3), INPUTS)
    torch.save(module.state_dict(), tmp_path / "zip")
    torch.save(module.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(module.state_dict(), tmp_path / "blob")
    (tmp_path / "model.pt").symlink_to("blob")
    (tmp_path / "model.safetensors").symlink_to("zip")
    for name in ("zip", "old", "blob", "model.pt", "model.safetensors"):
        loaded = load_torch(state, tmp_path / name)
        np.testing.assert_allclose(
            jt.predict(loaded, INPUTS), outputs_of(module, INPUTS), atol=1e-6
        )
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.pt").symlink_to("pipe")
    with pytest.raises(InputError, match=r"pipe.pt cannot be read \(it is a pipe, not"):
        load_torch(state, tmp_path / "pipe.pt")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3FNUZ", "F4"])
def test_a_dtype_that_numpy_lacks_is_named(tmp_path: Path, dtype: str) -> None:
    size = 4 if dtype == "F4" else 8
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}
    header = json.dumps({"0.bias": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(InputError, match=rf"0\.bias of .* has the dtype {dtype}, which is not"):
        load_torch(state_of(dense(3), INPUTS), path)


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    state, module = state_of(dense(3), INPUTS), torch_dense(4, 3)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    messages = {
        "missing.pt": "missing.pt cannot be read (No such file or directory)",
        "folder.safetensors": "folder.safetensors cannot be read (it is a directory",
        "model.txt": "is not a file of PyTorch weights (it starts with b'import",
        "run.pt": "has a value of type OrderedDict for 'model'; expected a tensor for each name",
        "list.pt": "is a list; expected a state dict of PyTorch",
        "code.pt": "contains objects other than tensors, which could run code, or is damaged",
        "null\0.pt": "; expected a path",
    }
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "model.txt").write_text("import torch\n")
    torch.save({"model": module.state_dict(), "epoch": 3}, tmp_path / "run.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"x": Bomb(tmp_path / "trace")}, tmp_path / "code.pt")
    for name in ("model.pt", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        for cut in (0, 1, 9, len(content) // 2, len(content) - 1):
            (tmp_path / f"{cut}-{name}").write_bytes(content[:cut])
            messages[f"{cut}-{name}"] = f"{cut}-{name}"  # complete or not, it is named
    for name, message in messages.items():
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            load_torch(state, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict of a network with some entries replaced, or removed by None."""
    found = dict(torch_dense(4, 6, 3).state_dict()) | changes
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (
            changed({"1.bias": None}),
            "1 (weight [3, 6]) has no counterpart in the model; layers_1 (weight [3, 6], bias [3]) "
            "has none in the state dict; expected a state dict of the same network",
        ),
        (
            changed({"0.weight": torch.zeros(4, 6)}),
            "0 (weight [4, 6], bias [6]) has no counterpart in the model; layers_0 (weight [6, 4],",
        ),
        (
            changed({"2.weight": torch.zeros(2, 3), "2.bias": torch.zeros(2)}),
            "2 (weight [2, 3], bias [2]) has no counterpart in the model; expected",
        ),
        (
            changed({"scale": torch.zeros(2)}),
            "scale ([2]) has no counterpart in the model; expected",
        ),
        ({}, "layers_0 (weight [6, 4], bias [6]) has none in the state dict; layers_1 (weight [3"),
        pytest.param(3, "state_dict is a int; expected a state", marks=needs_unchecked_types),
        pytest.param(
            {"epoch": 3}, "a value of type int for 'epoch'; expected", marks=needs_unchecked_types
        ),
        ({"bias": torch.zeros(3, device="meta")}, "bias of state_dict cannot be read ("),
        ({"bias": torch.zeros(3).to(torch.float8_e5m2)}, "bias of state_dict cannot be read ("),
    ],
)
def test_every_layer_that_does_not_fit_is_named(state_dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_torch(state_of(dense(6, 3), INPUTS), state_dict)
    assert "\n" not in str(caught.value)


# Optimizers


def torch_layers() -> Any:
    layers = {"conv": torch.nn.Conv2d(1, 4, 3), "fc1": torch.nn.Linear(144, 8)}
    layers |= {"fc2": torch.nn.Linear(8, 5)}

    def forward(m, images):
        return m.fc2(torch.tanh(m.fc1(torch.tanh(m.conv(images[:, None])).flatten(1))))

    return randomize(Torch(forward, **layers))


def linen_layers(module, images):
    x = nn.tanh(nn.Conv(4, (3, 3), padding="VALID")(images[..., None])).reshape(len(images), -1)
    return nn.Dense(5)(nn.tanh(nn.Dense(8)(x)))


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


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, jt.optimizers.sgd),
        (torch.optim.SGD, {}, jt.optimizers.sgd),
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.9)}, jt.optimizers.adam),
        (torch.optim.AdamW, {"weight_decay": 0.1}, jt.optimizers.adamw),
    ],
)
def test_a_pytorch_run_continues_with_the_same_numbers(theirs, options, ours) -> None:
    module = torch_layers()
    optimizer = theirs(module.parameters(), lr=0.3, **options)
    optimizer.param_groups[0]["lr"] = 0.02  # as after a scheduler
    torch_steps(module, optimizer, 5)
    solver = jt.optimizers.clip_gradients(ours(0.5, **options), 1e6)
    state = state_of(Port(linen_layers), SMALL_IMAGES, solver)
    state = load_torch(state, module.state_dict(), optimizer=optimizer.state_dict())
    expected = torch_steps(module, optimizer, 5)
    state, losses = our_steps(state, 5)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for name, tensor in to_torch(state, module).items():
        np.testing.assert_allclose(tensor, module.state_dict()[name], atol=2e-6)


def test_an_optimizer_of_optax_continues_a_run_with_batch_norm() -> None:
    module = torch_cnn()
    optimizer = torch.optim.Adam(module.named_parameters(), lr=0.01)
    torch_steps(module, optimizer, 3)
    state = state_of(nnx_cnn(), SMALL_IMAGES, optax.adam(0.01))
    with pytest.warns(UserWarning, match="does not record its learning rate, so PyTorch's 0.01"):
        state = load_torch(state, module.state_dict(), optimizer=optimizer.state_dict())
    expected = torch_steps(module, optimizer, 3)
    np.testing.assert_allclose(our_steps(state, 3)[1], expected, rtol=1e-4)


def test_a_schedule_continues_at_the_step_of_pytorch() -> None:
    module = torch_layers()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(5):
        torch_steps(module, optimizer, 1)
        scheduler.step()
    solver = jt.optimizers.adam(jt.optimizers.step_lr(0.02, 2, 0.5, steps_per_epoch=1))
    state = state_of(Port(linen_layers), SMALL_IMAGES, solver)
    state = load_torch(state, module.state_dict(), optimizer=optimizer.state_dict())
    expected = torch_steps(module, optimizer, 2)  # at PyTorch's rate of this step
    np.testing.assert_allclose(our_steps(state, 2)[1], expected, rtol=2e-5)


def adam(parameters: Any, change: Any = None, **options: Any) -> Callable[[Any], dict[str, Any]]:
    """Returns a function that takes a step with Adam and returns its state dict, changed."""

    def state_dict_of(module: Any) -> dict[str, Any]:
        optimizer = torch.optim.Adam(parameters(module), **options)
        torch_steps(module, optimizer, 1)
        found = optimizer.state_dict()
        return found | {"state": found["state"] | {0: found["state"][0] | (change or {})}}

    return state_dict_of


def parameters(module: Any) -> list[Any]:
    return list(module.parameters())


def rates(module: Any) -> list[Any]:
    return [{"params": [p], "lr": i / 8} for i, p in enumerate(module.named_parameters())]


@pytest.mark.parametrize(
    ("state_dict_of", "message"),
    [
        (
            lambda m: torch.optim.SGD(m.parameters(), momentum=0.9).state_dict(),
            "the PyTorch optimizer has momentum_buffer for each parameter, where the optimizer of "
            "the state has exp_avg, exp_avg_sq; expected the same kind of optimizer with the same",
        ),
        (lambda m: torch.optim.RAdam(m.parameters()).state_dict(), "; expected those of SGD, Adam"),
        (lambda m: {"lr": 0.1}, "optimizer is a dict; expected optimizer.state_dict() of PyTorch"),
        (adam(lambda m: m.fc1.parameters()), "2 parameters, where the model has 6; expected"),
        (adam(lambda m: [{"params": [p]} for p in parameters(m)]), "6 parameter groups without n"),
        (adam(rates), "the learning rates [0.0, 0.125, 0.25, 0.375, 0.5, 0.625]; expected one for"),
        (adam(lambda m: parameters(m)[::-1]), "exp_avg of another shape than conv.weight, which"),
        (adam(parameters, maximize=True), "maximize=True; expected one that minimizes"),
        (adam(parameters, {"exp_avg": None}), "updated 5 of 6 parameters, or some of them more"),
        (adam(parameters, {"step": torch.tensor(7.0)}), "updated 6 of 6 parameters, or some of"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(state_dict_of, message: str) -> None:
    module = torch_layers()
    found = state_dict_of(module)
    state = state_of(Port(linen_layers), SMALL_IMAGES, jt.optimizers.adam(0.1))
    with pytest.raises(InputError, match=re.escape(message)):
        load_torch(state, module.state_dict(), optimizer=found)


def test_the_optimizer_of_an_lstm_with_two_biases_is_refused() -> None:
    module = torch_cell()
    found = torch.optim.Adam(module.parameters()).state_dict()
    state = state_of(EquinoxCell(), INPUTS, jt.optimizers.adam())
    with pytest.raises(InputError, match="recurrent has two biases in PyTorch, which are trained"):
        load_torch(state, module.state_dict(), optimizer=found)
