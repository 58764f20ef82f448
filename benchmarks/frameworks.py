"""Compares `train_epoch` on T2's network as a Linen, NNX or Equinox module or plain functions.

    python -m benchmarks.frameworks [--rounds 15]

All networks start from the same parameters, without dropout, and must compute the same losses.
Prints the median seconds per epoch, and its ratio to Linen's with a 95 % interval.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

import jaxtrain as jt
from benchmarks.timing import speedup, time_interleaved
from jaxtrain._arguments import check_integer
from jaxtrain.cli.command import report_errors

FEATURES = (784, 256, 128, 64, 10)
MEAN, STD = 0.1307, 0.3081
LAYERS = [f"Dense_{index}" for index in range(4)]


def normalized(images: Array) -> Array:
    """Returns pixels from 0 to 255 as T2's normalized inputs, with the image axes flattened."""
    return (images.reshape(*images.shape[:-2], -1).astype(jnp.float32) / 255 - MEAN) / STD


class NnxNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        pairs = itertools.pairwise(FEATURES)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])

    def __call__(self, images: Array) -> Array:
        x = normalized(images)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def nnx_network(params: PyTree) -> NnxNetwork:
    network = NnxNetwork(nnx.Rngs(0))
    for layer, name in zip(network.layers, LAYERS, strict=True):
        layer.kernel = nnx.Param(params[name]["weight"].T)
        layer.bias = nnx.Param(params[name]["bias"])
    return network


class EquinoxNetwork(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __call__(self, image: Array) -> Array:
        x = normalized(image)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def equinox_network(params: PyTree) -> EquinoxNetwork:
    layers = []
    for name in LAYERS:
        weight, bias = params[name]["weight"], params[name]["bias"]
        layer = eqx.nn.Linear(*weight.T.shape, key=jax.random.key(0))
        layers.append(eqx.tree_at(lambda x: (x.weight, x.bias), layer, (weight, bias)))
    return EquinoxNetwork(layers)


def plain_apply(
    params: PyTree, model_state: PyTree, images: Array, *, train: bool, key: Any
) -> tuple[Array, PyTree]:
    del train, key
    x = normalized(images)
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["weight"].T + params[name]["bias"][None])
    return x @ params[LAYERS[-1]]["weight"].T + params[LAYERS[-1]]["bias"][None], model_state


def states(optimizer: Any, images: Array) -> dict[str, jt.TrainState]:
    """Returns a training state for each framework, all with the parameters of the Linen network."""
    key = jax.random.key(0)
    model = jt.models.FeedForward(dropout_rate=0.0)
    first = jt.init_state(model, optimizer, images, key=key)
    params = first.params
    others = {
        "NNX": nnx_network(params),
        "Equinox": equinox_network(params),
        "plain functions": jt.Model(lambda key, inputs: (params, {}), plain_apply),
    }
    return {"Linen": first} | {
        name: jt.init_state(model, optimizer, images, key=key) for name, model in others.items()
    }


def main() -> None:
    """Checks the losses, times the epochs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="readings per framework")
    rounds = parser.parse_args().rounds
    check_integer(rounds, "--rounds", minimum=1)
    train = jt.data.load_resolved("auto").train
    loss_fn, key = jt.losses.cross_entropy, jax.random.key(1)
    starts = states(jt.optimizers.sgd(0.01), train.inputs[:1])

    def epoch(state: jt.TrainState) -> np.ndarray:
        return np.asarray(jt.train_epoch(state, train, loss_fn, key=key)[1])

    losses = {name: epoch(state) for name, state in starts.items()}
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["Linen"], atol=1e-4, err_msg=name)
    actions = {name: lambda state=state: epoch(state) for name, state in starts.items()}
    seconds = time_interleaved(actions, rounds)
    print(f"{len(train)} images, {rounds} interleaved readings per framework")
    print("median seconds per epoch, and ratio to Linen's (95 % interval)")
    for name, readings in seconds.items():
        low, ratio, high = speedup(seconds["Linen"], readings)
        print(f"{name:16} {statistics.median(readings):.3f}  {ratio:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    with report_errors():
        main()
