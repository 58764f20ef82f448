"""Sweeps: one run for every configuration of a grid, many of them at once."""

from jaxtrain.sweeps.find_learning_rate import RangeTest
from jaxtrain.sweeps.find_learning_rate import find_learning_rate as find_learning_rate
from jaxtrain.sweeps.result import SweepResult, SweepRun, SweepTable
from jaxtrain.sweeps.result import load_sweep as load_sweep
from jaxtrain.sweeps.sweep import sweep as sweep

__all__ = ["RangeTest", "SweepResult", "SweepRun", "SweepTable"]
