"""The CNN of PyTorch's MNIST example trains to PyTorch's losses, as XLA's own convolutions do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxtrain as jt

torch = pytest.importorskip("torch")


class ExampleCNN(nn.Module):
    """The layers of PyTorch's MNIST example, without dropout, with fewer channels."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(images))
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).transpose(0, 3, 1, 2)  # PyTorch flattens channels first
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def torch_cnn(params: Any) -> Any:
    """The same network in PyTorch, with the same parameters."""
    layers = torch.nn
    network = layers.Sequential(
        *(layers.Conv2d(1, 16, 3), layers.ReLU(), layers.Conv2d(16, 32, 3), layers.ReLU()),
        *(layers.MaxPool2d(2), layers.Flatten()),
        *(layers.Linear(32 * 16, 16), layers.ReLU(), layers.Linear(16, 10)),
    )
    names = {0: "Conv_0", 2: "Conv_1", 6: "Dense_0", 8: "Dense_1"}
    with torch.no_grad():
        for index, name in names.items():
            kernel = np.asarray(params[name]["kernel"])
            order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            network[index].weight.copy_(torch.tensor(kernel.transpose(order)))
            network[index].bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    return network


@pytest.fixture(scope="module")
def images() -> jt.Dataset:
    """40 images of 12 x 12 pixels: two batches of 16 and a partial one."""
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(40, 12, 12, 1)).astype(np.float32)
    return jt.Dataset(jnp.asarray(pixels), jnp.asarray(generator.integers(0, 10, 40)))


@pytest.fixture(scope="module")
def state(images: jt.Dataset) -> jt.TrainState:
    optimizer = jt.optimizers.sgd(0.1, momentum=0.9)
    return jt.init_state(ExampleCNN(), optimizer, images.inputs[:1], key=jax.random.key(0))


def losses(state: jt.TrainState, images: jt.Dataset) -> list[float]:
    """Returns the losses of three epochs."""
    found: list[float] = []
    for _ in range(3):
        state, epoch = jt.train_epoch(state, images, jt.losses.cross_entropy, batch_size=16)
        found += np.asarray(epoch).tolist()
    return found


@pytest.fixture(scope="module")
def expected(state: jt.TrainState, images: jt.Dataset) -> list[float]:
    """The losses of three epochs in PyTorch."""
    network = torch_cnn(state.params)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.tensor(np.asarray(images.inputs).transpose(0, 3, 1, 2))
    targets = torch.tensor(np.asarray(images.targets)).long()
    found = []
    for _ in range(3):
        for x, y in zip(inputs.split(16), targets.split(16), strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("products", [True, False], ids=["products", "XLA's convolutions"])
def test_a_network_trains_to_the_losses_of_pytorch(
    state: jt.TrainState, images: jt.Dataset, expected: list[float], products: bool
) -> None:
    jt.use_cpu_lowerings(products)
    try:
        ours = losses(state, images)
    finally:
        jt.use_cpu_lowerings(True)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert ours[-1] < ours[0]
