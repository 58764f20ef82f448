"""Convolutions and max pooling in the forms that XLA runs fast inside a loop on a CPU."""

from jaxtrain.lowerings._rules import scope, use_cpu_lowerings

__all__ = ["scope", "use_cpu_lowerings"]
