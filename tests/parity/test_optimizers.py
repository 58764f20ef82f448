"""Optimizers compared with those of torch.optim, on a small network and on arbitrary gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxtrain as jt
from jaxtrain.optimizers import Stop

torch = pytest.importorskip("torch")

from benchmarks import torch_reference  # noqa: E402

STEPS, BATCH_SIZE, FEATURES = 200, 16, (16, 12, 4)
STEPS_PER_EPOCH = 10  # for schedules

# Optimizers and their options that differ from the defaults; lr stands for learning_rate.
CASES: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.05, "weight_decay": 0.01},
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
    "adam": [
        {"lr": 0.003},
        {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.01},
        {"lr": 0.003, "amsgrad": True, "betas": (0.9, 0.9)},
    ],
    "adamw": [
        {"lr": 0.003},
        {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
        {"lr": 0.003, "amsgrad": True, "betas": (0.9, 0.9)},
    ],
    "rmsprop": [
        {"lr": 0.001},
        {"lr": 0.001, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.01},
        {"lr": 0.001, "centered": True, "eps": 1e-4},
        {"lr": 0.0005, "momentum": 0.9},
        {"lr": 0.0005, "momentum": 0.5, "centered": True, "eps": 1e-4},
    ],
    "rprop": [
        {"lr": 0.001},
        {"lr": 0.001, "etas": (0.6, 1.1), "step_sizes": (1e-5, 0.005)},
        {"lr": 0.1, "step_sizes": (1e-6, 0.01)},
    ],
    "adagrad": [
        {"lr": 0.02},
        {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.01},
        {"lr": 0.05, "initial_accumulator_value": 0.1, "eps": 1e-3},
    ],
    "adadelta": [
        {},
        {"lr": 0.5, "rho": 0.8, "eps": 1e-5, "weight_decay": 0.01},
    ],
}
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "lbfgs": torch.optim.LBFGS,
}


@pytest.fixture(scope="module")
def data() -> jt.Dataset:
    """200 batches of 16 examples, 8 features, 4 classes by a random linear rule."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(STEPS * BATCH_SIZE, 8)).astype(np.float32)
    labels = (inputs @ random.normal(size=(8, 4))).argmax(axis=1).astype(np.int32)
    return jt.Dataset(jnp.asarray(inputs), jnp.asarray(labels))


class Pair(NamedTuple):
    """An optimizer, PyTorch's for some parameters, and PyTorch's schedule of it."""

    ours: optax.GradientTransformation
    theirs: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None


def assert_same_training(data: jt.Dataset, pairs: list[Pair], dtype: str = "float32") -> None:
    """Compares the loss of each step and the final parameters, from the same initial parameters.

    All of ours train in one program.
    """
    state = jt.init_state(
        jt.models.FeedForward(FEATURES, dropout_rate=0.0, mean=0.0, std=1.0),
        pairs[0].ours,
        data.inputs[:1],
        key=jax.random.key(3),
    )
    start = jax.tree.map(lambda leaf: leaf.astype(dtype), state.params)
    inputs, labels = np.asarray(data.inputs, dtype), np.array(data.targets)

    @jax.jit
    def train(start: Any) -> Any:
        def loss_of(params: Any, batch: Any) -> Any:
            logits, _ = state.model.apply(params, {}, batch[0], train=False, key=None)
            return jt.losses.cross_entropy(logits, batch[1]).mean()

        def step(carry: Any, batch: Any) -> Any:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for p, _ in carry))
            losses, grads = jax.vmap(jax.value_and_grad(loss_of), (0, None))(stacked, batch)
            after = []
            for index, (pair, (params, opt_state)) in enumerate(zip(pairs, carry, strict=True)):
                own = jax.tree.map(lambda leaf, i=index: leaf[i], grads)
                updates, opt_state = pair.ours.update(own, opt_state, params)
                after.append((optax.apply_updates(params, updates), opt_state))
            return after, losses

        batches = jax.tree.map(
            lambda x: x.reshape((STEPS, BATCH_SIZE, *x.shape[1:])), (inputs, labels)
        )
        after, losses = jax.lax.scan(
            step, [(start, pair.ours.init(start)) for pair in pairs], batches
        )
        return losses.T, [params for params, _ in after]

    tensors = torch.tensor(inputs), torch.tensor(labels).long()
    batches = [*torch_reference.slices(*tensors, BATCH_SIZE)]
    for pair, losses, params in zip(pairs, *train(start), strict=True):
        model = torch_reference.feed_forward(FEATURES, 8, dropout_rate=0.0)
        model.to(getattr(torch, dtype))
        torch_reference.load(model, start)
        optimizer = pair.theirs(model.parameters())
        scheduler = pair.scheduler(optimizer) if pair.scheduler else None
        expected_losses = []
        for step, batch in enumerate(batches):
            expected_losses += torch_reference.train_steps(
                model, optimizer, [batch], torch.nn.functional.cross_entropy
            )
            if scheduler is not None and (step + 1) % STEPS_PER_EPOCH == 0:
                scheduler.step()
        expected = flat(torch_reference.read_params(model))
        np.testing.assert_allclose(losses, torch.stack(expected_losses), rtol=0, atol=1e-5)
        np.testing.assert_allclose(flat(params), expected, rtol=0, atol=1e-5)
        moved = np.linalg.norm(expected - flat(start))
        assert moved > 0.3 * np.linalg.norm(flat(start))


def flat(params: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize("name", CASES)
def test_200_steps_match_pytorch(name: str, data: jt.Dataset) -> None:
    pairs = [
        Pair(
            getattr(jt.optimizers, name)(
                **{("learning_rate" if key == "lr" else key): x for key, x in options.items()}
            ),
            functools.partial(TORCH[name], **options),
        )
        for options in CASES[name]
    ]
    # Rprop uses signs of gradients. In float32, rounding flips some of them, and two
    # implementations soon diverge.
    dtype = "float64" if name == "rprop" else "float32"
    with jax.enable_x64(dtype == "float64"):
        assert_same_training(data, pairs, dtype)


def test_lbfgs_solves_least_squares_in_as_few_evaluations_as_pytorch() -> None:
    """Twenty unknowns, sixty equations; both stop at the same largest gradient entry."""
    random = np.random.default_rng(0)
    matrix = random.normal(size=(60, 20)).astype(np.float32)
    right = random.normal(size=60).astype(np.float32)
    solution = np.linalg.lstsq(matrix.astype(float), right.astype(float), rcond=None)[0]
    tolerance = 2e-4

    result = jax.jit(
        lambda start: jt.minimize(
            lambda x: jnp.sum((matrix @ x - right) ** 2),
            start,
            jt.optimizers.lbfgs(),
            max_steps=100,
            gradient_tolerance=tolerance,
        )
    )(jnp.zeros(20))

    x = torch.zeros(20, requires_grad=True)
    theirs = torch.optim.LBFGS(
        [x], max_iter=100, tolerance_grad=tolerance, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        theirs.zero_grad()
        loss = ((torch.tensor(matrix) @ x - torch.tensor(right)) ** 2).sum()
        loss.backward()
        return loss

    theirs.step(closure)
    np.testing.assert_allclose(result.params, solution, rtol=0, atol=1e-5)
    assert result.evaluations <= 1.2 * theirs.state[x]["func_evals"]
    assert Stop(result.stop).message == "gradient below the tolerance"


def test_step_lr_matches_pytorch(data: jt.Dataset) -> None:
    """Twenty epochs of ten steps; the rate falls by 0.8 every two epochs."""
    assert_same_training(
        data,
        [
            Pair(
                make(jt.optimizers.step_lr(rate, 2, 0.8, steps_per_epoch=STEPS_PER_EPOCH)),
                functools.partial(theirs, lr=rate),
                lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8),
            )
            for make, theirs, rate in (
                (jt.optimizers.sgd, torch.optim.SGD, 0.2),
                (jt.optimizers.adam, torch.optim.Adam, 0.01),
            )
        ],
    )


@pytest.mark.parametrize("name", TORCH)
def test_names_and_defaults_match_torch_optim(name: str) -> None:
    expected = {
        ("learning_rate" if key == "lr" else key): parameter.default
        for key, parameter in inspect.signature(TORCH[name]).parameters.items()
    }
    for key, parameter in inspect.signature(getattr(jt.optimizers, name)).parameters.items():
        assert parameter.default == expected[key], key


fractions = st.floats(0.0, 0.99)
small = st.sampled_from([0.0, 1e-4, 0.1])
# eps keeps its default: with a gradient of 0 and eps=0, Adam and RMSprop divide 0 by 0.
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": fractions, "dampening": fractions, "weight_decay": small},
    "adam": {
        "betas": st.tuples(fractions, fractions),
        "amsgrad": st.booleans(),
        "weight_decay": small,
    },
    "adamw": {
        "betas": st.tuples(fractions, fractions),
        "amsgrad": st.booleans(),
        "weight_decay": small,
    },
    "rmsprop": {"alpha": fractions, "momentum": fractions, "weight_decay": small},
    "rprop": {"etas": st.tuples(st.floats(0.1, 0.9), st.floats(1.1, 3.0))},
    "adagrad": {"lr_decay": small, "weight_decay": small},
    "adadelta": {"rho": fractions, "weight_decay": small},
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=10)
@given(drawn=st.data())
def test_steps_match_pytorch_for_any_gradients_and_options(name: str, drawn: st.DataObject) -> None:
    """Five steps in float64 on gradients of any size and sign, including 0."""
    options = {option: drawn.draw(values) for option, values in OPTIONS[name].items()}
    rate = drawn.draw(st.floats(1e-5, 1.0))
    # No product of two gradients is subnormal: XLA flushes those to 0, and PyTorch does not.
    numbers = st.floats(-100, 100).map(lambda number: number if abs(number) > 1e-150 else 0.0)
    start, *gradients = drawn.draw(hnp.arrays(np.float64, (6, 3), elements=numbers))
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = TORCH[name]([theirs], lr=rate, **options)
    with jax.enable_x64(True):
        ours = getattr(jt.optimizers, name)(rate, **options)
        params = jnp.asarray(start)
        state = ours.init(params)
        for gradient in gradients:
            theirs.grad = torch.tensor(gradient)
            optimizer.step()
            updates, state = ours.update(jnp.asarray(gradient), state, params)
            params = optax.apply_updates(params, updates)
        scale = max(1.0, np.abs(start).max())
        np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
def test_clipping_matches_pytorch(max_norm: float) -> None:
    """Twenty steps of SGD with momentum."""
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=3), random.normal(size=(20, 3)) * 3
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    theirs = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    ours = jt.optimizers.clip_gradients(jt.optimizers.sgd(0.1, momentum=0.9), max_norm)
    params = {"a": jnp.asarray(start[:1], jnp.float32), "b": jnp.asarray(start[1:], jnp.float32)}
    state = ours.init(params)
    for gradient in gradients.astype(np.float32):
        parameter.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        theirs.step()
        grads = {"a": jnp.asarray(gradient[:1]), "b": jnp.asarray(gradient[1:])}
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    found = np.concatenate([params["a"], params["b"]])
    np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=2e-6, atol=1e-6)
