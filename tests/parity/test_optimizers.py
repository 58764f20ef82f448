"""Each optimizer and option beside torch.optim's: a small network, 200 steps, the same batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxtrain as jt
from benchmarks import torch_reference

STEPS, BATCH_SIZE, FEATURES = 200, 16, (16, 12, 4)

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


def train_both(
    data: jt.Dataset,
    ours: optax.GradientTransformation,
    make_theirs: object,
    make_scheduler: object = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(our parameters, PyTorch's, the start's) after the same steps, each as one vector."""
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

    state, _ = jt.train_epoch(state, data, jt.losses.cross_entropy, batch_size=BATCH_SIZE)
    inputs, targets = torch.tensor(np.array(data.inputs)), torch.tensor(np.array(data.targets))
    for step, batch in enumerate(torch_reference.slices(inputs, targets.long(), BATCH_SIZE)):
        torch_reference.train_steps(model, optimizer, [batch], torch.nn.functional.cross_entropy)
        if scheduler is not None and (step + 1) % 10 == 0:
            scheduler.step()
    return flat(state.params), flat(torch_reference.read_params(model)), start


def flat(params: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize("case", CASES)
def test_parameters_after_200_steps(case: str, data: jt.Dataset) -> None:
    options, theirs = CASES[case]
    torch_options = {("lr" if name == "learning_rate" else name): v for name, v in options.items()}
    ours, expected, start = train_both(
        data,
        jt.optimizers.OPTIMIZERS[case.split()[0]](**options),
        lambda params: theirs(params, **torch_options),
    )
    assert np.linalg.norm(expected - start) > 0.3 * np.linalg.norm(start)  # they moved
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


def test_step_lr(data: jt.Dataset) -> None:
    """Twenty epochs of ten steps; the rate falls by 0.8 every two epochs."""
    schedule = jt.optimizers.step_lr(0.1, step_size=2, gamma=0.8, steps_per_epoch=10)
    ours, expected, _ = train_both(
        data,
        jt.optimizers.sgd(schedule, momentum=0.5),
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.5),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8),
    )
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_defaults_are_torch_optims(name: str, theirs: type) -> None:
    import inspect

    expected = {
        ("learning_rate" if key == "lr" else key): parameter.default
        for key, parameter in inspect.signature(theirs).parameters.items()
    }
    for key, parameter in inspect.signature(jt.optimizers.OPTIMIZERS[name]).parameters.items():
        assert parameter.default == expected[key], key
