"""Optimizers with the semantics of `torch.optim`, safeguards, schedules, and `minimize`."""

from jaxtrain.optimizers._hoist import HoistedState, hoist_tracers
from jaxtrain.optimizers._inspect import (
    current_learning_rate,
    has_clipping,
    has_line_search,
    last_step_finite,
    skipped_steps,
)
from jaxtrain.optimizers._minimize import Minimum, Stop, minimize
from jaxtrain.optimizers._numbers import LearningRate, Number
from jaxtrain.optimizers._safeguards import (
    SkipNonfiniteState,
    clip_gradients,
    skip_nonfinite,
    stays_finite,
)
from jaxtrain.optimizers._schedules import step_lr
from jaxtrain.optimizers._torch import (
    OPTIMIZERS,
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
from jaxtrain.optimizers._transforms import clip_by_global_norm, global_norm

__all__ = [
    "OPTIMIZERS",
    "HoistedState",
    "LearningRate",
    "Minimum",
    "Number",
    "SkipNonfiniteState",
    "Stop",
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "clip_gradients",
    "current_learning_rate",
    "global_norm",
    "has_clipping",
    "has_line_search",
    "hoist_tracers",
    "last_step_finite",
    "lbfgs",
    "make",
    "minimize",
    "rmsprop",
    "rprop",
    "sgd",
    "skip_nonfinite",
    "skipped_steps",
    "stays_finite",
    "step_lr",
]
