"""Sweeps: one run for every configuration of a grid, many of them at once."""

from jaxtrain.sweeps.result import SweepResult, SweepRun, SweepTable, load_sweep
from jaxtrain.sweeps.sweep import sweep

__all__ = ["SweepResult", "SweepRun", "SweepTable", "load_sweep", "sweep"]
