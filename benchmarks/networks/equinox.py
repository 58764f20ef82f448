"""The networks as Equinox modules, which take one normalized image [28, 28].

Each is called as `model(image, state, key)`; the key is None in evaluation. In training, the
function is to be mapped over images and keys, with `axis_name="batch"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.networks import Layer, layers_of, pytorch_layout
from benchmarks.problem import Params, Problem

State = eqx.nn.State
KEY = jax.random.key(0)  # the same for all layers, as their parameters are replaced


def make(problem: Problem, params: Params) -> tuple[Any, State]:
    """Returns the network of a problem with these parameters, and its state."""
    return eqx.nn.make_with_state(Network)(layers_of(problem, params))


class Network(eqx.Module):
    """A sequence of layers."""

    layers: list[Any]

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = [_make(layer) for layer in layers]

    def __call__(self, x: Array, state: State, key: Array | None) -> tuple[Array, State]:
        for layer in self.layers:
            if isinstance(layer, eqx.nn.Dropout):
                use, key = (None, None) if key is None else jax.random.split(key)
                x = layer(x, key=use, inference=use is None)
            elif isinstance(layer, eqx.nn.BatchNorm):
                x, state = layer(x, state, inference=key is None)
            elif isinstance(layer, Residual):
                x, state = layer(x, state, key)
            else:
                x = layer(x)
        return x, state


class Residual(eqx.Module):
    """Adds the outputs of two sequences."""

    main: Network
    shortcut: Network

    def __call__(self, x: Array, state: State, key: Array | None) -> tuple[Array, State]:
        y, state = self.main(x, state, key)
        x, state = self.shortcut(x, state, key)
        return x + y, state


class Tokens(eqx.Module):
    """Applies a layer to each row of a matrix, or to a vector."""

    layer: Any

    def __call__(self, x: Array) -> Array:
        return self.layer(x) if x.ndim == 1 else jax.vmap(self.layer)(x)


class RowLSTM(eqx.Module):
    """An LSTM that reads the rows of an image, and returns its last output."""

    cell: eqx.nn.LSTMCell

    def __call__(self, image: Array) -> Array:
        def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
            return self.cell(row, carry), None

        return jax.lax.scan(step, (jnp.zeros(128), jnp.zeros(128)), image)[0][0]


class Embedding(eqx.Module):
    """Adds a learned vector to each position."""

    position: Array

    def __call__(self, x: Array) -> Array:
        return x + self.position


def _make(layer: Layer) -> Any:
    kind, params = layer.kind, pytorch_layout(layer.params)
    if kind in FUNCTIONS:
        return FUNCTIONS[kind]
    if kind == "Dropout":
        return eqx.nn.Dropout(layer.option)
    if kind == "Residual":
        return Residual(Network(layer.main), Network(layer.shortcut))
    if kind == "Embedding":
        return Embedding(jnp.asarray(params["position"]))
    if kind == "Conv":
        filters, inputs, size, _ = params["weight"].shape
        padding = 0 if layer.option is None else size // 2
        options: Any = {"padding": padding, "use_bias": "bias" in params, "key": KEY}
        made: Any = eqx.nn.Conv2d(inputs, filters, size, layer.option or 1, **options)
        if "bias" in params:
            params["bias"] = params["bias"][:, None, None]
    elif kind == "Dense":
        made = eqx.nn.Linear(*reversed(params["weight"].shape), key=KEY)
    elif kind == "BatchNorm":
        size = len(params["weight"])
        made = eqx.nn.BatchNorm(size, "batch", 1e-5, momentum=0.9, mode="batch")
    elif kind == "LayerNorm":
        made = eqx.nn.LayerNorm(len(params["weight"]))
    else:
        made = eqx.nn.LSTMCell(28, 128, key=KEY)
    made = eqx.tree_at(
        lambda made: [getattr(made, name) for name in params],
        made,
        [jnp.asarray(value) for value in params.values()],
    )
    return {"Dense": Tokens, "LayerNorm": Tokens, "LSTM": RowLSTM}.get(kind, lambda made: made)(
        made
    )


def _attention(x: Array) -> Array:
    q, k, v = jnp.split(x.reshape(49, 12, 16), 3, axis=1)
    return jax.nn.dot_product_attention(q, k, v).reshape(49, 64)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Flatten": lambda x: x.reshape(-1),
    "Channel": lambda x: x[None],
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "MaxPool": eqx.nn.MaxPool2d(2, 2),
    "Mean": lambda x: x.mean(axis=(1, 2) if x.ndim == 3 else 0),
    "Attention": _attention,
    "Patches": lambda x: x.reshape(7, 4, 7, 4).transpose(0, 2, 1, 3).reshape(49, 16),
}
