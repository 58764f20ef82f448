"""Learning rate schedules compared with those of torch.optim.lr_scheduler, step by step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

torch = pytest.importorskip("torch")
lr_scheduler = torch.optim.lr_scheduler

RATE, STEPS = 0.3, 60


def torch_rates(make_scheduler: Any, steps: int = STEPS) -> list[float]:
    """Returns the rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], RATE)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(schedule: optax.Schedule, steps: int = STEPS) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (
            jt.optimizers.cosine_annealing_lr(RATE, 20),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
        ),
        (
            jt.optimizers.cosine_annealing_lr(RATE, 70, 0.01),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 70, 0.01),
        ),
        (jt.optimizers.linear_lr(RATE), lr_scheduler.LinearLR),
        (
            jt.optimizers.linear_lr(RATE, 0.1, 0.5, 30),
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 0.5, 30),
        ),
        (
            optax.join_schedules(
                [
                    jt.optimizers.linear_lr(RATE, 0.1, total_iters=10),
                    jt.optimizers.cosine_annealing_lr(RATE, 50),
                ],
                [10],
            ),
            lambda optimizer: lr_scheduler.SequentialLR(
                optimizer,
                [
                    lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
                    lr_scheduler.CosineAnnealingLR(optimizer, 50),
                ],
                [10],
            ),
        ),
    ],
    ids=["cosine twice", "part of a cosine", "linear", "linear options", "warmup and cosine"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`")
def test_schedules_match_pytorch(schedule: optax.Schedule, theirs: Any) -> None:
    np.testing.assert_allclose(our_rates(schedule), torch_rates(theirs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [9, 60])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anneal_strategy": "linear"},
        {"pct_start": 0.1, "div_factor": 10.0, "final_div_factor": 100.0},
        {"pct_start": 0.4, "three_phase": True},
    ],
)
def test_one_cycle_matches_pytorch(options: dict, steps: int) -> None:
    if options.get("pct_start", 0.3) * steps < 1:
        pytest.skip("PyTorch divides by zero")
    expected = torch_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=steps, cycle_momentum=False, **options
        ),
        steps,
    )
    schedule = jt.optimizers.one_cycle_lr(RATE, steps, **options)
    np.testing.assert_allclose(our_rates(schedule, steps), expected, rtol=1e-5, atol=1e-7 * RATE)
    np.testing.assert_allclose(schedule(10 * steps), expected[-1], atol=1e-7 * RATE)


def test_schedules_in_epochs_are_constant_within_each_epoch() -> None:
    cosine = our_rates(jt.optimizers.cosine_annealing_lr(RATE, 20, steps_per_epoch=3))
    np.testing.assert_array_equal(
        cosine, np.repeat(our_rates(jt.optimizers.cosine_annealing_lr(RATE, 20), 20), 3)
    )
    linear = our_rates(jt.optimizers.linear_lr(RATE, 0.1, total_iters=7, steps_per_epoch=3))
    np.testing.assert_array_equal(
        linear, np.repeat(our_rates(jt.optimizers.linear_lr(RATE, 0.1, total_iters=7), 20), 3)
    )


@pytest.mark.parametrize("cooldown", [0, 2])
def test_reduce_on_plateau_of_optax_matches_pytorch_with_one_more_epoch_of_patience(
    cooldown: int,
) -> None:
    """The recipe of the guide: the mean loss of an epoch decides, as in PyTorch."""
    losses = np.array([1.0, 0.8, 0.9, 0.9, 0.79, 0.9, 0.9, 0.9, 0.9, 0.9, 0.7, 0.7, 0.7, 0.7, 0.6])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], RATE)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=cooldown)
    expected = []
    for loss in losses:
        optimizer.step()
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])

    steps_per_epoch = 4
    transform = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=2, rtol=1e-4, cooldown=cooldown, accumulation_size=steps_per_epoch
    )
    state, found = transform.init({}), []
    for loss in losses:
        for change in (-0.1, 0.1, 0.2, -0.2):
            _, state = transform.update({}, state, value=jnp.float32(loss + change))
        found.append(RATE * float(state.scale))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
