"""Digests of arrays and programs, by which a run recognizes its checkpoints."""

from __future__ import annotations

import hashlib
import re

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain._placement import to_numpy

_CURRENT_MESH = re.compile(r" ctx_mesh=\w+\((?:[^()]|\([^()]*\))*\)")


def digest(tree: PyTree) -> str:
    """Returns a short SHA-256 of the values, dtypes and shapes of all leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = to_numpy(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def digest_program(traced: jax.stages.Traced) -> str:
    """Returns a digest of a traced function and of the arrays that it has captured.

    Without the mesh that was current when JAX first traced a function: the run may resume on
    another number of devices.
    """
    text = _CURRENT_MESH.sub("", without_addresses(str(traced.jaxpr)))
    return digest_text(text) + digest(traced.jaxpr.consts)


def digest_text(text: str) -> str:
    """Returns a short SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_addresses(text: str) -> str:
    """Drops memory addresses, which differ from process to process, and line breaks."""
    return re.sub(r" at 0x[0-9a-fA-F]+|# attributes ", "", " ".join(text.split()))
