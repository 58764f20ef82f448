"""Convolutions and max pooling in the forms that XLA runs fast inside a loop on a CPU."""

from jaxtrain.lowerings._rules import use_cpu_lowerings
from jaxtrain.lowerings._scope import scope

__all__ = ["scope", "use_cpu_lowerings"]
