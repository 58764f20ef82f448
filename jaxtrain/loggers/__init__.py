"""Loggers: TensorBoard, CSV, JSON lines and Weights & Biases, as callbacks for `fit`.

Each function returns a context manager whose value is passed as `on_event`. A run that resumes
continues what it wrote before; a run from step 0 replaces what another run wrote to the same place.
A logger that cannot write warns once, and training continues. With several processes, only process
0 writes.
"""

from jaxtrain.loggers._combine import Combined, combine
from jaxtrain.loggers._csv import csv
from jaxtrain.loggers._json_lines import json_lines
from jaxtrain.loggers._logger import Logger
from jaxtrain.loggers._tensorboard import tensorboard
from jaxtrain.loggers._wandb import wandb

__all__ = ["Combined", "Logger", "combine", "csv", "json_lines", "tensorboard", "wandb"]
