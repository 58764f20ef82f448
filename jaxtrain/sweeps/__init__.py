"""Sweeps: one run for every configuration of a grid, many of them at once."""

from jaxtrain.callbacks import SweepProgress
from jaxtrain.sweeps.find_learning_rate import RangeTest, find_learning_rate
from jaxtrain.sweeps.result import SweepResult, SweepRun, SweepTable, load_sweep
from jaxtrain.sweeps.sweep import sweep

__all__ = [
    "RangeTest",
    "SweepProgress",
    "SweepResult",
    "SweepRun",
    "SweepTable",
    "find_learning_rate",
    "load_sweep",
    "sweep",
]
