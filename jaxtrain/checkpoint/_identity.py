"""The identity of a run: what decides whether it may resume from a checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain._placement import to_numpy
from jaxtrain._versions import device_name, versions
from jaxtrain.errors import InputError, printable

_CODE = "the code of the model, the loss or the optimizer"
_CURRENT_MESH = re.compile(r" ctx_mesh=\w+\((?:[^()]|\([^()]*\))*\)")


def digest(tree: PyTree) -> str:
    """Returns a short SHA-256 of the values, dtypes and shapes of all leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = to_numpy(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def digest_text(text: str) -> str:
    """Returns a short SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_program(traced: jax.stages.Traced) -> str:
    """Returns a digest of a traced function and of the arrays that it has captured.

    Without the mesh that was current when JAX first traced a function: the run may resume on
    another number of devices.
    """
    text = _CURRENT_MESH.sub("", without_addresses(str(traced.jaxpr)))
    return digest_text(text) + digest(traced.jaxpr.consts)


def without_addresses(text: str) -> str:
    """Drops memory addresses, which differ from process to process, and line breaks."""
    return re.sub(r" at 0x[0-9a-fA-F]+|# attributes ", "", " ".join(text.split()))


def identify(
    state: PyTree,
    *,
    settings: Mapping[str, str | int | None],
    program: str,
    descriptions: Mapping[str, str],
    seekable: bool = True,
) -> dict[str, Any]:
    """Returns what identifies a run, as JSON-serializable values.

    Args:
      state: the state before the first step, with attributes `step` and `key`.
      settings: what must agree for a run to resume: data, order of the examples, batch sizes,
        columns.
      program: the digest of the traced step; another one causes a warning.
      descriptions: model, loss, optimizer and so on, which explain another program.
      seekable: whether the training data can resume within an epoch.
    """
    # Every part of a TrainState that a change of settings may have initialized differently.
    parts = [name for name in ("params", "opt_state") if hasattr(state, name)]
    start = {name: digest(getattr(state, name)) for name in parts} or {"state": digest(state)}
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    devices = len(set().union(*(leaf.sharding.device_set for leaf in leaves)))
    return {
        "settings": dict(settings),
        "program": program,
        "descriptions": {name: without_addresses(text) for name, text in descriptions.items()},
        "versions": {**versions(), "device": device_name(), "devices": devices},
        "key": digest(state.key),
        "start": {"step": int(state.step), **start},
        "seekable": seekable,
    }


def check_same_run(current: dict[str, Any], recorded: dict[str, Any], where: str) -> list[str]:
    """Checks that a checkpoint belongs to this run.

    Args:
      current: the identity of this run, with the user's "configuration".
      recorded: that in the checkpoint.
      where: describes the checkpoint.

    Returns:
      Warnings: the code of the model or the loss, versions, or initial values differ.

    Raises:
      InputError: settings or the key differ.
    """
    refused = _differences(recorded["configuration"], current["configuration"])
    refused |= _differences(recorded["settings"], current["settings"])
    if recorded["key"] != current["key"]:
        refused["the key of the state"] = recorded["key"], current["key"]
    if refused:
        raise InputError(
            f"{where} belongs to another run: {_format(refused)}; use the same settings, or "
            "another checkpoint directory"
        )
    warned = []
    changed = _differences(recorded["descriptions"], current["descriptions"])
    moved = _differences(recorded["versions"], current["versions"])
    if recorded["program"] != current["program"]:
        named = _format(changed | moved) or _CODE
        warned.append(
            f"{where} was written by other code ({named}); the run resumes with the current code"
        )
    elif moved:
        warned.append(
            f"{where} was written with other versions or on another device ({_format(moved)}); the "
            "last digits may differ from here on"
        )
    then, now = recorded["start"], current["start"]
    if then != now and then["step"] == now["step"]:
        names = f" ({_format(changed)})" if changed else ""
        warned.append(
            f"{where} belongs to a run that began with another initial "
            f"{', '.join(_differences(then, now))}{names}; the values in the checkpoint are used"
        )
    return [printable(message) for message in warned]


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**then, **now}
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def _format(differences: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{name} was {then} and is now {now}" for name, (then, now) in differences.items()
    )
