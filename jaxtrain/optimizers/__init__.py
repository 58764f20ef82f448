"""Optimizers with the semantics of `torch.optim`, safeguards, schedules, and `minimize`."""

from jaxtrain.optimizers._accumulation import AccumulationState, accumulate_gradients
from jaxtrain.optimizers._averaging import AverageState, average_parameters, restart_average
from jaxtrain.optimizers._hoist import HoistedState, hoist_tracers
from jaxtrain.optimizers._inspect import (
    averaged_params,
    current_learning_rate,
    evaluation_params,
    has_accumulation,
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
from jaxtrain.optimizers._schedules import (
    cosine_annealing_lr,
    linear_lr,
    one_cycle_lr,
    step_lr,
)
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
from jaxtrain.optimizers._transforms import (
    AmsgradState,
    DampedTraceState,
    clip_by_global_norm,
    global_norm,
)

__all__ = [
    "OPTIMIZERS",
    "AccumulationState",
    "AmsgradState",
    "AverageState",
    "DampedTraceState",
    "HoistedState",
    "LearningRate",
    "Minimum",
    "Number",
    "SkipNonfiniteState",
    "Stop",
    "accumulate_gradients",
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "average_parameters",
    "averaged_params",
    "clip_by_global_norm",
    "clip_gradients",
    "cosine_annealing_lr",
    "current_learning_rate",
    "evaluation_params",
    "global_norm",
    "has_accumulation",
    "has_clipping",
    "has_line_search",
    "hoist_tracers",
    "last_step_finite",
    "lbfgs",
    "linear_lr",
    "make",
    "minimize",
    "one_cycle_lr",
    "restart_average",
    "rmsprop",
    "rprop",
    "sgd",
    "skip_nonfinite",
    "skipped_steps",
    "stays_finite",
    "step_lr",
]
