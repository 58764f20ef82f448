"""Looks at a network and its training step without training it."""

from jaxtrain.inspect.summary import Summary, summary

__all__ = ["Summary", "summary"]
