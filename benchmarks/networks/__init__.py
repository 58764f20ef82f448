"""The networks of the problems, as layers that each library builds in its own way.

PyTorch's and Linen's are written out as modules, as their users write them.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np

from benchmarks.problem import Params, Problem


class Layer(NamedTuple):
    """One layer.

    Attributes:
      kind: what it does; `Residual` adds the outputs of its two sequences of layers.
      name: key of its parameters, for example "Dense_0".
      params: its parameters, which also say its sizes.
      option: rate of a dropout, or stride of a convolution with padding.
      main: the layers of a residual block.
      shortcut: the layers beside them; none for the inputs themselves.
    """

    kind: str
    name: str = ""
    params: dict[str, np.ndarray] = {}  # noqa: RUF012, never changed
    option: Any = None
    main: tuple[Layer, ...] = ()
    shortcut: tuple[Layer, ...] = ()


def layers_of(problem: Problem, params: Params) -> list[Layer]:
    """Returns the layers of a network with these parameters."""
    counts: collections.Counter[str] = collections.Counter()

    def layer(kind: str, option: Any = None) -> Layer:
        name = f"{kind}_{counts[kind]}"
        counts[kind] += 1
        return Layer(kind, name, params.get(name, {}), option)

    def layers(kinds: str) -> list[Layer]:
        return [layer(kind) for kind in kinds.split()]

    def conv_norm(stride: int = 1) -> list[Layer]:
        return [layer("Conv", stride), layer("BatchNorm")]

    rates = problem.dropout_rates
    if problem.features:
        found = [Layer("Flatten")]
        for rate in rates:
            found += [*layers("Dense ReLU"), layer("Dropout", rate)]
        return [*found, layer("Dense")]
    if problem.network == "CNN":
        found = layers("Channel Conv ReLU Conv ReLU MaxPool")
        found += [layer("Dropout", rates[0]), *layers("Flatten Dense ReLU")]
        return [*found, layer("Dropout", rates[1]), layer("Dense")]
    if problem.network == "ResNet":
        found = [Layer("Channel"), *conv_norm(), Layer("ReLU")]
        for stride in (1, 2):
            main = (*conv_norm(stride), Layer("ReLU"), *conv_norm())
            shortcut = tuple(conv_norm(stride)) if stride > 1 else ()
            found += [Layer("Residual", main=main, shortcut=shortcut), Layer("ReLU")]
        return [*found, *layers("Mean Dense")]
    if problem.network == "LSTM":
        return layers("LSTM Dense")
    found = layers("Patches Dense Embedding")
    for kinds in 2 * ("LayerNorm Dense Attention Dense", "LayerNorm Dense GELU Dense"):
        found.append(Layer("Residual", main=tuple(layers(kinds))))
    return [*found, *layers("LayerNorm Mean Dense")]


def pytorch_layout(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters of a layer as PyTorch and Equinox name and lay them out."""
    found = dict(params)
    if "recurrent_kernel" in found:
        found["weight_ih"] = found.pop("kernel").T
        found["weight_hh"] = found.pop("recurrent_kernel").T
    elif "kernel" in found:
        weight = found.pop("kernel").transpose()
        if weight.ndim == 4:  # [filters, inputs, width, height]
            weight = weight.swapaxes(2, 3)
        elif weight.shape[1] == 9216:  # images are flattened from [channels, height, width]
            weight = weight.reshape(-1, 12, 12, 64).transpose(0, 3, 1, 2).reshape(-1, 9216)
        found["weight"] = weight
    elif "scale" in found:
        found["weight"] = found.pop("scale")
    return found
