"""Detection of NaN and infinities: in the state after an epoch, and the first step with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxtrain import parallel
from jaxtrain._placement import to_numpy
from jaxtrain.dataset import Dataset, named_arrays
from jaxtrain.errors import NonFiniteError
from jaxtrain.optimizers import skipped_steps, stays_finite
from jaxtrain.training._chunk import Chunk
from jaxtrain.training._plan import learning_rate
from jaxtrain.training.state import TrainState
from jaxtrain.training.step import predict_batch


def check_arrays(before: TrainState, after: TrainState, epoch: int) -> None:
    """Raises NonFiniteError if a value of the state was finite before and no longer is.

    Covers parameters, model state and optimizer state. Values that were infinite before are
    allowed: a running minimum may start at infinity.
    """
    pair = [
        {"params": s.params, "model_state": s.model_state, "opt_state": s.opt_state}
        for s in (before, after)
    ]
    if _stays_finite(*pair):
        return
    for (path, new), old in zip(named_arrays(pair[1], ""), jax.tree.leaves(pair[0]), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            then, now = to_numpy(old), to_numpy(new)
            wrong = np.isfinite(then) & ~np.isfinite(now)
            if wrong.any():
                value = float(now[wrong][0].real)
                raise NonFiniteError(
                    epoch, None, path, value, learning_rate(after), hint_for(after)
                )


@jax.jit
def _stays_finite(before: PyTree, after: PyTree) -> Array:
    return parallel.on_auto_axes(stays_finite, before, after)


def hint_for(state: TrainState) -> str:
    """Returns advice for an optimizer that already skips non-finite steps, else ""."""
    if skipped_steps(state.opt_state) is None:
        return ""
    return "try a smaller learning rate, gradient clipping or scaled inputs"


def raise_for_steps(chunk: Chunk, state: TrainState, epoch: int, finite: np.ndarray) -> NoReturn:
    """Raises NonFiniteError for the first step of a chunk that is not finite.

    Args:
      chunk: the steps.
      state: the state before them.
      epoch: the epoch, counted from 1.
      finite: whether the loss and the measured gradient norm of each step are finite.
    """
    # Measure every gradient now: if the loss is finite and its gradient is not, only the next loss
    # is affected.
    _, losses, norms, _ = chunk.run(state, measure="every")
    bad = int(np.argmin(finite & np.isfinite(losses) & np.isfinite(norms)))
    # Run up to that step, for the learning rate that it used.
    step = chunk.start + bad
    state, *_ = chunk.run(state, stop=step + 1, measure="every")
    loss_is_finite = np.isfinite(losses[bad])
    quantity = "gradient norm" if loss_is_finite else "training loss"
    value = float(norms[bad] if loss_is_finite else losses[bad])
    hint = _label_hint(state, *chunk.batch(step)) if np.isnan(value) else ""
    raise NonFiniteError(epoch, step + 1, quantity, value, learning_rate(state), hint)


def _label_hint(state: TrainState, batch: Dataset, name_of: Callable[[int], str]) -> str:
    """Explains a NaN by a class label out of range, if the step's batch has one."""
    labels: Any = batch.targets
    outputs = jax.eval_shape(predict_batch, state, jax.tree.map(lambda x: x[:1], batch.inputs))
    if not (hasattr(labels, "dtype") and hasattr(outputs, "shape") and outputs.shape):
        return ""
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.ndim != len(outputs.shape) - 1:
        return ""
    classes = outputs.shape[-1]
    values = np.asarray(labels).reshape(len(batch), -1)
    wrong = (values < 0) | (values >= classes)
    if batch.weights is not None and np.shape(batch.weights) == labels.shape:
        wrong &= np.asarray(batch.weights).reshape(values.shape) != 0
    if classes == 1 or not wrong.any():
        return ""
    row, column = np.argwhere(wrong)[0]
    return (
        f"train_data.targets holds the label {values[row, column]} at {name_of(row)}; "
        f"expected labels from 0 to {classes - 1}, since the model has {classes} outputs"
    )
