"""Trains T1's linear regression from many starts, in JAX and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
    import jax
    import jax.numpy as jnp

    import jaxtrain as jt

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
    def run(start: jax.Array) -> tuple[object, jax.Array]:
        state = fresh.replace(params={"weight": start[:1, None], "bias": start[1:]})
        trained, losses = jax.lax.scan(epoch, state, length=EPOCHS)
        return trained.params, losses

    return lambda starts: np.asarray(jax.block_until_ready(run(starts))[1])


def vmap_by_hand() -> Runs:
    """Returns all runs as one compiled call in plain JAX."""
    import jax
    import jax.numpy as jnp

    x = jnp.arange(0, 1, 0.02)
    y = 0.7 * x + 0.3

    def loss_fn(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.abs(params[0] * x + params[1] - y).mean()

    def epoch(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, x[:40], y[:40])
        params -= LEARNING_RATE * grads
        return params, jnp.stack([loss, loss_fn(params, x[40:], y[40:])])

    run = jax.jit(jax.vmap(lambda start: jax.lax.scan(epoch, start, length=EPOCHS)))
    return lambda starts: np.asarray(jax.block_until_ready(run(starts))[1])


def pytorch_runs() -> Runs:
    """Returns the tutorial's loop in eager PyTorch, one run after another."""
    import torch

    train_x, train_y, test_x, test_y = _pytorch_line()
    loss_fn = torch.nn.L1Loss()

    def run(start: np.ndarray) -> torch.Tensor:
        model = torch.nn.Linear(1, 1).to(train_x.device)
        with torch.no_grad():
            model.weight.fill_(float(start[0]))
            model.bias.fill_(float(start[1]))
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, fused=True)
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


def pytorch_batched_runs() -> Runs:
    """Returns all runs at once in eager PyTorch: each parameter is one tensor [runs]."""
    import torch

    train_x, train_y, test_x, test_y = _pytorch_line()

    def run(starts: np.ndarray) -> np.ndarray:
        weight, bias = torch.from_numpy(starts).to(train_x.device).unbind(1)
        weight, bias = (each.clone().requires_grad_() for each in (weight, bias))
        optimizer = torch.optim.SGD([weight, bias], LEARNING_RATE, fused=True)
        losses = []
        for _ in range(EPOCHS):
            loss = (train_x * weight + bias - train_y).abs().mean(0)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            with torch.inference_mode():
                losses += [loss.detach(), (test_x * weight + bias - test_y).abs().mean(0)]
        return torch.stack(losses).reshape(EPOCHS, 2, -1).permute(2, 0, 1).cpu().numpy()

    return run


def pytorch_vmap_runs() -> Runs:
    """Returns all runs at once by `torch.func`: the gradient of one run, vmapped."""
    import torch

    train_x, train_y, test_x, test_y = (part[:, 0] for part in _pytorch_line())

    def loss_fn(params: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * params[0] + params[1] - y).abs().mean()

    step = torch.func.vmap(torch.func.grad_and_value(loss_fn), in_dims=(0, None, None))
    evaluate = torch.func.vmap(loss_fn, in_dims=(0, None, None))

    @torch.no_grad()
    def run(starts: np.ndarray) -> np.ndarray:
        params = torch.from_numpy(starts).to(train_x.device)
        losses = []
        for _ in range(EPOCHS):
            grads, loss = step(params, train_x, train_y)
            params = params - LEARNING_RATE * grads
            losses += [loss, evaluate(params, test_x, test_y)]
        return torch.stack(losses).reshape(EPOCHS, 2, -1).permute(2, 0, 1).cpu().numpy()

    return run


def _pytorch_line() -> tuple:
    """Returns the inputs and targets of training and test, as columns."""
    import torch

    from benchmarks.peers.pytorch import device

    x = torch.arange(0, 1, 0.02, device=device()).unsqueeze(1)
    y = 0.7 * x + 0.3
    return x[:40], y[:40], x[40:], y[40:]


RUNS: dict[str, Callable[[], Runs]] = {
    "jaxtrain": jaxtrain_runs,
    "jax-vmap": vmap_by_hand,
    "pytorch": pytorch_runs,
    "pytorch-batched": pytorch_batched_runs,
    "pytorch-vmap": pytorch_vmap_runs,
}
