"""Flags that several experiments share, as dataclasses to derive from."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jaxtrain import optimizers
from jaxtrain._arguments import check_integer
from jaxtrain.cli.devices import DeviceName
from jaxtrain.cli.logs import LogName
from jaxtrain.errors import InputError
from jaxtrain.optimizers import Record, clip_gradients, skip_nonfinite
from jaxtrain.optimizers._extra_args import accepting_extra_args

Config = TypeVar("Config", bound=Any)
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "rprop", "adagrad", "adadelta", "lbfgs"]
DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"]

# Arguments of the library whose flag has another name.
_FLAG_OF_ARGUMENT = {
    "dropout_rate": "dropout",
    "fraction": "validation",
    "learning_rate": "learning_rates",
    "directory": "checkpoint_dir",
    "every": "checkpoint_every",
    "pct_start": "warmup",
}


@dataclass(frozen=True)
class ExperimentFlags:
    """Flags of every experiment."""

    output_dir: Path
    """Folder of the results."""
    overwrite: bool = False
    """Replace the results of a finished run in that folder."""
    device: DeviceName = "auto"
    """Where to compute; auto uses a GPU if there is one."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts sooner."""


@dataclass(frozen=True)
class DatasetFlags:
    """Flags of experiments on images."""

    dataset: DatasetName = "auto"
    """auto: MNIST if it is available, else scikit-learn's digits. Other names never fall back."""
    data_dir: Path | None = None
    """Folder of the IDX files; None tries $JAXTRAIN_DATA_DIR, the cache, then a download."""


@dataclass(frozen=True)
class TrainingFlags(ExperimentFlags):
    """Flags of every experiment that trains by `fit`: progress, logs, checkpoints, safeguards."""

    overwrite: bool = False
    """Replace the results of a finished run in that folder, and the checkpoints of another run."""
    log_interval: int = 1
    """Steps between two lines of progress; 0 prints nothing."""
    log: tuple[LogName, ...] = ()
    """Also log losses, metrics and pictures in these formats, in the output folder."""
    log_histograms: bool = False
    """With --log tensorboard or wandb: histograms of the parameters after each epoch."""
    checkpoint_dir: Path | None = None
    """Save checkpoints here; the same command then resumes after an interruption."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; the last epoch is always saved."""
    keep: int = 3
    """Number of newest checkpoints to keep."""
    resume: Literal["auto", "required", "never"] = "auto"
    """auto: resume if there is a checkpoint. required: fail without one. never: fail with one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinity in loss, gradient or state: end the run, or skip that step."""
    max_gradient_norm: float | None = None
    """Clip gradients to this global norm; None does not clip."""
    verify: bool = False
    """First compute one step in several ways, and end if they differ by more than rounding."""


@dataclass(frozen=True)
class LineFlags(TrainingFlags):
    """Flags of every experiment that fits a line by `fit`."""

    learning_rate: float = 0.01
    """Step size: factor of the gradient."""
    optimizer: OptimizerName = "sgd"
    """The optimizer, as in torch.optim; lbfgs takes full batches."""
    log_interval: int = 10
    """Epochs between two lines of progress; 0 prints nothing."""


@dataclass(frozen=True)
class OptimizerFlags:
    """Flags of an optimizer and its schedule, as in torch.optim."""

    optimizer: OptimizerName = "sgd"
    """The optimizer, as in torch.optim."""
    learning_rate: float | None = None
    """None means 0.01 (0.05 on digits) for sgd, and torch.optim's default for other optimizers."""
    gamma: float | None = None
    """Multiply the learning rate by this after every epoch (StepLR); None leaves it constant."""
    weight_decay: float | None = None
    """Weight decay, as in torch.optim; None means 1e-6, or 0 for rprop and lbfgs."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""


def with_optimizer_defaults(config: Config, sgd_rate: float) -> Config:
    """Returns `OptimizerFlags` with values for those that are None, at this rate for sgd."""
    name, changes = config.optimizer, {}
    if config.learning_rate is None:
        parameters = inspect.signature(getattr(optimizers, name)).parameters
        rate = sgd_rate if name == "sgd" else parameters["learning_rate"].default
        changes["learning_rate"] = rate
    if config.weight_decay is None:
        changes["weight_decay"] = 0.0 if name in ("rprop", "lbfgs") else 1e-6
    return dataclasses.replace(config, **changes)


def make_optimizer(
    config: Any, examples: int, rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer that `OptimizerFlags` name, with the safeguards of `TrainingFlags`.

    Args:
      config: the configuration, its defaults filled in, with a `batch_size`.
      examples: training examples, for the schedule.
      rate: a learning rate or schedule in place of those of the flags.
    """
    if rate is None:
        rate = config.learning_rate
        if config.gamma is not None:
            check(config, "batch_size", minimum=1)
            steps = math.ceil(examples / config.batch_size)
            rate = optimizers.step_lr(rate, 1, config.gamma, steps_per_epoch=steps)
    options = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    return with_safeguards(optimizers.make(config.optimizer, rate, **options), config)


def make_line_optimizer(config: LineFlags) -> optax.GradientTransformation:
    """Returns the optimizer that `LineFlags` name, with safeguards; it records the line.

    Raises:
      InputError: the learning rate or the gradient norm is out of range.
    """
    optimizer = optimizers.make(config.optimizer, config.learning_rate)
    return record_line(with_safeguards(optimizer, config))


def record_line(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that records weight and bias after each step, for the history."""
    inner = accepting_extra_args(optimizer)

    def line(params: Any) -> list[Record]:
        names = [name for name in ("weight", "bias") if name in params]
        return [Record(name, jnp.reshape(params[name], ())) for name in names]

    def init(params: Any) -> Any:
        return inner.init(params), line(params)

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        updates, inner_state = inner.update(grads, state[0], params, **extra_args)
        return updates, (inner_state, line(optax.apply_updates(params, updates)))

    return optax.GradientTransformationExtraArgs(init, update)


def with_safeguards(
    optimizer: optax.GradientTransformation, config: TrainingFlags
) -> optax.GradientTransformation:
    """Returns the optimizer with the safeguards that the flags ask for.

    Raises:
      InputError: the gradient norm is not positive.
    """
    optimizer = clip_gradients(optimizer, config.max_gradient_norm)
    return skip_nonfinite(optimizer) if config.on_nonfinite == "skip" else optimizer


def check(config: Any, name: str, minimum: int, maximum: int | None = None) -> None:
    """Raises InputError unless a flag is an integer from `minimum` to `maximum`."""
    check_integer(getattr(config, name), name, minimum=minimum, maximum=maximum)


def check_rates(config: Any) -> None:
    """Raises InputError unless `learning_rates` are valid; in a sweep they would be traced."""
    if not config.learning_rates:
        raise InputError("--learning-rates is empty; expected at least one, such as 0.01")
    for rate in config.learning_rates:
        optimizers.sgd(rate)


def seed_key(seed: int) -> Key[Array, ""]:
    """Returns the PRNG key of a seed.

    Raises:
      InputError: the seed is not in 0 … 2³² − 1; JAX would reduce a larger one.
    """
    check_integer(seed, "seed", minimum=0, maximum=2**32 - 1)
    return jax.random.key(seed)


def has_defaults(config: Any, *names: str, defaults: Any = None) -> bool:
    """Returns whether these flags have their defaults, so that the tutorial's figures apply.

    They do not apply with clipped gradients.

    Args:
      config: the experiment's configuration.
      names: the flags that change the figures.
      defaults: a configuration with the defaults; None means those of the dataclass.
    """
    if isinstance(config, TrainingFlags) and config.max_gradient_norm is not None:
        return False
    expected = type(config)() if defaults is None else defaults
    return all(getattr(config, name) == getattr(expected, name) for name in names)


def flag_of(argument: Any, config_type: Any) -> str | None:
    """Returns the flag of an experiment that sets an argument of the library, or None."""
    names = [field.name for field in dataclasses.fields(config_type)]
    for name in (argument, _FLAG_OF_ARGUMENT.get(argument)):
        if name in names:
            return f"--{name.replace('_', '-')}"
    return None
