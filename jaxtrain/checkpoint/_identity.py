"""The identity of a run: what decides whether it may resume from a checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain._placement import blocks, to_words
from jaxtrain._versions import device_name, versions
from jaxtrain.errors import InputError, printable

_CURRENT_MESH = re.compile(r" ctx_mesh=\w+\((?:[^()]|\([^()]*\))*\)")


def digest(tree: PyTree) -> str:
    """Returns a short SHA-256 of the values, dtypes and shapes of all leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        words = to_words(leaf)
        found.update(f"{words.dtype}{words.shape}".encode())
        for block in blocks(words):
            found.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


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
    reading: Mapping[str, str],
    seekable: bool = True,
) -> dict[str, Any]:
    """Returns what identifies a run, as JSON-serializable values.

    Args:
      state: the state before the first step, with attributes `step` and `key`.
      settings: what must agree for a run to resume: data, order of the examples, batch sizes,
        columns.
      program: the digest of the traced step; another one causes a warning, and so do other initial
        parameters or another state of the optimizer, which has the learning rate.
      descriptions: model, loss, optimizer and so on, which explain the warning.
      reading: what reads the streams, another one of which causes a warning.
      seekable: whether the training data can resume within an epoch.
    """
    start = [getattr(state, name) for name in ("params", "opt_state") if hasattr(state, name)]
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    devices = len(set().union(*(leaf.sharding.device_set for leaf in leaves)))
    return {
        "settings": {**settings, "the key of the state": digest(state.key)},
        "step": int(state.step),
        "digest": digest_text(program + digest(start or state)),
        "descriptions": {name: without_addresses(text) for name, text in descriptions.items()},
        "reading": dict(reading),
        "versions": {**versions(), "device": device_name(), "devices": devices},
        "seekable": seekable,
    }


def check_same_run(current: dict[str, Any], recorded: dict[str, Any], where: str) -> str | None:
    """Checks that a checkpoint belongs to this run.

    Args:
      current: the identity of this run, with the user's "configuration".
      recorded: that in the checkpoint.
      where: describes the checkpoint.

    Returns:
      A warning if the code, the initial values, what reads the data, or the versions differ.

    Raises:
      InputError: settings or the key differ.
    """
    refused = _differences(recorded["configuration"], current["configuration"])
    refused |= _differences(recorded["settings"], current["settings"])
    if refused:
        raise InputError(
            f"{where} belongs to another run: {_format(refused)}; use the same settings, or "
            "another checkpoint directory"
        )
    moved = _differences(recorded["versions"], current["versions"])
    reading = _differences(recorded.get("reading", current["reading"]), current["reading"])
    # A state that a run has returned has other values, but continues it.
    other_program = recorded["digest"] != current["digest"] and recorded["step"] == current["step"]
    if other_program or reading:
        changed = _differences(recorded["descriptions"], current["descriptions"])
        changed = (changed if other_program else {}) | reading | moved
        named = _format(changed) or "of the model, the loss, the optimizer or the parameters"
        return printable(
            f"{where} was written by other code or from other initial values ({named}); the run "
            "resumes with the current code and the values of the checkpoint"
        )
    if moved:
        return printable(
            f"{where} was written with other versions or on another device ({_format(moved)}); the "
            "last digits may differ from here on"
        )
    return None


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**then, **now}
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def _format(differences: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{name} was {then} and is now {now}" for name, (then, now) in differences.items()
    )


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
