"""Trains many networks from different starts, at once or one after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.problem import Problem, normalize, start

# From a number of networks to a function that trains them for an epoch and returns their losses
# [networks, steps]. Network k starts from `start(problem, seed=k)`.
Sweep = Callable[[int], Callable[[], np.ndarray]]


def _stacked_starts(problem: Problem, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the initial parameters of each layer, stacked over the networks."""
    starts = [start(problem, seed) for seed in range(count)]
    return [
        {name: np.stack([each[layer][name] for each in starts]) for name in starts[0][layer]}
        for layer in starts[0]
    ]


def jaxtrain_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains all networks in one compiled call of a vmapped `jt.train`."""
    import jax
    import jax.numpy as jnp

    import jaxtrain as jt
    from benchmarks.peers import jaxtrain as peer

    state, data = peer.start(problem, start(problem))

    def train(params: object, key: jax.Array) -> tuple[object, jax.Array]:
        fresh = state.replace(params=params, key=key)
        trained, history = jt.train(
            fresh, data, loss_fn=peer.LOSS, epochs=1, batch_size=problem.batch_size
        )
        # Without the parameters, XLA could leave out the last update.
        return trained.params, history["step_losses"][0]

    run = jax.jit(jax.vmap(train))  # as in `jt.sweep`, which would compile again in each call

    def sweep(count: int) -> Callable[[], np.ndarray]:
        layers = _stacked_starts(problem, count)
        params = {f"Dense_{i}": jax.tree.map(jnp.asarray, each) for i, each in enumerate(layers)}
        keys = jax.random.split(jax.random.key(0), count)
        return lambda: np.asarray(jax.block_until_ready(run(params, keys))[1])

    return sweep


def pytorch_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains one network after another in eager PyTorch."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks import torch_reference
    from benchmarks.networks import torch as networks
    from benchmarks.peers import pytorch

    inputs, targets = _pytorch_data(problem)

    def sweep(count: int) -> Callable[[], np.ndarray]:
        starts = [start(problem, seed) for seed in range(count)]

        def run() -> np.ndarray:
            torch.manual_seed(0)
            losses = []
            for params in starts:
                model = networks.make(problem, params).to(inputs.device)
                optimizer = pytorch.make_optimizer(problem.optimizer, model.parameters())
                batches = torch_reference.slices(inputs, targets, problem.batch_size)
                found = torch_reference.train_steps(model, optimizer, batches, cross_entropy)
                losses.append(torch.stack(found))
            return torch.stack(losses).cpu().numpy()

        return run

    return sweep


def pytorch_baddbmm_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains all networks at once, by `torch.baddbmm` on stacked layers."""
    import torch
    from torch.nn import functional as F

    from benchmarks.peers import pytorch

    inputs, targets = _pytorch_data(problem)
    rates = problem.dropout_rates

    def sweep(count: int) -> Callable[[], np.ndarray]:
        layers = _stacked_starts(problem, count)

        def run() -> np.ndarray:
            torch.manual_seed(0)
            params = [
                torch.from_numpy(np.ascontiguousarray(array)).to(inputs.device).requires_grad_()
                for layer in layers
                for array in (layer["weight"].transpose(0, 2, 1), layer["bias"][:, None])
            ]
            optimizer = pytorch.make_optimizer(problem.optimizer, params)
            losses = []
            for first in range(0, len(inputs), problem.batch_size):
                x = inputs[first : first + problem.batch_size].expand(count, -1, -1)
                y = targets[first : first + problem.batch_size].expand(count, -1)
                for weight, bias, rate in zip(params[:-2:2], params[1:-2:2], rates, strict=True):
                    x = F.dropout(torch.baddbmm(bias, x, weight).relu(), rate)
                logits = torch.baddbmm(params[-1], x, params[-2])
                each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
                loss = each.reshape(count, -1).mean(1)
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses, 1).cpu().numpy()

        return run

    return sweep


def pytorch_vmap_sweep(problem: Problem) -> Sweep:
    """Returns the sweep that trains all networks at once, by `torch.func.vmap` of one network."""
    import torch
    from torch.nn import functional as F

    from benchmarks.networks import torch as networks

    inputs, targets = _pytorch_data(problem)
    model = networks.make(problem, start(problem)).to(inputs.device).train()

    def loss_fn(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    step = torch.func.vmap(
        torch.func.grad_and_value(loss_fn), in_dims=(0, None, None), randomness="different"
    )
    rate, decay = problem.optimizer.learning_rate, problem.optimizer.weight_decay

    def sweep(count: int) -> Callable[[], np.ndarray]:
        arrays = [layer[name] for layer in _stacked_starts(problem, count) for name in layer]
        names = [name for name, _ in model.named_parameters()]

        @torch.no_grad()
        def run() -> np.ndarray:
            torch.manual_seed(0)
            params = {
                name: torch.from_numpy(array).to(inputs.device)
                for name, array in zip(names, arrays, strict=True)
            }
            losses = []
            for first in range(0, len(inputs), problem.batch_size):
                part = slice(first, first + problem.batch_size)
                grads, loss = step(params, inputs[part], targets[part])
                params = {
                    name: value - rate * (grads[name] + decay * value)
                    for name, value in params.items()
                }
                losses.append(loss)
            return torch.stack(losses, 1).cpu().numpy()

        return run

    return sweep


def _pytorch_data(problem: Problem) -> tuple:
    """Returns inputs [examples, features] and targets on the device."""
    import torch

    from benchmarks.peers.pytorch import device

    inputs = normalize(problem.images).reshape(len(problem.images), -1)
    targets = problem.labels.astype(np.int64)
    return torch.from_numpy(inputs).to(device()), torch.from_numpy(targets).to(device())


SWEEPS: dict[str, Callable[[Problem], Sweep]] = {
    "jaxtrain": jaxtrain_sweep,
    "pytorch": pytorch_sweep,
    "pytorch-batched": pytorch_baddbmm_sweep,
    "pytorch-vmap": pytorch_vmap_sweep,
}
