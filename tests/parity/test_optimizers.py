"""Each optimizer and option beside torch.optim's: a small network, 200 steps, the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxtrain as jt
from benchmarks import torch_reference

STEPS, BATCH_SIZE, FEATURES = 200, 16, (16, 12, 4)
STEPS_PER_EPOCH = 10  # for schedules

CASES = {
    "sgd": ({"learning_rate": 0.05}, torch.optim.SGD),
    "sgd momentum": ({"learning_rate": 0.05, "momentum": 0.9}, torch.optim.SGD),
    "sgd nesterov": (
        {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True},
        torch.optim.SGD,
    ),
    "sgd dampening": (
        {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.5},
        torch.optim.SGD,
    ),
    "sgd weight decay": ({"learning_rate": 0.05, "weight_decay": 0.01}, torch.optim.SGD),
    "sgd dampening, weight decay": (
        {"learning_rate": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
        torch.optim.SGD,
    ),
    "sgd nesterov, weight decay": (
        {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        torch.optim.SGD,
    ),
    "adam": ({"learning_rate": 0.003}, torch.optim.Adam),
    "adam betas, eps, weight decay": (
        {"learning_rate": 0.003, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.01},
        torch.optim.Adam,
    ),
}


@pytest.fixture(scope="module")
def data() -> jt.Dataset:
    """200 batches of 16 examples, 8 features, 4 classes by a random linear rule."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(STEPS * BATCH_SIZE, 8)).astype(np.float32)
    labels = (inputs @ random.normal(size=(8, 4))).argmax(axis=1).astype(np.int32)
    return jt.Dataset(jnp.asarray(inputs), jnp.asarray(labels))


def assert_same_training(
    data: jt.Dataset,
    ours: optax.GradientTransformation,
    make_theirs: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> None:
    """The loss of each step and the parameters after all, from the same start on both sides."""
    state = jt.init_state(
        jt.models.FeedForward(FEATURES, dropout_rate=0.0, mean=0.0, std=1.0),
        ours,
        data.inputs[:1],
        key=jax.random.key(3),
    )
    start = flat(state.params)
    model = torch_reference.feed_forward(FEATURES, 8, dropout_rate=0.0)
    torch_reference.load_params(model, state.params)
    optimizer = make_theirs(model.parameters())
    scheduler = make_scheduler(optimizer) if make_scheduler else None

    state, losses = jt.train_epoch(state, data, jt.losses.cross_entropy, batch_size=BATCH_SIZE)
    inputs, targets = torch.tensor(np.array(data.inputs)), torch.tensor(np.array(data.targets))
    expected_losses = []
    for step, batch in enumerate(torch_reference.slices(inputs, targets.long(), BATCH_SIZE)):
        expected_losses += torch_reference.train_steps(
            model, optimizer, [batch], torch.nn.functional.cross_entropy
        )
        if scheduler is not None and (step + 1) % STEPS_PER_EPOCH == 0:
            scheduler.step()
    expected = flat(torch_reference.read_params(model))

    np.testing.assert_allclose(losses, torch.stack(expected_losses), rtol=0, atol=1e-5)
    np.testing.assert_allclose(flat(state.params), expected, rtol=0, atol=1e-5)
    assert np.linalg.norm(expected - start) > 0.3 * np.linalg.norm(start)  # they moved


def flat(params: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize("case", CASES)
def test_losses_and_parameters_of_200_steps(case: str, data: jt.Dataset) -> None:
    options, theirs = CASES[case]
    torch_options = {("lr" if name == "learning_rate" else name): v for name, v in options.items()}
    assert_same_training(
        data,
        jt.optimizers.OPTIMIZERS[case.split()[0]](**options),
        lambda params: theirs(params, **torch_options),
    )


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.2), ("adam", 0.01)])
def test_step_lr(name: str, rate: float, data: jt.Dataset) -> None:
    """Twenty epochs of ten steps; the rate falls by 0.8 every two epochs."""
    schedule = jt.optimizers.step_lr(rate, step_size=2, gamma=0.8, steps_per_epoch=STEPS_PER_EPOCH)
    theirs = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    assert_same_training(
        data,
        jt.optimizers.OPTIMIZERS[name](schedule),
        lambda params: theirs(params, rate),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8),
    )


@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_defaults_are_torch_optims(name: str, theirs: type) -> None:
    import inspect

    expected = {
        ("learning_rate" if key == "lr" else key): parameter.default
        for key, parameter in inspect.signature(theirs).parameters.items()
    }
    for key, parameter in inspect.signature(jt.optimizers.OPTIMIZERS[name]).parameters.items():
        assert parameter.default == expected[key], key
