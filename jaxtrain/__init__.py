"""The classic PyTorch training tutorials as pure, compiled functions in JAX.

Training is a pure function of a state and data: a step maps (state, batch) to (state, metrics), an
epoch is a loop of steps, a run is a loop of epochs, and a sweep is many runs at once.

    import jax, jaxtrain as jt

    train, test = jt.data.load("digits")
    state = jt.init_state(
        jt.models.FeedForward(), jt.optimizers.sgd(0.01), train.inputs[:1], key=jax.random.key(0)
    )
    state, history = jt.fit(state, train, test, loss_fn=jt.losses.cross_entropy)
"""

from jaxtrain import (
    data,
    errors,
    export,
    loggers,
    losses,
    metrics,
    models,
    optimizers,
    parallel,
)
from jaxtrain.adapters import mixed_precision
from jaxtrain.checkpoint import CheckpointOptions
from jaxtrain.cli.progress import console as progress
from jaxtrain.dataset import Dataset
from jaxtrain.errors import (
    DataUnavailableError,
    InputError,
    MissingExtraError,
    NonFiniteError,
    OutOfMemoryError,
    ProcessLostError,
    StorageError,
    StreamError,
)
from jaxtrain.export import load_params, save_params
from jaxtrain.lowerings import use_cpu_lowerings
from jaxtrain.model import Model
from jaxtrain.optimizers import Minimum, minimize
from jaxtrain.sweeps import SweepResult, SweepRun, SweepTable, load_sweep, sweep
from jaxtrain.training import events
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.epoch import evaluate, predict, train_epoch
from jaxtrain.training.find_learning_rate import RangeTest, find_learning_rate
from jaxtrain.training.fit import fit
from jaxtrain.training.history import History
from jaxtrain.training.run import train
from jaxtrain.training.state import TrainState, init_state, to_module, with_optimizer
from jaxtrain.training.step import apply_gradients, eval_step, gradients, train_step
from jaxtrain.training.summary import Summary, summary

__version__ = "0.2.0"

__all__ = [
    "CheckpointOptions",
    "DataUnavailableError",
    "Dataset",
    "EarlyStopping",
    "History",
    "InputError",
    "Minimum",
    "MissingExtraError",
    "Model",
    "NonFiniteError",
    "OutOfMemoryError",
    "ProcessLostError",
    "RangeTest",
    "StorageError",
    "StreamError",
    "Summary",
    "SweepResult",
    "SweepRun",
    "SweepTable",
    "TrainState",
    "apply_gradients",
    "data",
    "errors",
    "eval_step",
    "evaluate",
    "events",
    "export",
    "find_learning_rate",
    "fit",
    "gradients",
    "init_state",
    "load_params",
    "load_sweep",
    "loggers",
    "losses",
    "metrics",
    "minimize",
    "mixed_precision",
    "models",
    "optimizers",
    "parallel",
    "predict",
    "progress",
    "save_params",
    "summary",
    "sweep",
    "to_module",
    "train",
    "train_epoch",
    "train_step",
    "use_cpu_lowerings",
    "with_optimizer",
]
