"""race: trains a PyTorch module in PyTorch and in JAX, and measures which is faster."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain._arguments import check_arguments, check_integer, check_number
from jaxtrain._extras import needs_extra
from jaxtrain.dataset import Dataset
from jaxtrain.errors import DisagreementError, InputError
from jaxtrain.losses import Loss, name_of
from jaxtrain.race import machine, measuring
from jaxtrain.race.processes import ProcessError, by_value, call
from jaxtrain.race.result import EAGER, Race, disturbances, make_rows, number
from jaxtrain.race.turns import Values, take_turns

COMPILED = "torch.compile"
CONTENDERS = (EAGER, COMPILED, "train_step", "train_epoch", "fit")
# The number of losses that are compared before anything is timed, the fraction by which they may
# differ, and how many times the effect of rounding PyTorch's parameters may be added to it.
_CHECKED_STEPS, _FRACTION, _ROUNDINGS = 20, 1e-4, 8
# Where both sides draw different random numbers, mean losses may differ by the sum of a fraction of
# their value and a fraction of the first loss.
_ROUGHLY, _ROUGHLY_OF_FIRST = 0.3, 0.02
# The first batches of a data set are enough for a race: at least some, and otherwise up to a number
# and a size. They are sent to each process.
_MIN_BATCHES, _MAX_BATCHES, _MAX_BYTES = 5, 1000, 2**28
_MEMORY = "All processes reuse freed memory, as a program does after jaxtrain.reuse_freed_memory()."


def race(
    module: Any,
    dataset: Any,
    *,
    loss_fn: Loss,
    optimizer: Any,
    torch_loss: Callable[[Any, Any], Any] | None = None,
    batch_size: int = 64,
    model: Any = None,
    contenders: Sequence[str] = CONTENDERS,
    rounds: int = 5,
    seconds: float = 1.0,
    log: Callable[[str], object] | None = None,
) -> Race:
    """Trains a PyTorch module in PyTorch and in JAX, and measures which is faster.

    First, PyTorch's fastest number of threads, memory format and variant of the optimizer are
    found, and both sides take 20 steps from the same parameters on the same batches without
    dropout, whose losses must agree. Then each contender trains in a process of its own, in turns:
    `eager PyTorch`, `torch.compile`, and of the module in JAX a loop over `train_step`,
    `train_epoch`, and `fit`. A reading is the median of three timed sections after a pass that
    compiles. A contender that fails, makes another number of updates than expected, or ends a
    section with another loss has no numbers but a reason.

    By default, a race takes five to ten minutes, most of which is spent on starting processes and
    compiling; `rounds=1, seconds=0.2` takes one or two. Ctrl-C ends it, and returns what was
    measured; before the first reading, it raises KeyboardInterrupt. On a GPU, JAX reserves most of
    the memory when it starts, which the processes need: set the environment variable
    XLA_PYTHON_CLIENT_PREALLOCATE=false first, as the command does.

    Args:
      module: the module, on the CPU; not modified.
      dataset: inputs and targets, [examples, ...], as a `Dataset` or a tuple of arrays or tensors,
        or an object with `len(dataset)` and `dataset[index]`, the input and the target of an
        example. The first batches are used in stored order, up to 1,000 or 256 MiB; a smaller last
        batch is not.
      loss_fn: per-example loss of JAX.
      optimizer: an optimizer of `torch.optim` of the module's parameters, see
        `jt.optimizers.from_torch`.
      torch_loss: the same loss in PyTorch, from outputs and targets to the mean. By default that
        of the loss in `jt.losses`, with its options.
      batch_size: examples per step.
      model: the same network as a Linen, NNX or Equinox module, whose layers are in the module's
        order. It gets the module's parameters, and is trained in the same ways as the module; its
        rows are named "train_epoch, CLASS".
      contenders: which of the five to measure.
      rounds: readings of each contender; five or more give intervals.
      seconds: duration of a section of eager PyTorch; all contenders take the same steps.
      log: called with a line about what is measured next; by default it is printed on stderr.

    Returns:
      A row per contender; `print(result)` shows a table.

    Raises:
      DisagreementError: the losses of the two sides differ.
      InputError: an argument is not as expected, or the module cannot be trained in PyTorch, or in
        JAX.
      MissingExtraError: PyTorch or cloudpickle is not installed.

    Example:
      >>> import torch
      >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
      >>> theirs = torch.optim.SGD(module.parameters(), lr=0.01)
      >>> result = jt.race(  # doctest: +SKIP
      ...     module, train, loss_fn=loss_fn, optimizer=theirs, batch_size=32
      ... )
      >>> result.speedups["train_epoch"]  # doctest: +SKIP
      2.67
    """
    with needs_extra("torch"):
        import torch  # noqa: F401
    check_arguments(race, locals(), eager="call it outside")
    log = _print if log is None else log
    _check(module, optimizer, model, batch_size, rounds, seconds, contenders)
    torch_loss = _torch_loss(loss_fn) if torch_loss is None else torch_loss
    data = _arrays(dataset, batch_size)
    task = _Task(module, optimizer, torch_loss, loss_fn, data, batch_size)
    # The way of each contender in JAX, and the model or None for the module.
    in_jax: dict[str, tuple[str, Any]] = {
        each: (each, None) for each in contenders if each not in (EAGER, COMPILED)
    }
    if model is not None:
        in_jax |= {f"{way}, {type(model).__name__}": (way, model) for way in list(in_jax)}
    described = machine.describe()
    with by_value(*module.modules(), optimizer, torch_loss):
        found, notes = _prepare(task, in_jax, seconds, log)
        task = task._replace(data=data[: found["steps"] * batch_size])
        in_pytorch = [each for each in (EAGER, COMPILED) if each in contenders]
        load = machine.Load()
        readings, failed, complete = _measure(task, found, in_pytorch, in_jax, rounds, log)
    rows = make_rows([*in_pytorch, *in_jax], readings, failed, found["steps"])
    notes.append(disturbances(rows, load.others()))
    if not complete:
        notes.append(f"Interrupted after round {max(map(len, readings.values()))}.")
    title = (
        f"{task.name}, batch {batch_size}, {type(optimizer).__name__}; rounds: {rounds}, of "
        f"{measuring.SECTIONS} sections of {found['steps'] * found['passes']} steps"
    )
    return Race(rows, title, tuple(notes), described, complete)


def _check(
    module: Any,
    optimizer: Any,
    model: Any,
    batch_size: int,
    rounds: int,
    seconds: float,
    contenders: Sequence[str],
) -> None:
    """Raises InputError unless the arguments of a race are as expected."""
    import torch

    from jaxtrain.inspect import check_module

    check_module(module)
    name = type(module).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}; expected one of torch.optim, such as "
            "torch.optim.SGD(module.parameters(), lr=0.01)",
            argument="optimizer",
        )
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if not held <= {id(x) for x in module.parameters()}:
        raise InputError(
            f"the optimizer has parameters that this {name} does not have; expected one of the "
            "module's own: make it after the module, from module.parameters()",
            argument="optimizer",
        )
    if model is not None and len(optimizer.param_groups) > 1:
        raise InputError(
            f"the optimizer has {len(optimizer.param_groups)} groups of parameters, whose names a "
            "model of JAX does not know; expected one group, or no model",
            argument="optimizer",
        )
    check_integer(batch_size, "batch_size", minimum=1)
    check_integer(rounds, "rounds", minimum=1)
    check_number("seconds", seconds, lambda number: number > 0, "a number above 0")
    if not contenders or not set(contenders) <= set(CONTENDERS):
        raise InputError(
            f"contenders is {contenders!r}; expected some of {', '.join(CONTENDERS)}",
            argument="contenders",
        )


def _prepare(
    task: _Task,
    in_jax: dict[str, tuple[str, Any]],
    seconds: float,
    log: Callable[[str], object],
) -> tuple[dict[str, Any], list[str]]:
    """Returns what `preparing.prepare` does, and notes about it and about the losses in JAX."""
    from jaxtrain.race import preparing

    log("the fastest settings of PyTorch, and its losses")
    arguments = (task.in_pytorch, machine.cores(), seconds, _CHECKED_STEPS)
    try:
        found = call(preparing.prepare, *arguments, reuse_memory=True)
    except ProcessError as error:
        data, size = task.data, task.batch_size
        raise InputError(
            f"PyTorch cannot train {task.name} ({error}); expected a module that takes inputs of "
            f"the shape {_shapes(data.inputs, size)}, and a torch_loss that takes its outputs and "
            f"targets of the shape {_shapes(data.targets, size)}"
        ) from error
    notes = [_describe_settings(found)]
    if in_jax:
        log("the losses in JAX")
        losses = _losses_in_jax(task, in_jax)
        notes.append(compare(losses, found["losses"], found["rounding"], found["inexact"]))
    return found, notes + [_MEMORY] * (sys.platform == "linux")


def _measure(
    task: _Task,
    found: dict[str, Any],
    in_pytorch: Sequence[str],
    in_jax: dict[str, tuple[str, Any]],
    rounds: int,
    log: Callable[[str], object],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], bool]:
    """Returns the readings of contenders, why some are left out, and whether all were made."""
    from jaxtrain.race import contenders as ours
    from jaxtrain.race import pytorch

    makers: dict[str, Callable[[], measuring.Trainer]] = {
        name: functools.partial(
            pytorch.TorchTrainer, *task.in_pytorch, **found["settings"], compiled=name == COMPILED
        )
        for name in in_pytorch
    }
    for name, arguments in in_jax.items():
        makers[name] = functools.partial(ours.make, *task.in_jax, *arguments)
    readings: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:

        def read(name: str, _: int) -> Values:
            # The first round compiles with an empty cache, so that its compilation times count.
            arguments = (measuring.measure, makers[name], found["steps"], found["passes"])
            values = call(*arguments, cache=Path(folder) / name, reuse_memory=True)
            if name in in_jax and in_jax[name][1] is not None:
                values["making_seconds"] = 0.0  # of moving the parameters to the model
            return {task.name: values}

        turns = take_turns(
            {name: functools.partial(read, name) for name in makers},
            dict.fromkeys(makers, rounds),
            references=(EAGER, *makers),
            tolerances={"loss": (_ROUGHLY, _ROUGHLY_OF_FIRST * abs(float(found["losses"][0])))},
            log=log,
        )
        try:
            for everything, left_out in turns:
                readings, failed = everything.get(task.name, {}), left_out
        except KeyboardInterrupt:
            if not readings:
                raise
            return readings, failed, False
    return readings, failed, True


class _Task(NamedTuple):
    """What both sides train."""

    module: Any
    optimizer: Any
    torch_loss: Callable[[Any, Any], Any]
    loss_fn: Loss
    data: Dataset
    batch_size: int

    @property
    def name(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    @property
    def in_pytorch(self) -> tuple[Any, ...]:
        """The first arguments of `TorchTrainer`."""
        data = self.data.inputs, self.data.targets
        return (self.module, self.optimizer, self.torch_loss, *data, self.batch_size)

    @property
    def in_jax(self) -> tuple[Any, Any, Dataset, Loss, int]:
        """The first arguments of `contenders.make`."""
        return self.module, self.optimizer, self.data, self.loss_fn, self.batch_size


def _losses_in_jax(task: _Task, contenders: dict[str, tuple[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the losses of the first steps without dropout, by contender."""
    from jaxtrain.race import contenders as ours

    try:
        arguments = (*task.in_jax, _CHECKED_STEPS, contenders)
        return call(ours.checked_losses, *arguments, reuse_memory=True)
    except InputError:
        # Here, the error of an operation without a rule names the line of the user's file.
        ours.make(*task.in_jax, ours.WAYS[0])
        raise
    except ProcessError as error:
        raise InputError(
            f"JAX cannot train {task.name} ({error}); expected a loss_fn that takes its outputs "
            "and targets, and returns a loss per example, as jaxtrain.losses do"
        ) from error


def compare(
    losses: dict[str, np.ndarray], expected: np.ndarray, rounding: np.ndarray, inexact: str | None
) -> str:
    """Returns a sentence about how far losses agree with those of PyTorch.

    Args:
      losses: the losses in JAX by way.
      expected: those of PyTorch.
      rounding: the effect of rounding on them.
      inexact: why only mean losses can be compared, such as "draws random numbers", or None.

    Raises:
      DisagreementError: they differ by more than rounding explains.
      InputError: those of PyTorch are not finite.
    """
    if not np.isfinite(expected).all():
        step = int(np.argmin(np.isfinite(expected)))
        raise InputError(
            f"the loss of PyTorch is {expected[step]} in step {step + 1}; expected a finite one: "
            "use a smaller learning rate, or scaled inputs"
        )
    count = len(expected)
    if inexact is not None:
        mean = float(expected.mean())
        allowed = _ROUGHLY * abs(mean) + _ROUGHLY_OF_FIRST * abs(float(expected[0]))
        means = {way: float(each.mean()) for way, each in losses.items()}
        for way, other in means.items():
            if not abs(other - mean) <= allowed:
                raise DisagreementError(way, None, other, mean, allowed)
        return (
            f"The module {inexact}; the mean loss of {count} steps is {mean:.4g} in "
            f"PyTorch, and {next(iter(means.values())):.4g} in JAX."
        )
    bounds = _FRACTION * (np.abs(expected) + 0.01 * abs(expected[0])) + _ROUNDINGS * rounding
    for way, found in losses.items():
        wrong = ~(np.abs(found - expected) <= bounds)  # also if it is not finite
        if wrong.any():
            step = int(np.argmax(wrong))
            raise DisagreementError(
                way, step + 1, float(found[step]), float(expected[step]), float(bounds[step])
            )
    largest = max(float(np.abs(found - expected).max()) for found in losses.values())
    return f"The losses of {count} steps without dropout agree to {largest:.1g}."


def _arrays(dataset: Any, batch_size: int) -> Dataset:
    """Returns the first batches of a data set as arrays of NumPy."""
    is_map = not isinstance(dataset, Dataset | tuple)
    if is_map and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        first = dataset[0] if len(dataset) else None
        if not isinstance(first, tuple) or len(first) != 2:
            raise InputError(
                "the data set has no pairs of an input and a target; expected dataset[0] to be one",
                argument="dataset",
            )
        size = sum(np.asarray(each).nbytes for each in first) * batch_size
        limit = most_batches(size) * batch_size
        pairs = [dataset[index] for index in range(min(len(dataset), limit))]
        dataset = tuple(
            np.stack([np.asarray(x) for x in each]) for each in zip(*pairs, strict=True)
        )
    if isinstance(dataset, tuple) and len(dataset) == 2:
        dataset = Dataset(*dataset)
    if not isinstance(dataset, Dataset) or dataset.targets is None:
        raise InputError(
            f"dataset is a {type(dataset).__name__}; expected inputs and targets, as a Dataset or "
            "a tuple of arrays, or an object with len(dataset) and dataset[index], such as "
            "loader.dataset of a DataLoader",
            argument="dataset",
        )
    if dataset.weights is not None or dataset.shared is not None:
        raise InputError(
            "the data set has weights or shared arrays, which a race does not use; expected inputs "
            "and targets alone",
            argument="dataset",
        )

    def convert(arrays: Any) -> Any:
        parts = arrays if isinstance(arrays, tuple) else (arrays,)
        found = tuple(np.asarray(part) for part in parts)
        for part in found:
            if part.dtype == object or part.ndim == 0:
                raise InputError(
                    f"the data set has a {type(parts[0]).__name__} in the place of an array; "
                    "expected arrays, or tuples of arrays, [examples, ...]",
                    argument="dataset",
                )
        return found if isinstance(arrays, tuple) else found[0]

    data = Dataset(convert(dataset.inputs), convert(dataset.targets))
    if len(data) < batch_size:
        raise InputError(
            f"batch_size is {batch_size} for {len(data)} examples; expected at most as many",
            argument="batch_size",
        )
    arrays = jax.tree.leaves((data.inputs, data.targets))
    most = most_batches(sum(part[:batch_size].nbytes for part in arrays))
    return data[: min(len(data) // batch_size, most) * batch_size]


def most_batches(size: int) -> int:
    """Returns how many batches of a size in bytes are used at most."""
    return max(_MIN_BATCHES, min(_MAX_BATCHES, _MAX_BYTES // max(size, 1)))


def _torch_loss(loss_fn: Loss) -> Callable[[Any, Any], Any]:
    """Returns the loss of PyTorch for one of `jaxtrain.losses`, also for one with options."""
    from jaxtrain import losses
    from jaxtrain.race import pytorch

    inner, options = loss_fn, {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        inner, options = loss_fn.func, loss_fn.keywords
    name = name_of(inner)
    is_known = name in pytorch.LOSSES and getattr(losses, name) is inner
    if not is_known or not all(isinstance(value, int | float) for value in options.values()):
        raise InputError(
            f"torch_loss is missing for {name_of(loss_fn)}; expected the same loss in PyTorch, "
            "torch_loss(outputs, targets), which is known for jaxtrain.losses."
            f"{', '.join(pytorch.LOSSES)}",
            argument="torch_loss",
        )
    return functools.partial(pytorch.LOSSES[name], **options)


def _describe_settings(found: dict[str, Any]) -> str:
    """Returns a sentence about PyTorch's settings."""

    def name(settings: dict[str, Any]) -> str:
        threads = settings["threads"]
        parts = [f"{threads} thread{'s' * (threads > 1)}"]
        parts += ["channels_last"] * settings["channels_last"]
        return ", ".join([*parts, *filter(None, [settings["variant"]])])

    tried = "; ".join(f"{name(each)} {number(1000 * value)} ms" for each, value in found["tried"])
    return f"PyTorch is fastest with {name(found['settings'])} (tried: {tried})."


def _shapes(arrays: Any, batch_size: int) -> str:
    parts = arrays if isinstance(arrays, tuple) else (arrays,)
    return " and ".join(str((batch_size, *part.shape[1:])) for part in parts)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
