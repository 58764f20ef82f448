"""The recipe of the MNIST speedrun compared with the same recipe in PyTorch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxtrain as jt
from experiments import speedrun

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from benchmarks import problem, torch_reference  # noqa: E402
from benchmarks import speedrun as peer  # noqa: E402

STEPS = 10


def test_losses_are_those_of_the_recipe_in_pytorch() -> None:
    config = speedrun.Config()
    images, labels = problem.random_images(STEPS * config.batch_size)
    train = jt.Dataset(images, labels)
    state = speedrun.make_state(config, train, jax.random.key(0))
    theirs = peer.make_network()
    copy_params(state.params, theirs)
    optimizer, schedule = peer.make_optimizer(theirs, STEPS)
    inputs = torch.from_numpy(problem.normalize(images))
    targets = torch.from_numpy(labels).long()
    expected = []
    for x, y in torch_reference.slices(inputs, targets, peer.BATCH_SIZE):
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(x), y, label_smoothing=peer.LABEL_SMOOTHING)
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    loss_fn = speedrun.make_loss(config)
    _, losses = jt.train_epoch(state, train, loss_fn, batch_size=config.batch_size)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def copy_params(params, model) -> None:
    """Copies the parameters of the Linen network into PyTorch's."""
    layers = [each for each in model if hasattr(each, "weight")]
    names = ["Conv_0", "Conv_1", "Linear_0", "Linear_1"]
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=True):
            found = {key: np.array(value) for key, value in params[name].items()}
            if "kernel" in found:  # [height, width, inputs, outputs]
                weight = found["kernel"].transpose(3, 2, 0, 1)
            elif name == "Linear_0":  # PyTorch flattens [channels, height, width]
                weight = (
                    found["weight"].reshape(-1, 5, 5, 32).transpose(0, 3, 1, 2).reshape(-1, 800)
                )
            else:
                weight = found["weight"]
            assert layer.weight.shape == weight.shape
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(found["bias"]))
