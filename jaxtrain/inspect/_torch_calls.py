"""Runs PyTorch modules on arrays."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree

from jaxtrain.adapters.torch import call


def to_tensors(module: Any, inputs: PyTree) -> PyTree:
    """Returns inputs as tensors of the dtypes that a module expects."""
    floats = (x.dtype for x in module.parameters() if x.is_floating_point())
    dtype = next(floats, torch.float32)

    def convert(leaf: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(leaf, order="C"))
        if tensor.is_floating_point():
            return tensor.to(dtype)
        return tensor if leaf.dtype.itemsize == 1 else tensor.long()

    return jax.tree.map(convert, inputs)


def evaluate(module: Any, inputs: PyTree) -> list[np.ndarray]:
    """Returns the outputs of a copy of a module in evaluation mode as arrays."""
    module = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        outputs = call(module, to_tensors(module, inputs))
    return [leaf.float().numpy() for leaf in jax.tree.leaves(outputs)]
