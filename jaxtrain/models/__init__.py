"""The networks of the tutorials, and layers that train faster on CPUs, as Flax Linen modules."""

from jaxtrain.models._dropout import Dropout, dropout
from jaxtrain.models._linear import Linear, uniform_fan_in
from jaxtrain.models._networks import FeedForward, LinearRegression

__all__ = ["Dropout", "FeedForward", "Linear", "LinearRegression", "dropout", "uniform_fan_in"]
