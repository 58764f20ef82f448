"""Trains many runs of one problem from different starts, at once or one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import problem
from benchmarks.problem import Optimizer

# From a task and a number of runs to a function that trains them and returns their losses: of the
# steps [runs, steps], or of T1's training and test in each epoch [runs, epochs, 2]. Run k starts
# from `problem.initial(seed=k)`.
Sweep = Callable[["Task", int], Callable[[], np.ndarray]]
# Inputs and targets.
Data = tuple[np.ndarray, np.ndarray]


class Task(NamedTuple):
    """What every run trains.

    Attributes:
      features: width of each layer; a single one is T1's line, with the mean absolute error.
      dropout_rates: fraction of the units that each dropout layer drops.
      optimizer: plain SGD.
      train: inputs [examples, ...] and targets.
      test: those of the test after each epoch, of T1 only.
      batch_size: examples per step.
      epochs: passes over the data.
    """

    features: tuple[int, ...]
    dropout_rates: tuple[float, ...]
    optimizer: Optimizer
    train: Data
    test: Data | None
    batch_size: int
    epochs: int

    @property
    def inputs(self) -> np.ndarray:
        """The training inputs as normalized floats [examples, features]."""
        inputs = self.train[0]
        if self.test is None:
            inputs = problem.normalize(inputs)
        return inputs.reshape(len(inputs), -1)

    def starts(self, runs: int) -> list[problem.Params]:
        """Returns the initial parameters of the runs."""
        fan_in = self.inputs.shape[1]
        return [problem.dense_start(self.features, fan_in, seed) for seed in range(runs)]

    def stacked_starts(self, runs: int) -> list[dict[str, np.ndarray]]:
        """Returns them by layer, stacked over the runs."""
        starts = self.starts(runs)
        return [
            {name: np.stack([each[layer][name] for each in starts]) for name in starts[0][layer]}
            for layer in starts[0]
        ]


def line() -> Task:
    """Returns T1: 200 steps on 40 points of a line, with a test on 10 others after each."""
    x = np.arange(0, 1, 0.02, dtype=np.float32)[:, None]
    y = np.float32(0.7) * x + np.float32(0.3)
    optimizer = Optimizer("sgd", 0.01)
    return Task((1,), (), optimizer, (x[:40], y[:40]), (x[40:], y[40:]), 40, 200)


def network() -> Task:
    """Returns T2 on digits: an epoch of 29 steps."""
    t2 = problem.make("T2", *problem.read_digits())
    data = t2.images, t2.labels
    return Task(t2.features, t2.dropout_rates, t2.optimizer, data, None, t2.batch_size, 1)


def jaxtrain(task: Task, runs: int) -> Callable[[], np.ndarray]:
    """Trains all runs in one compiled call of a vmapped `jt.train`."""
    import jax
    import jax.numpy as jnp

    import jaxtrain as jt
    from benchmarks.peers.jaxtrain import make_optimizer

    train = jt.Dataset(*map(jnp.asarray, task.train))
    layers: Any = [jax.tree.map(jnp.asarray, each) for each in task.stacked_starts(runs)]
    if task.test is not None:
        model: Any = jt.models.LinearRegression()
        test, params, loss_fn = task.test, layers[0], jt.losses.mean_absolute_error
    else:
        rate = task.dropout_rates[0]
        model = jt.models.FeedForward(task.features, rate, problem.MEAN, problem.STD)
        params = {f"Dense_{index}": layer for index, layer in enumerate(layers)}
        test, loss_fn = None, jt.losses.cross_entropy
    optimizer = make_optimizer(task.optimizer)
    fresh = jt.init_state(model, optimizer, train.inputs[:1], key=jax.random.key(0))
    options: Any = {"epochs": task.epochs, "batch_size": task.batch_size}

    @jax.jit
    @jax.vmap  # as in `jt.sweep`, which would compile again in each call
    def run(params: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state = fresh.replace(params=params, key=key)
        state, history = jt.train(state, train, test, loss_fn=loss_fn, **options)
        losses = history["step_losses"]
        if test is not None:
            losses = jnp.stack([losses.ravel(), history["test_loss"]], axis=-1)
        # Without the parameters, XLA could leave out the last update.
        return state.params, losses if test is not None else losses[0]

    keys = jax.random.split(jax.random.key(0), runs)
    return lambda: np.asarray(jax.block_until_ready(run(params, keys))[1])


def pytorch(task: Task, runs: int) -> Callable[[], np.ndarray]:
    """Trains one run after another in eager PyTorch."""
    import torch

    from benchmarks import torch_reference
    from benchmarks.peers.pytorch import device, make_optimizer

    inputs, targets, test = _pytorch_data(task)
    loss_fn = torch.nn.L1Loss() if test else torch.nn.CrossEntropyLoss()
    starts = task.starts(runs)

    def run(params: problem.Params) -> torch.Tensor:
        model: torch.nn.Module = torch.nn.Linear(1, 1)
        if test is None:
            fan_in, rate = inputs.shape[1], task.dropout_rates[0]
            model = torch_reference.feed_forward(task.features, fan_in, rate)
        torch_reference.load(model, params)
        optimizer = make_optimizer(task.optimizer, model.to(device()).parameters())
        losses = []
        for _ in range(task.epochs):
            batches = torch_reference.slices(inputs, targets, task.batch_size)
            losses += torch_reference.train_steps(model, optimizer, batches, loss_fn)
            if test:
                model.eval()
                with torch.inference_mode():
                    losses.append(loss_fn(model(test[0]), test[1]))
        return torch.stack(losses)

    def run_all() -> np.ndarray:
        torch.manual_seed(0)
        return _by_epoch(task, torch.stack([run(params) for params in starts]))

    return run_all


def pytorch_batched(task: Task, runs: int) -> Callable[[], np.ndarray]:
    """Trains all runs at once in eager PyTorch: each parameter is one tensor, with baddbmm."""
    import torch
    from torch.nn import functional as F

    from benchmarks.peers.pytorch import make_optimizer

    inputs, targets, test = _pytorch_data(task)
    layers = task.stacked_starts(runs)

    def line_losses(params: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * params[0] + params[1] - y).abs().mean(0)

    def losses(params: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.expand(runs, -1, -1), y.expand(runs, -1)
        rates = task.dropout_rates
        for weight, bias, rate in zip(params[:-2:2], params[1:-2:2], rates, strict=True):
            x = F.dropout(torch.baddbmm(bias, x, weight).relu(), rate)
        logits = torch.baddbmm(params[-1], x, params[-2])
        each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        return each.reshape(runs, -1).mean(1)

    def run() -> np.ndarray:
        torch.manual_seed(0)
        params = []
        for layer in layers:
            arrays = layer["weight"].transpose(0, 2, 1), layer["bias"][:, None]
            for array in (each.reshape(runs) for each in arrays) if test else arrays:
                tensor = torch.tensor(np.ascontiguousarray(array), device=inputs.device)
                params.append(tensor.requires_grad_())
        optimizer = make_optimizer(task.optimizer, params)
        loss_fn = line_losses if test else losses
        found = []
        for _ in range(task.epochs):
            for first in range(0, len(inputs), task.batch_size):
                part = slice(first, first + task.batch_size)
                loss = loss_fn(params, inputs[part], targets[part])
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                found.append(loss.detach())
            if test:
                with torch.inference_mode():
                    found.append(loss_fn(params, *test))
        return _by_epoch(task, torch.stack(found, 1))

    return run


def _pytorch_data(task: Task) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Returns inputs, targets and the test, on the device."""
    import torch

    from benchmarks.peers.pytorch import device

    if task.test is None:
        return (
            torch.from_numpy(task.inputs).to(device()),
            torch.from_numpy(task.train[1].astype(np.int64)).to(device()),
            None,
        )
    x, y, *test = (torch.from_numpy(part).to(device()) for part in (*task.train, *task.test))
    return x, y, (test[0], test[1])


def _by_epoch(task: Task, losses: Any) -> np.ndarray:
    """Returns losses [runs, steps], or of T1 [runs, epochs, 2]."""
    found = losses.cpu().numpy()
    return found if task.test is None else found.reshape(len(found), -1, 2)


SWEEPS: dict[str, Sweep] = {
    "jaxtrain": jaxtrain,
    "pytorch": pytorch,
    "pytorch-batched": pytorch_batched,
}
