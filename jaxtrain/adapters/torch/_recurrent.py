"""Recurrent networks: LSTM, GRU and Elman's, of several layers and in both directions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.adapters.torch._rules import family
from jaxtrain.models import dropout as drop

register = family("Recurrent networks")


def _lstm(inputs: Any, recurrent: Any, carry: Any) -> Any:
    i, f, g, o = jnp.split(inputs + recurrent, 4, -1)
    c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(inputs: Any, recurrent: Any, carry: Any) -> Any:
    (ri, zi, ni), (rh, zh, nh) = (jnp.split(x, 3, -1) for x in (inputs, recurrent))
    z = jax.nn.sigmoid(zi + zh)
    n = jnp.tanh(ni + jax.nn.sigmoid(ri + rh) * nh)
    return ((1 - z) * n + z * carry[0],)


def _elman(inputs: Any, recurrent: Any, carry: Any, *, activation: Any) -> Any:
    return (activation(inputs + recurrent),)


_CELLS = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": functools.partial(_elman, activation=jnp.tanh),
    "rnn_relu": functools.partial(_elman, activation=jax.nn.relu),
}


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x @ weight.T
    return x if bias is None else x + bias


def _network(
    input: Any,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    cell: Any,
    key: Any,
) -> Any:
    hidden = hx if isinstance(hx, list | tuple) else (hx,)
    directions = 1 + bidirectional
    size = len(params) // (num_layers * directions)

    def run(x: Any, index: int) -> Any:
        """Returns the final state and the outputs of one direction of a layer."""
        w_ih, w_hh, *others = params[index * size : (index + 1) * size]
        b_ih, b_hh, *projection = others if has_biases else (None, None, *others)

        def step(carry: Any, x: Any) -> Any:
            h, *rest = cell(x, _affine(carry[0], w_hh, b_hh), carry)
            h = h @ projection[0].T if projection else h
            return (h, *rest), h

        # The products with the inputs of all steps are one matrix product.
        start, x = tuple(h[index].astype(x.dtype) for h in hidden), _affine(x, w_ih, b_ih)
        return lax.scan(step, start, x, reverse=index % directions == 1)

    x, finals = input.swapaxes(0, 1) if batch_first else input, []
    for layer in range(num_layers):
        results = [run(x, index) for index in range(layer * directions, (layer + 1) * directions)]
        finals += [final for final, _ in results]
        x = jnp.concatenate([outputs for _, outputs in results], -1)
        if dropout and train and layer < num_layers - 1:
            x = drop(x, dropout, jax.random.fold_in(key, layer))
    return (x.swapaxes(0, 1) if batch_first else x, *map(jnp.stack, zip(*finals, strict=True)))


def _step(
    input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *, cell: Any
) -> Any:
    carry = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    carry = cell(_affine(input, w_ih, b_ih), _affine(carry[0], w_hh, b_hh), carry)
    return carry if len(carry) > 1 else carry[0]


for _name, _cell in _CELLS.items():
    register(f"aten.{_name}.input", random=True)(functools.partial(_network, cell=_cell))
    register(f"aten.{_name}_cell")(functools.partial(_step, cell=_cell))
