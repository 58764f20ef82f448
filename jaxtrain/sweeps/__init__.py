"""Sweeps: one run for every configuration of a grid, and the range test of learning rates."""

from jaxtrain.sweeps.find_learning_rate import RangeTest, find_learning_rate
from jaxtrain.sweeps.result import SweepResult, SweepRun, SweepTable, load_sweep
from jaxtrain.sweeps.sweep import sweep

__all__ = [
    "RangeTest",
    "SweepResult",
    "SweepRun",
    "SweepTable",
    "find_learning_rate",
    "load_sweep",
    "sweep",
]
