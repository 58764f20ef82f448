"""Callbacks: what `fit` and `sweep` call as they proceed, to show, save, log and stop runs."""

from jaxtrain.callbacks._callback import Callback, SweepProgress
from jaxtrain.callbacks._callback import checked_callbacks as checked_callbacks
from jaxtrain.callbacks.checkpoint import checkpoint
from jaxtrain.callbacks.csv import csv
from jaxtrain.callbacks.early_stopping import early_stopping
from jaxtrain.callbacks.every_steps import every_steps
from jaxtrain.callbacks.json_lines import json_lines
from jaxtrain.callbacks.profile import profile
from jaxtrain.callbacks.progress import progress
from jaxtrain.callbacks.reduce_on_plateau import reduce_on_plateau
from jaxtrain.callbacks.tensorboard import tensorboard
from jaxtrain.callbacks.wandb import wandb

__all__ = [
    "Callback",
    "SweepProgress",
    "checkpoint",
    "csv",
    "early_stopping",
    "every_steps",
    "json_lines",
    "profile",
    "progress",
    "reduce_on_plateau",
    "tensorboard",
    "wandb",
]
