"""Trains T1's linear regression from many starts, in jaxtrain and in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxtrain as jt

EPOCHS = 200
LEARNING_RATE = 0.01

# From starts (weight, bias) [runs, 2] to training and test loss of each epoch [runs, epochs, 2].
Runs = Callable[[np.ndarray], np.ndarray]


def starts(count: int) -> np.ndarray:
    """Returns starts (weight, bias) [count, 2]; the first is the tutorial's."""
    drawn = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
    drawn[0] = 0.33669036626815796, 0.12880940735340118
    return drawn


def jaxtrain_runs() -> Runs:
    """Returns all runs as one compiled call: a scan over epochs, vmapped over the starts."""
    train, test = jt.data.line(0.7, 0.3)
    optimizer = jt.optimizers.sgd(LEARNING_RATE)
    model = jt.models.LinearRegression()
    fresh = jt.init_state(model, optimizer, train.inputs[:1], key=jax.random.key(0))
    loss_fn = jt.losses.mean_absolute_error

    def epoch(state: jt.TrainState, _: None) -> tuple[jt.TrainState, jax.Array]:
        state, losses = jt.train_epoch(state, train, loss_fn, batch_size=len(train))
        test_loss = jt.evaluate(state, test, loss_fn, batch_size=len(test))["loss"]
        return state, jnp.stack([losses[0], test_loss])

    @jax.jit
    @jax.vmap
    def run(start: jax.Array) -> jax.Array:
        state = fresh.replace(params={"weight": start[:1, None], "bias": start[1:]})
        return jax.lax.scan(epoch, state, length=EPOCHS)[1]

    return lambda starts: np.asarray(run(starts))


def pytorch_runs() -> Runs:
    """Returns the tutorial's loop in eager PyTorch, one run after another."""
    import torch

    from benchmarks.peers.pytorch import device

    place = device()
    x = torch.arange(0, 1, 0.02, device=place).unsqueeze(1)
    y = 0.7 * x + 0.3
    train_x, train_y, test_x, test_y = x[:40], y[:40], x[40:], y[40:]
    loss_fn = torch.nn.L1Loss()

    def run(start: np.ndarray) -> torch.Tensor:
        model = torch.nn.Linear(1, 1).to(place)
        with torch.no_grad():
            model.weight.fill_(float(start[0]))
            model.bias.fill_(float(start[1]))
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        losses = []
        for _ in range(EPOCHS):
            model.train()
            loss = loss_fn(model(train_x), train_y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.inference_mode():
                losses += [loss.detach(), loss_fn(model(test_x), test_y)]
        return torch.stack(losses).reshape(EPOCHS, 2)

    return lambda starts: np.stack([run(start).cpu().numpy() for start in starts])
