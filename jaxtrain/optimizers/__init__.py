"""Optimizers with the semantics of `torch.optim`, schedules, safeguards, and records."""

from jaxtrain.optimizers._accumulation import accumulate_gradients
from jaxtrain.optimizers._averaging import average_parameters
from jaxtrain.optimizers._evaluation import evaluate_with
from jaxtrain.optimizers._from_torch import from_torch
from jaxtrain.optimizers._inspect import averaged_params
from jaxtrain.optimizers._minimize import Stop
from jaxtrain.optimizers._records import Record, record_gradient_norm, records
from jaxtrain.optimizers._safeguards import clip_gradients, skip_nonfinite
from jaxtrain.optimizers._schedules import (
    cosine_annealing_lr,
    linear_lr,
    one_cycle_lr,
    step_lr,
)
from jaxtrain.optimizers._torch import (
    adadelta,
    adagrad,
    adam,
    adamw,
    lbfgs,
    make,
    rmsprop,
    rprop,
    sgd,
)

__all__ = [
    "Record",
    "Stop",
    "accumulate_gradients",
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "average_parameters",
    "averaged_params",
    "clip_gradients",
    "cosine_annealing_lr",
    "evaluate_with",
    "from_torch",
    "lbfgs",
    "linear_lr",
    "make",
    "one_cycle_lr",
    "record_gradient_norm",
    "records",
    "rmsprop",
    "rprop",
    "sgd",
    "skip_nonfinite",
    "step_lr",
]
