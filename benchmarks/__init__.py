"""Benchmarks of jaxtrain against other libraries."""
