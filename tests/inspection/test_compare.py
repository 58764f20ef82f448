"""Whether a port of a PyTorch module is right, and which mistake it has otherwise."""

from __future__ import annotations

import functools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.inspection.test_port import MODELS, Torch

torch = pytest.importorskip("torch")
F = torch.nn.functional

IMAGES = np.random.default_rng(0).normal(size=(6, 2, 6, 5)).astype(np.float32)
LABELS = np.arange(6) % 2


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Port(linen.Module):
    padding: str | int = 1
    epsilon: float = 1e-5
    approximate: bool = False
    bias: bool = True

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(3, (3, 3), strides=2, padding=self.padding, use_bias=self.bias)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.avg_pool(linen.relu(x), (2, 2), strides=(1, 1))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        x = linen.Dense(12)(x.reshape(x.shape[0], -1))
        x = linen.LayerNorm(epsilon=self.epsilon)(linen.Dense(12)(x))
        x = linen.gelu(x, approximate=self.approximate)
        return linen.Dense(4)(x / jnp.std(x, axis=-1, keepdims=True))


class Network(torch.nn.Module):
    """The network of `Port`; an option makes it another one."""

    def __init__(self, **options):
        super().__init__()
        nn, get = torch.nn, options.get
        self.options = options
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=get("padding", 1))
        self.norm = nn.BatchNorm2d(3, momentum=get("momentum", 0.1), eps=get("norm_eps", 1e-5))
        self.fc1 = nn.Linear(12, 12, bias=get("bias", True))
        self.fc2 = nn.Linear(12, 12)
        self.ln = nn.LayerNorm(12, eps=get("eps", 1e-5))
        self.head = nn.Linear(12, 4)
        self.dropout = nn.Dropout(get("rate", 0.5))
        self.pool = get("pool", nn.AvgPool2d)(2, stride=1)
        self.fc1.requires_grad_(get("trained", True))

    def forward(self, x):
        get = self.options.get
        x = self.dropout(self.pool(F.relu(self.norm(self.conv(x)))))
        x = self.fc1(get("order", lambda x: x)(x).flatten(1))
        weight = self.fc2.weight.T if get("transposed") else self.fc2.weight
        x = get("activation", F.gelu)(self.ln(F.linear(x, weight, self.fc2.bias)))
        x = self.head(x / x.std(-1, keepdim=True, correction=get("correction", 0)))
        return get("outputs", lambda x: x)(x)


@pytest.mark.parametrize("framework", MODELS)
def test_an_equal_port_is_right(framework: str) -> None:
    loss_fn = jt.losses.cross_entropy
    report = jt.compare(Torch(), MODELS[framework](), IMAGES, LABELS, loss_fn=loss_fn)
    assert report.ok, report
    assert (report.causes, report.first_layer, report.mismatch) == ((), None, None)
    quantities = {each.quantity: each.difference for each in report.differences}
    assert len(quantities) == 7
    assert max(quantities.values()) < 1e-4
    assert "the running variance of batch norm is the biased one" in report.notes[0]


TORCH = [
    ({"activation": F.silu}, "activation", "silu", "gelu", "jax.nn.silu(x)"),
    (
        {"activation": lambda x: F.leaky_relu(x, 0.2)},
        *("activation", "leaky_relu with negative_slope=0.2", "gelu", "jax.nn.leaky_relu(x, 0.2)"),
    ),
    ({"eps": 1e-3}, "epsilon", "0.001", "1e-05", "nn.LayerNorm(epsilon=0.001)"),
    ({"norm_eps": 1.1e-5}, "epsilon", "1.1e-05", "1e-05", "nn.BatchNorm(epsilon=1.1e-05)"),
    ({"momentum": 0.01}, "momentum", "0.01", "0.1 ", "nn.BatchNorm(momentum=0.99)"),
    ({"momentum": None}, "momentum", "a cumulative average", "0.1 ", "averages all batches"),
    ({"bias": False}, "bias", "no bias", "a bias", "nn.Dense(..., use_bias=False)"),
    ({"rate": 0.2}, "dropout", "0.2", "0.5", "a rate of 0.2"),
    ({"pool": torch.nn.MaxPool2d}, "pooling", "max_pool", "avg_pool", "max_pool"),
    ({"outputs": lambda x: F.softmax(x, -1)}, "activation", "softmax", "no act", "jax.nn.softmax"),
    ({"transposed": True}, "weight layout", "weight.T", "x @ weight", "weight.T"),
    ({"order": lambda x: x.transpose(2, 3)}, "flatten order", "c, h, w", "c, w, h", "x.transpose"),
    ({"correction": 1}, "variance", "n - 1", "divided by n", "ddof=1"),
    ({"trained": False}, "frozen", "requires_grad=False", "trained", "optax.set_to_zero"),
]


@pytest.mark.parametrize("case", TORCH, ids=lambda case: "-".join(case[0]))
def test_a_mistake_is_named(case) -> None:
    options, kind, theirs, ours, fix = case
    report = jt.compare(Network(**options), Port(), IMAGES)
    assert not report.ok
    assert [cause.kind for cause in report.causes] == [kind], report
    (cause,) = report.causes
    assert theirs in cause.theirs, report
    assert ours in cause.ours, report
    assert fix in cause.fix, report
    for row in report.differences:
        remaining = row.difference if row.remaining is None else row.remaining
        assert remaining <= row.tolerance, report


def test_the_order_of_a_flatten_in_pytorch_is_found() -> None:
    report = jt.compare(Network(order=lambda x: x.permute(0, 2, 3, 1)), Port(), IMAGES)
    assert report.ok, report


def test_several_mistakes_are_named_with_the_layers_of_both_sides() -> None:
    port = Port(padding="SAME", epsilon=1e-6, approximate=True, bias=False)
    module = Network(rate=0.1)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)
    report = jt.compare(module, port, IMAGES, optimizer=optimizer)
    found = {cause.kind: (cause.where, cause.fix) for cause in report.causes}
    assert found == {
        "padding": ("conv (Conv_0)", "nn.Conv(..., padding=1)"),
        "bias": ("conv (Conv_0)", "nn.Conv(..., use_bias=True)"),
        "epsilon": ("ln (LayerNorm_0)", "nn.LayerNorm(epsilon=1e-05)"),
        "activation": ("gelu after ln (LayerNorm_0)", "jax.nn.gelu(x, approximate=False)"),
        "dropout": ("dropout (Dropout_0)", "a rate of 0.1"),
    }, report
    assert report.first_layer == "conv (Conv_0)"
    assert all(x.remaining <= x.tolerance for x in report.differences), report
    assert "no known cause" not in str(report)
    assert module.training
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)

    def forward(self, x):
        found = F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True)
        return self.out(F.adaptive_avg_pool1d(found, 4))


def test_a_mask_that_is_missing_is_named() -> None:
    class Unmasked(linen.Module):
        @linen.compact
        def __call__(self, x):
            query, key, value = jnp.split(linen.Dense(12)(x), 3, axis=-1)
            weights = linen.softmax(query @ key.swapaxes(-1, -2) / 2)
            return linen.Dense(4)(weights @ value)

    report = jt.compare(Attention(), Unmasked(), IMAGES[:, 0, :, :4])
    assert [(x.kind, x.where) for x in report.causes] == [
        ("mask", "scaled_dot_product_attention after qkv (Dense_0)")
    ], report


class Defaults(torch.nn.Module):
    """Has settings that PyTorch derives, and infinite outputs."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 1, bias=False)
        self.norm, self.head = torch.nn.RMSNorm(3), torch.nn.Linear(3, 3)

    def forward(self, x):
        x = F.leaky_relu(self.head(self.norm(1e-3 * self.conv(x).mean((2, 3)))), 0.2)
        return x.masked_fill(torch.arange(3) == 2, -torch.inf)


def test_settings_that_are_left_out_and_infinite_outputs_are_compared() -> None:
    class DefaultsPort(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.RMSNorm()(1e-3 * linen.Conv(3, (1, 1))(x).mean((1, 2)))
            x = linen.leaky_relu(linen.Dense(3)(x))
            return jnp.where(jnp.arange(3) == 2, -jnp.inf, x)

    report = jt.compare(Defaults(), DefaultsPort(), IMAGES)
    assert {(x.kind, x.theirs, x.ours) for x in report.causes} == {
        ("bias", "no bias", "a bias"),
        ("epsilon", "1.19209e-07", "1e-06"),
        ("activation", "leaky_relu with negative_slope=0.2", "leaky_relu"),
    }, report
    assert all(x.remaining <= x.tolerance for x in report.differences), report


def test_outputs_without_a_value_are_never_right() -> None:
    class Undefined(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.nan

    report = jt.compare(Undefined(5, 3), linen.Dense(3), IMAGES[:, 0, 0])
    assert not report.ok
    assert len(report.differences) == 6, report  # all but buffers: NaN is not a random draw
    assert all(x.tolerance <= 1e-4 for x in report.differences), report


def test_outputs_that_cannot_be_compared_are_named() -> None:
    class Sum(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sum()

    report = jt.compare(Sum(5, 3), linen.Dense(3), IMAGES[:, 0, 0])
    assert "outputs of [[]] for 6 examples" in report.mismatch
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Unflatten(1, (1, 3)))
    report = jt.compare(module, linen.Dense(3), IMAGES[:, 0, 0])
    assert "outputs of [[6, 1, 3]], and the model of [[6, 3]]" in report.mismatch
    assert not report.ok


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.wte(tokens))


def test_weights_that_only_pytorch_ties_are_named() -> None:
    class Untied(linen.Module):
        @linen.compact
        def __call__(self, tokens: Any) -> Any:
            return linen.Dense(7, use_bias=False)(linen.Embed(7, 4)(tokens))

    report = jt.compare(Tied(), Untied(), np.arange(12).reshape(4, 3) % 7)
    (cause,) = report.causes
    assert (cause.kind, cause.where) == (
        "tied weights",
        "wte.weight (Embed_0.embedding), head.weight (Dense_0.kernel)",
    )
    assert not report.ok


def test_what_is_not_known_is_not_explained() -> None:
    report = jt.compare(Network(activation=lambda x: torch.sin(3 * x)), Port(), IMAGES)
    assert (report.causes, report.ok) == ((), False)
    assert report.first_layer == "head (Dense_2)"
    assert "no known cause explains the difference of: outputs in evaluation" in str(report)


def test_weights_that_do_not_fit_are_named() -> None:
    class Small(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(3, (3, 3))(x)
            return linen.Dense(2)(x.reshape(x.shape[0], -1))

    nn = torch.nn
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(36, 2))
    report = jt.compare(module, Small(), IMAGES)
    assert (report.differences, report.ok) == ((), False)
    assert "2 (weight [2, 36], bias [2]) has no counterpart" in report.mismatch
    assert report.mismatch in str(report).replace("\n   ", " ")


class Recurrent(eqx.Module):
    cell: eqx.nn.LSTMCell
    norm: eqx.nn.LayerNorm

    def __call__(self, x):
        state = jnp.zeros(3), jnp.zeros(3)
        return self.norm(self.cell(x, self.cell(x, state))[0])


def test_two_biases_of_pytorch_are_a_convention() -> None:
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.norm = torch.nn.LSTMCell(2, 3), torch.nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(self.cell(x, self.cell(x))[0])

    port = Recurrent(eqx.nn.LSTMCell(2, 3, key=jax.random.key(0)), eqx.nn.LayerNorm(3))
    report = jt.compare(Module(), port, IMAGES[:, :, 0, 0])
    assert report.ok, report
    assert "recurrent layers have two biases in PyTorch" in report.notes[0]


def test_random_numbers_in_training_are_named() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.RReLU())

    class Noisy(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.leaky_relu(linen.Dense(3)(x), (1 / 8 + 1 / 3) / 2)

    report = jt.compare(module, Noisy(), IMAGES[:, 0, 0])
    assert [each.quantity for each in report.differences] == ["outputs in evaluation"]
    assert report.ok, report
    assert "a side draws random numbers in training" in str(report)


LINEAR = functools.partial(torch.nn.Linear, 5, 3)


class SGD(torch.optim.SGD):
    def __init__(self, params, scale):
        super().__init__(params, lr=scale)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((linen.Dense(3), linen.Dense(3), IMAGES), {}, "expected a torch.nn.Module"),
        ((LINEAR(), object(), IMAGES), {}, "expected a Linen, NNX, Equinox"),
        ((LINEAR(), linen.Dense(3), IMAGES[..., 0]), {}, "does not take the inputs"),
        ((LINEAR(), linen.Dense(3), IMAGES, LABELS), {}, "targets is given without loss_fn"),
        ((LINEAR(), linen.Dense(3), IMAGES), {"optimizer": jt.optimizers.sgd(1.0)}, "torch.optim"),
        (
            (LINEAR(), linen.Dense(3), IMAGES),
            {"optimizer": SGD(LINEAR().parameters(), 0.1)},
            "SGD takes other arguments",
        ),
        (
            (LINEAR(), linen.Dense(3), IMAGES),
            {"loss_fn": lambda predictions, targets, params: predictions[:, 0]},
            "loss_fn takes params",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, options, message: str) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.compare(*arguments, **options)
