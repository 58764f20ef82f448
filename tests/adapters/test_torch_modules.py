"""PyTorch modules train in JAX as they do in PyTorch, and come back."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.adapters.helpers import KEY

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.adapters import torch_networks  # noqa: E402
from tests.adapters.torch_networks import CASES, Tokens  # noqa: E402

STEPS, BATCH = 5, 4
SGD = jt.optimizers.sgd(0.05, momentum=0.9)


def make_inputs(shapes: Any, count: int = BATCH, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    arrays = tuple(
        rng.integers(0, shape.count, (count, *shape.shape))
        if isinstance(shape, Tokens)
        else rng.normal(size=(count, *shape)).astype(np.float32)
        for shape in shapes
    )
    return arrays if len(arrays) > 1 else arrays[0]


def call_torch(module: Any, inputs: Any, *, train: bool) -> Any:
    module.train(train)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return module(*(torch.tensor(np.asarray(x)) for x in inputs))


def loss_fn(outputs: Any, targets: Any) -> Any:
    """The squared distance to 0.3 of each example, for arrays and tensors."""
    leaves = [((x - 0.3) ** 2).reshape((x.shape[0], -1)).mean(1) for x in jax.tree.leaves(outputs)]
    return sum(leaves[1:], leaves[0])


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x.detach() if hasattr(x, "detach") else x), tree)


def assert_close(found: Any, expected: Any) -> None:
    """To 1e-5 of the largest number in each array."""
    found, expected = to_numpy(found), to_numpy(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(np.abs(y).max(), 0.1))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    names = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in names}


@jax.jit
def in_jax(state: Any, inputs: Any) -> Any:
    """Returns outputs in evaluation and in training, gradients, and losses and state of steps."""
    batch = jt.Dataset(inputs, jnp.zeros(BATCH))
    outputs, _ = state.model.apply(state.params, state.model_state, inputs, train=False, key=None)

    def step(state: Any, _: Any) -> Any:
        (loss, aux), grads = jt.gradients(state, batch, loss_fn)
        after = jt.apply_gradients(state, grads, model_state=aux.model_state)
        return after, (loss, aux.predictions, grads)

    after, (losses, *first) = jax.lax.scan(step, state, length=STEPS)
    return outputs, *jax.tree.map(lambda x: x[0], first), losses, after


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_in_pytorch(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make()
    inputs = make_inputs(case.shapes)
    start, reference = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    state = jt.init_state(module, SGD, jax.tree.map(lambda x: x[:1], inputs), key=KEY)
    outputs, predictions, grads, losses, state = in_jax(state, inputs)

    assert_close(outputs, call_torch(module, inputs, train=False))
    optimizer = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9)
    for step, loss in enumerate(losses):
        optimizer.zero_grad()
        found = call_torch(reference, inputs, train=True)
        expected = loss_fn(found, None).mean()
        expected.backward()
        assert_close(loss, expected)
        if step == 0:
            assert_close(predictions, found)
            assert_close(flat(grads), {name: p.grad for name, p in reference.named_parameters()})
        optimizer.step()
    assert_close(flat(state.params), dict(reference.named_parameters()))
    assert_close(flat(state.model_state), dict(reference.named_buffers()))
    trained = jt.to_module(state)
    assert type(trained) is type(module)
    assert not trained.training
    assert_close(
        call_torch(trained, inputs, train=False), call_torch(reference, inputs, train=False)
    )
    assert {k: v.dtype for k, v in trained.state_dict().items()} == {
        k: v.dtype for k, v in start.items()
    }
    assert all(torch.equal(module.state_dict()[k], v) for k, v in start.items())


class Cnn(nn.Module):
    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.dropout, self.out = nn.Dropout(rate), nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(F.max_pool2d(x, 2).flatten(1)))


IMAGES = 0.3 * jax.random.normal(KEY, (20, 1, 6, 6))
LABELS = jnp.arange(20) % 3
DATA = jt.Dataset(IMAGES.at[jnp.arange(20), 0, 1 + LABELS].add(1.0), LABELS)
LOSS = jt.losses.cross_entropy
OPTIMIZER = jt.optimizers.adam(0.02)


def init(module: Any, inputs: Any = DATA.inputs[:1], optimizer: Any = OPTIMIZER, **options: Any):
    return jt.init_state(module, optimizer, inputs, key=KEY, **options)


def make_cnn(rate: float = 0.3) -> Any:
    torch.manual_seed(1)
    return Cnn(rate)


def test_a_fit_resumes_and_its_file_predicts(tmp_path) -> None:
    module = make_cnn()
    options = {"loss_fn": LOSS, "batch_size": 8, "metric_fns": {"accuracy": jt.metrics.accuracy}}

    def fit(epochs: int, **others: Any) -> Any:
        return jt.fit(init(module), DATA, DATA, epochs=epochs, key=KEY, **options, **others)

    state, history = fit(20, callbacks=[])
    assert history["test_accuracy"][-1] > 0.9
    checkpoint = [jt.callbacks.checkpoint(tmp_path / "run")]
    fit(10, callbacks=checkpoint)
    resumed, _ = fit(20, callbacks=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)

    outputs = jt.predict(state, DATA.inputs)
    jt.export.stablehlo(state, tmp_path / "model.stablehlo", DATA.inputs[:1])
    predict = jt.export.load_stablehlo(tmp_path / "model.stablehlo")
    for count in (1, 7):
        np.testing.assert_allclose(
            predict(DATA.inputs[:count]), outputs[:count], rtol=1e-5, atol=1e-5
        )
    jt.save(tmp_path / "model.safetensors", state)
    loaded = jt.load(tmp_path / "model.safetensors", init(make_cnn()))
    np.testing.assert_array_equal(jt.predict(loaded, DATA.inputs), outputs)


def test_runs_under_vmap_equal_single_runs() -> None:
    module = make_cnn()

    def run(learning_rate: Any, seed: Any) -> Any:
        optimizer = jt.optimizers.sgd(learning_rate)
        state = jt.init_state(module, optimizer, DATA.inputs[:1], key=jax.random.key(seed))
        return jt.train(state, DATA, loss_fn=LOSS, epochs=1, batch_size=8)

    rates = jnp.array([0.01, 0.1])
    result = jt.sweep(run, {"learning_rate": rates, "seed": jnp.array([3])})
    found = np.ravel(result["train_loss"])
    alone = [run(rate, 3)[1]["train_loss"][0] for rate in rates]
    np.testing.assert_allclose(found, np.ravel(alone), rtol=1e-5)


def test_equal_modules_are_one_program() -> None:
    module = make_cnn()
    model = init(module).model
    assert init(module).model == init(make_cnn()).model == model
    assert hash(init(make_cnn()).model) == hash(model)
    assert init(make_cnn(0.5)).model != model
    module.dropout.p = 0.4
    assert init(module).model != model
    module.dropout.p = 0.3
    module.conv.weight.requires_grad_(False)
    assert init(module).model != model
    assert "Dropout(p=0.3" in repr(model)


def test_arrays_that_are_attributes_are_constants() -> None:
    module = torch_networks.Function(lambda self, x: x * self.scale + torch.tensor([1.0, 2.0]))
    ones, found = jnp.ones((3, 2)), []
    for scale in (2.0, 3.0):
        module.scale = torch.full((2,), scale)
        found.append(init(module, ones))
    assert found[0].model != found[1].model
    assert_close(
        [jt.predict(state, ones)[0] for state in found], [np.array([3.0, 4]), np.array([4.0, 5])]
    )


def test_each_dropout_has_its_own_mask_in_each_step() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    ones = jnp.ones((8, 64))
    state = init(module, ones)

    def kept(step: int) -> Any:
        key = jax.random.fold_in(state.key, step)
        return state.model.apply({}, {}, ones, train=True, key=key)[0]

    assert set(np.unique(kept(0))) == {0.0, 4.0}  # one mask would give 0 and 4 in half
    assert abs((np.asarray(kept(0)) > 0).mean() - 0.25) < 0.08
    assert (kept(0) != kept(1)).any()


def test_a_vae_draws_in_training_alone() -> None:
    inputs = jnp.ones((3, 8))
    state = init(torch_networks.Vae(noise=1.0), inputs)
    draw = lambda key: state.model.apply(  # noqa: E731
        state.params, {}, inputs, train=True, key=jax.random.key(key)
    )[0][0]
    assert (draw(0) != draw(1)).all()


def test_frozen_parameters_stay_and_shared_ones_are_one_leaf() -> None:
    gpt = torch_networks.Gpt()
    gpt.wpe.weight.requires_grad_(False)
    tokens = make_inputs((Tokens(11, (6,)),))
    state = init(gpt, tokens, jt.optimizers.adamw(0.1, weight_decay=0.5))
    assert "head" not in state.params
    assert "wpe" not in state.params
    after, _ = jt.train_step(state, jt.Dataset(jnp.asarray(tokens), jnp.zeros(BATCH)), loss_fn)
    trained = jt.to_module(after)
    assert torch.equal(trained.wpe.weight, gpt.wpe.weight)
    assert not trained.wpe.weight.requires_grad
    assert trained.head.weight is trained.wte.weight
    assert not torch.equal(trained.wte.weight, gpt.wte.weight)


def test_call_says_how_the_module_is_called() -> None:
    def call(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
        return module(inputs["pixels"] / 255) * (2 if train else 1)

    pixels = np.arange(72, dtype=np.uint8).reshape(2, 1, 6, 6) ** 2
    scaled = np.float32(pixels / 255)
    module = make_cnn(0.0)
    state = init(module, {"pixels": pixels}, call=call)
    assert_close(
        jt.predict(state, {"pixels": pixels}),
        call_torch(module, scaled, train=False),
    )
    found, _ = state.model.apply(
        state.params, state.model_state, {"pixels": jnp.asarray(pixels)}, train=True, key=KEY
    )
    assert_close(found, 2 * call_torch(module, np.float32(pixels / 255), train=True))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, nodes: Any, adjacency: Any) -> Any:
        return adjacency @ self.layer(nodes)


@pytest.mark.parametrize("shape", [(5, 6, 3), (6, 3)], ids=["graphs", "nodes of one graph"])
def test_shared_arrays_follow_the_inputs(shape: Any) -> None:
    rng = np.random.default_rng(0)
    nodes, adjacency = (rng.normal(size=size).astype(np.float32) for size in (shape, (6, 6)))
    targets = rng.normal(size=(*shape[:-1], 1)).astype(np.float32)
    data = jt.Dataset(nodes, targets, shared=adjacency)
    module = Graph()
    size, of_nodes = (6, True) if len(shape) == 2 else (2, False)  # 5 graphs: a partial batch
    state = init(module, data, optax.sgd(0.01), independent_examples=not of_nodes)
    state, history = jt.fit(
        state, data, loss_fn=jt.losses.mean_squared_error, epochs=2, batch_size=size, callbacks=[]
    )
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.01), []
    batches = [torch.tensor(x).split(size) for x in (nodes, targets)]
    for x, y in [*zip(*batches, strict=True)] * 2:
        optimizer.zero_grad()
        losses.append(F.mse_loss(module(x, torch.tensor(adjacency)), y))
        losses[-1].backward()
        optimizer.step()
    assert_close(history.step_losses, np.array([float(x.detach()) for x in losses], np.float32))
    assert_close(flat(state.params), dict(module.named_parameters()))


def test_a_module_in_double_precision_comes_back_in_it() -> None:
    with jax.enable_x64(True):
        module = nn.Linear(3, 1).double()
        trained = jt.to_module(init(module, np.ones((2, 3))))
    assert torch.equal(trained.weight, module.weight)


def test_inputs_of_another_length_are_exported_anew() -> None:
    module = torch_networks.Recurrent("GRU")
    state = init(module, make_inputs((Tokens(7, (5,)),)))
    for length in (3, 5):
        tokens = make_inputs((Tokens(7, (length,)),))
        assert_close(jt.predict(state, tokens), call_torch(module, tokens, train=False))


def test_statistics_are_recomputed_as_by_update_bn() -> None:
    module = make_cnn(0.0)
    state = jt.update_batch_stats(init(module), DATA, batch_size=5)
    batches = torch.tensor(np.asarray(DATA.inputs)).split(5)
    torch.optim.swa_utils.update_bn(batches, module)
    for name in ("running_mean", "running_var"):
        assert_close(state.model_state["norm"][name], getattr(module.norm, name))


def test_a_summary_has_the_layers() -> None:
    summary = jt.summary(init(make_cnn()), DATA.inputs[:4])
    layers = {layer.path: layer for layer in summary.layers}
    assert list(layers) == ["", "conv", "norm", "dropout", "out"]
    assert layers["conv"].parameters == 30
    assert [x.shape for x in layers["conv"].outputs] == [(4, 3, 4, 4)]
    assert [x.shape for x in layers["out"].inputs] == [(4, 12)]


def test_half_precision_computes_in_it() -> None:
    state = init(jt.mixed_precision(make_cnn(0.0)))
    _, metrics = jt.train_step(state, DATA, LOSS)
    exact = jt.train_step(init(make_cnn(0.0)), DATA, LOSS)[1]["loss"]
    np.testing.assert_allclose(metrics["loss"], exact, rtol=0.02)
    assert metrics["loss"] != exact


def test_an_operation_may_be_registered() -> None:
    from jaxtrain.adapters.torch import register

    @torch.library.custom_op("jaxtrain_test::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_fake(torch.empty_like)
    module = torch_networks.Function(lambda self, x: cube(self.out(x)), out=nn.Linear(4, 3))
    inputs = jnp.ones((2, 4))
    with pytest.raises(jt.errors.InputError, match=r"jaxtrain_test.cube.*no rule.*register\('jax"):
        init(module, inputs)
    register("jaxtrain_test.cube")(lambda x: x**3)
    assert_close(jt.predict(init(module, inputs), inputs), module(torch.ones(2, 4)))


def simple(default: Any) -> Any:
    """Returns a default as one value, if it is a list of equal ones."""
    values = default if isinstance(default, list | tuple) else [default]
    return values[0] if len(set(values)) == 1 else None


def test_rules_have_the_defaults_of_pytorch() -> None:
    from jaxtrain.adapters.torch import _rules, load_rules

    load_rules()
    compared = 0
    for name, rule in _rules.RULES.items():
        library, operation, *overload = name.split(".")
        if library == "prims":  # whose functions may have another form in PyTorch
            continue
        for form in (operation, f"{operation}_"):
            packet = getattr(torch.ops.aten, form, None)
            for other in packet.overloads() if packet else ():
                is_other = overload not in ([], [other]) or f"{name}.{other}" in _rules.RULES
                if is_other or other in ("t", "padding", "prim_other") or "out" in other:
                    continue
                found = list(inspect.signature(rule.function).parameters.values())
                schema = getattr(packet, other)._schema.arguments
                if schema and str(schema[0].type) != "Tensor":
                    continue
                for ours, theirs in zip(found, schema, strict=False):
                    if ours.kind == ours.VAR_POSITIONAL or theirs.kwarg_only:
                        break
                    if theirs.has_default_value():
                        assert simple(ours.default) == simple(theirs.default_value), (name, other)
                        compared += 1
    assert compared > 100


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def branch(self: Any, x: Any) -> Any:
    return x if x.sum() > 0 else -x


def sequence_first() -> Any:
    return torch_networks.Function(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(4, 2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (branch, r"depends on the values.*test_torch_modules.py:\d+ \(return x if x.sum\(\)"),
        (lambda self, x: x * x.sum().item(), r"\.item\(\).*expected tensors"),
        (lambda self, x: Double.apply(x), r"autograd function Double, called at test_torch"),
        (lambda self, x: x[x > 0].mean() * x, r"aten.index.*failed in JAX"),
        (lambda self, x: x.view(13, 4), r"fixed number of examples.*x.shape\[0\]"),
        (lambda self, x: x.numpy(), r"cannot run Function, called at test_torch"),
        (lambda self, x: x.mode(1)[0], r"the operation aten.*no rule in JAX"),
        (lambda self, x: x + torch.rand_like(x), "draws random numbers in evaluation"),
        (sequence_first, "batch_first=True"),
        (lambda: nn.BatchNorm1d(4, momentum=None), r"batchnorm.py:\d+ \(exponential_average"),
        (lambda: nn.LazyLinear(3), r"weight of LazyLinear has no shape yet; call the module once"),
        (lambda: nn.Linear(4, 3, device="meta"), r"weight of Linear is on the device meta"),
        (lambda: nn.DataParallel(nn.Linear(4, 3)), "is a DataParallel; expected its module"),
        (lambda: torch.jit.script(nn.Linear(4, 3)), r"compiled by torch.jit or torch.compile"),
        (lambda: torch.compile(nn.Linear(4, 3)), r"compiled by torch.jit or torch.compile"),
        (lambda: torch.ao.nn.quantized.Linear(4, 3), "has the quantized layer Linear"),
        (lambda: nn.Linear(5, 3), r"cannot run Linear.*on inputs of \(batch, 4\) float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_computed_is_one_sentence(make: Any, match: str, capfd: Any) -> None:
    takes_inputs = make.__code__.co_argcount == 2
    module = torch_networks.Function(make) if takes_inputs else make()
    with pytest.raises(jt.errors.InputError, match=match) as caught:
        init(module, jnp.ones((1, 4)))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_batch_of_one_example_warns_and_has_a_finite_variance() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = make_inputs([(3,)], 9), np.zeros(9, np.int32)
    state = jt.init_state(module, jt.optimizers.sgd(0.1), x[:1], key=KEY)
    with pytest.warns(UserWarning, match=r"has one example, so batch norm \(1\)"):
        state, _ = jt.fit(
            *(state, (x, y)), loss_fn=jt.losses.cross_entropy, epochs=1, batch_size=8, callbacks=[]
        )
    assert np.isfinite(state.model_state["1"]["running_var"]).all()


def test_bernoulli_draws_with_one_half_unless_it_has_a_probability() -> None:
    class Masked(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.empty_like(x).bernoulli_(), torch.empty_like(x).bernoulli_(0.9)

    x = np.zeros((1000, 3), np.float32)
    state = jt.init_state(*(Masked(), jt.optimizers.sgd(0.1), x), key=KEY, draws_in_evaluation=True)
    half, most = jt.predict(state, x, key=KEY)
    np.testing.assert_allclose([half.mean(), most.mean()], [0.5, 0.9], atol=0.03)
