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

from typing import TYPE_CHECKING

from jaxtrain import callbacks, data, errors, losses, metrics, optimizers, parallel
from jaxtrain._allocator import reuse_freed_memory
from jaxtrain._lazy import lazy_names
from jaxtrain.adapters import mixed_precision
from jaxtrain.checkpoint import load_checkpoint
from jaxtrain.dataset import Dataset
from jaxtrain.lowerings import use_cpu_lowerings
from jaxtrain.model import Model
from jaxtrain.optimizers._minimize import Minimum, minimize
from jaxtrain.race import Race, race
from jaxtrain.training.batch_stats import update_batch_stats
from jaxtrain.training.fit import fit
from jaxtrain.training.history import History, Run
from jaxtrain.training.loop import evaluate, predict, train_epoch
from jaxtrain.training.run import train
from jaxtrain.training.state import (
    TrainState,
    init_state,
    set_learning_rate,
    to_module,
    with_optimizer,
)
from jaxtrain.training.step import apply_gradients, eval_step, gradients, train_step

if TYPE_CHECKING:
    from jaxtrain import export, models, sweeps
    from jaxtrain.export import load, save
    from jaxtrain.inspect import compare, summary, verify
    from jaxtrain.sweeps.find_learning_rate import find_learning_rate
    from jaxtrain.sweeps.result import load_sweep
    from jaxtrain.sweeps.sweep import sweep
else:  # so that type checkers report names that do not exist
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "export": ("load", "save"),
            "inspect": ("compare", "summary", "verify"),
            "models": (),
            "sweeps": ("find_learning_rate", "load_sweep", "sweep"),
        },
    )

__version__ = "0.2.0"

__all__ = [
    "Dataset",
    "History",
    "Minimum",
    "Model",
    "Race",
    "Run",
    "TrainState",
    "apply_gradients",
    "callbacks",
    "compare",
    "data",
    "errors",
    "eval_step",
    "evaluate",
    "export",
    "find_learning_rate",
    "fit",
    "gradients",
    "init_state",
    "load",
    "load_checkpoint",
    "load_sweep",
    "losses",
    "metrics",
    "minimize",
    "mixed_precision",
    "models",
    "optimizers",
    "parallel",
    "predict",
    "race",
    "reuse_freed_memory",
    "save",
    "set_learning_rate",
    "summary",
    "sweep",
    "sweeps",
    "to_module",
    "train",
    "train_epoch",
    "train_step",
    "update_batch_stats",
    "use_cpu_lowerings",
    "verify",
    "with_optimizer",
]
