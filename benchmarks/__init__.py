"""Benchmarks of jaxtrain against other libraries."""

from jaxtrain.cli import command as command  # first: it reports a missing extra in one sentence
