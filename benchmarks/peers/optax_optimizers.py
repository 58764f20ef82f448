"""The optimizers of the problems in optax, for the peers that train with it."""

from __future__ import annotations

import optax

from benchmarks.problem import Optimizer


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformation:
    """Returns the optimizer with PyTorch's defaults."""
    if optimizer.name == "adam":
        return optax.adam(optimizer.learning_rate)
    if optimizer.name == "adadelta":
        return optax.adadelta(optimizer.learning_rate)
    sgd = optax.sgd(optimizer.learning_rate, momentum=optimizer.momentum or None)
    if not optimizer.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(optimizer.weight_decay), sgd)
