"""The networks of the tutorials, as Flax Linen modules."""

from jaxtrain.models._networks import FeedForward, LinearRegression, uniform_fan_in

__all__ = ["FeedForward", "LinearRegression", "uniform_fan_in"]
