"""The identity of a run: what decides whether it may resume from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import parallel
from jaxtrain._versions import device_name, versions
from jaxtrain.checkpoint import digest, digest_program, digest_text, without_addresses
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError, printable
from jaxtrain.losses import name_of
from jaxtrain.training._plan import Plan, learning_rate
from jaxtrain.training._resident import to_shapes
from jaxtrain.training.early_stopping import EarlyStopping
from jaxtrain.training.state import TrainState

# Packages of which another version may trace the same model to another program.
_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "jaxtrain"}
# Relative tolerance for initial arrays, which versions and devices may round differently.
_TOLERANCE = 1e-5


def identify(
    plan: Plan,
    state: TrainState,
    early_stopping: EarlyStopping | None,
    programs: dict[str, jax.stages.Lowered],
    configuration: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what identifies a run, as JSON-serializable values.

    Args:
      plan: the run.
      state: the state before the first epoch.
      early_stopping: the criterion that may end the run early, or None.
      programs: its lowered programs by name.
      configuration: the user's settings.

    Returns:
      A dict of
        "configuration": the user's settings;
        "exact": values that do not depend on versions: the data, the order, the options;
        "descriptions": model, loss, learning rate and metrics, which explain a difference;
        "jaxprs", "programs": digests of each program, before and after lowering;
        "start": the digest of the state, its PRNG key and counters, and a summary of its arrays;
        "versions": of packages and device.
    """
    held_out = {
        f"{name} data": f"{len(data)} examples with the digest {digest(data)}"
        if isinstance(data, Dataset)
        else repr(data)
        for name, data in plan.held_out.items()
    }
    with parallel.without_mesh():  # the run may resume on another number of devices
        traced = plan.abstract().trace(to_shapes(state))
    return {
        "configuration": dict(configuration),
        "exact": {
            **plan.train.identity(),
            **held_out,
            "batch_size": plan.train.batch_size,
            "test_batch_size": plan.test_batch_size if plan.held_out else None,
            "columns": ", ".join(plan.columns(state)),
            "early_stopping": str(early_stopping),
        },
        "descriptions": {
            "model": without_addresses(repr(state.model)),
            "loss": name_of(plan.loss_fn),
            "learning_rate": learning_rate(state),
            "metrics": ", ".join(
                "+".join(map(name_of, m if isinstance(m, tuple) else (m,))) for _, m in plan.metrics
            ),
        },
        "jaxprs": {name: digest_program(program) for name, program in traced.items()},
        "programs": {name: digest_text(p.as_text()) for name, p in programs.items()},
        "start": {
            "digest": digest(state),
            "counters": digest([state.key, state.step, state.epoch]),
            "summary": _summary(state),
        },
        "versions": {**versions(), "device": device_name(), "devices": _count_devices(state)},
    }


def check_same_run(current: dict[str, Any], recorded: dict[str, Any], where: str) -> None:
    """Raises InputError if a checkpoint belongs to another run; warns if only versions differ.

    With other versions, the initial arrays may differ in their last digits, and the programs may
    be lowered differently. The configuration, the key and the traced programs must still agree.

    Args:
      current: the identity of this run. If it starts from a state in the checkpoint, its
        "start" is replaced by the recorded one.
      recorded: the identity in the checkpoint, with its "state_digests".
      where: describes the checkpoint.
    """
    moved = _differences(recorded["versions"], current["versions"])
    descriptions = _differences(recorded["descriptions"], current["descriptions"])
    _refuse(_differences(recorded["configuration"], current["configuration"]), where)
    exact = _differences(recorded["exact"], current["exact"])
    _refuse(exact and descriptions | exact, where)
    if current["start"]["digest"] in recorded["state_digests"]:
        current["start"] = recorded["start"]  # resumed from the state that the run returned
    # Lowering depends on versions and devices; the traced program depends on the libraries alone.
    level = "jaxprs" if moved else "programs"
    different = _differences(recorded[level], current[level])
    libraries = {name: pair for name, pair in moved.items() if name in _LIBRARIES}
    _refuse(different and (descriptions or different) | libraries, where)
    then, now = recorded["start"], current["start"]
    same_start = then["digest"] == now["digest"] or (
        bool(moved)
        and then["counters"] == now["counters"]
        and _close(then["summary"], now["summary"])
    )
    if not same_start:
        name = "start (parameters, optimizer state and key)"
        _refuse(descriptions | {name: (then["digest"], now["digest"])}, where)
    if moved:
        warnings.warn(
            printable(
                f"{where} was written with other versions or on another device "
                f"({_format(moved)}); the last digits may differ from here on"
            ),
            stacklevel=5,
        )


def _count_devices(state: TrainState) -> int:
    shardings = [leaf.sharding for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    return len(set().union(*(sharding.device_set for sharding in shardings)))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**then, **now}
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def _refuse(differences: dict[str, tuple[Any, Any]], where: str) -> None:
    if differences:
        raise InputError(
            f"{where} belongs to another run: {_format(differences)}; use the same settings, or "
            "another checkpoint directory"
        )


def _format(differences: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{name} was {then} and is now {now}" for name, (then, now) in sorted(differences.items())
    )


def _close(then: list[str], now: list[str]) -> bool:
    one, other = np.array(then, np.float64), np.array(now, np.float64)
    return one.shape == other.shape and np.allclose(
        one, other, rtol=_TOLERANCE, atol=1e-7, equal_nan=True
    )


def _digits(value: Any) -> str:
    """Returns a number as text, since JSON has neither NaN nor infinity."""
    return f"{value:.9g}"


def _summary(tree: PyTree) -> list[str]:
    """Returns the mean and the root mean square of every floating-point array."""
    arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if _is_float(x) and x.size]
    return [_digits(v) for a in arrays for v in (a.mean(), np.sqrt(np.square(a).mean()))]


def _is_float(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
