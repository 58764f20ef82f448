"""Races of a PyTorch module: whether it trains faster in JAX, measured in processes of their own.

`python -m jaxtrain.race` is the command. `benchmarks/` of the repository uses the same processes,
turns and estimates.
"""

from jaxtrain.race.result import Race, Row
from jaxtrain.race.run import race

__all__ = ["Race", "Row", "race"]
