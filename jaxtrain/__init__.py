"""The classic PyTorch training tutorials as pure, compiled functions in JAX.

Training is a pure function of a state and data: a step maps (state, batch) to (state, metrics), an
epoch scans the step, a run loops over epochs.

    import jax, jaxtrain as jt

    train, test = jt.data.load("digits")
    state = jt.init_state(
        jt.models.FeedForward(), jt.optimizers.sgd(0.01), train.inputs[:1], key=jax.random.key(0)
    )
    state, history = jt.fit(state, train, test, loss_fn=jt.losses.cross_entropy)
"""

from jaxtrain import data, errors, losses, metrics, models, optimizers
from jaxtrain.data import Dataset
from jaxtrain.epochs import evaluate, predict, train_epoch
from jaxtrain.errors import (
    DataUnavailableError,
    InputError,
    NonFiniteLossError,
    OutOfMemoryError,
    StorageError,
)
from jaxtrain.export import load_params, save_params
from jaxtrain.fit import fit
from jaxtrain.minimize import Minimum, minimize
from jaxtrain.state import TrainState, init_state
from jaxtrain.steps import eval_step, train_step

__all__ = [
    "DataUnavailableError",
    "Dataset",
    "InputError",
    "Minimum",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "StorageError",
    "TrainState",
    "data",
    "errors",
    "eval_step",
    "evaluate",
    "fit",
    "init_state",
    "load_params",
    "losses",
    "metrics",
    "minimize",
    "models",
    "optimizers",
    "predict",
    "save_params",
    "train_epoch",
    "train_step",
]
