"""load_checkpoint: the state of a checkpoint, to continue with other settings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from jaxtrain._arguments import check_arguments, check_arrays, checked_path
from jaxtrain.checkpoint import _file
from jaxtrain.checkpoint._orbax import SUFFIX
from jaxtrain.checkpoint._store import find_checkpoint, list_checkpoints, read_checkpoint
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.optimizers._evaluation import restart_evaluation

State = TypeVar("State")
# How many differences an error names.
_SHOWN = 3


def load_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    *,
    weights_only: bool = False,
    best: bool = False,
) -> State:
    """Returns the state of a checkpoint, to continue with other settings.

    Unlike the callback `checkpoint`, which resumes the same run, the function compares neither data
    nor settings. The model and the optimizer with its options, such as the learning rate, are those
    of `state`; all arrays are those of the checkpoint, so that momentum, schedules and the number
    of epochs continue. With another optimizer, whose state has other arrays, load the weights only.

    Args:
      path: a file, such as "checkpoints/epoch-5.safetensors"; or a folder, for its newest one. From
        one within an epoch, training starts that epoch again.
      state: a state of the same model, made by `init_state`.
      weights_only: takes the parameters of training, not their average if the optimizer kept one,
        and the model state; the optimizer state, step, epoch and key are those of `state`, except
        that an average of the parameters starts anew.
      best: takes the best state so far, if a callback such as `early_stopping` kept one.

    Returns:
      A state on the devices of `state`.

    Raises:
      InputError: the file cannot be read or is damaged, has no best state, or names, shapes or
        dtypes differ from those of `state`; the first differences are named.

    Example:
      >>> checkpoint = jt.callbacks.checkpoint("checkpoints")
      >>> _, history = jt.fit(state, train, loss_fn=loss_fn, epochs=2, callbacks=[checkpoint])
      >>> smaller = jt.init_state(model, jt.optimizers.adam(1e-4), train.inputs[:1], key=key)
      >>> smaller = jt.load_checkpoint("checkpoints", smaller)
      >>> smaller.epoch
      Array(2, dtype=int32)
      >>> other = jt.init_state(model, jt.optimizers.sgd(0.1), train.inputs[:1], key=key)
      >>> other = jt.load_checkpoint("checkpoints/epoch-1.safetensors", other, weights_only=True)
    """
    check_arguments(load_checkpoint, locals(), eager="call it outside")
    check_arrays(**dict(named_arrays(state, "state")))
    file = _find(path)
    record, arrays = read_checkpoint(file)
    with _file.malformed_is_damaged(file):
        root = _root(record, best, file)
        parts: Any = state
        if weights_only:
            parts = {name: getattr(state, name) for name in ("params", "model_state")}
        found = _matched(record["leaves"], root, parts, weights_only, file)
        options = _options(root, [name for name, _ in found])
        values = iter(arrays.take(pair for pair in found if pair[0] not in options))
        leaves = [leaf if name in options else next(values) for name, leaf in found]
    restored = jax.tree.unflatten(jax.tree.structure(parts), leaves)
    if not weights_only:
        return restored
    target: Any = state
    opt_state = restart_evaluation(target.opt_state, restored["params"])
    return target.replace(opt_state=opt_state, **restored)


def _find(path: Any) -> Path:
    """Returns the checkpoint, or the newest one of a folder."""
    path = checked_path(path, "path")
    if not path.is_dir() or path.name.endswith(SUFFIX):
        return path
    found = list_checkpoints(path)
    if not found:
        raise InputError(
            f"{path} has no checkpoint; expected a folder with files such as epoch-5.safetensors",
            argument="path",
        )
    return find_checkpoint(path, *found[-1])


def _root(record: dict[str, Any], best: bool, file: Path) -> str:
    """Returns the prefix of the names of the state's arrays in the file."""
    if "columns" not in record:
        raise InputError(f"{file} is not the checkpoint of a run; expected one", argument="path")
    if best and record["best"] == "none":
        raise InputError(
            f"{file} has no best state; expected a run with jaxtrain.callbacks.early_stopping or "
            "checkpoint(..., best=), or best=False",
            argument="best",
        )
    return "best" if best and record["best"] == "stored" else "state"


def _options(root: str, names: list[str]) -> set[str]:
    """Returns the arrays that are options of `optax.inject_hyperparams`, such as a learning rate.

    A rate that `set_learning_rate` put in place of a schedule is one; the schedule's count is not.
    """
    option = re.compile(rf"{root}\.opt_state\.(.*\.)?hyperparams(_states)?\.")
    matches = {name: match for name in names if (match := option.match(name))}
    rates = {name.removesuffix("is_fixed") + "rate" for name in matches if _is_fixed(name)}
    return {name for name in matches if not matches[name][2] or _is_fixed(name) or name in rates}


def _is_fixed(name: str) -> bool:
    return name.endswith(".is_fixed")  # of a RateState


def _matched(
    specs: dict[str, str], root: str, parts: PyTree, weights_only: bool, file: Path
) -> list[tuple[str, Any]]:
    """Returns the name in the file of each leaf of a state, with the leaf.

    Raises InputError if names, shapes or dtypes differ.
    """
    expected = _file.describe_leaves(root, parts)
    prefixes = tuple(f"{root}.{name}" for name in parts) if weights_only else (root,)
    recorded = {
        name: spec
        for name, spec in specs.items()
        if any(
            name == prefix or name.startswith((f"{prefix}.", f"{prefix}#")) for prefix in prefixes
        )
    }
    # Dict keys and attributes are written differently, and have the same names.
    shapes = {name: spec.rpartition(" of ")[2] for name, spec in recorded.items()}
    wanted = {name: spec.rpartition(" of ")[2] for name, (spec, _) in expected.items()}
    if shapes != wanted:
        names = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
        shown = "; ".join(
            f"{name.removeprefix(f'{root}.')} is {shapes.get(name, 'missing')} in the file and "
            f"{wanted.get(name, 'missing')} in state"
            for name in names[:_SHOWN]
        )
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        hint = "expected a state of the same model"
        if not weights_only:
            hint += " and optimizer: weights_only=True leaves out the optimizer"
        raise InputError(f"{file} differs from state: {shown}{more}; {hint}")
    return [(name, leaf) for name, (_, leaf) in expected.items()]
