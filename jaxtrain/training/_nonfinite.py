"""Detection of NaN and infinities: in the state after an epoch, and the first step with one."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxtrain import parallel
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import NonFiniteError
from jaxtrain.optimizers import skipped_steps, stays_finite
from jaxtrain.training._plan import Plan, learning_rate
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
            wrong = np.isfinite(old) & ~np.isfinite(new)
            if wrong.any():
                value = float(np.asarray(new)[wrong][0].real)
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


def raise_for_steps(
    plan: Plan, state: TrainState, order: Array, epoch: int, start: int, finite: np.ndarray
) -> NoReturn:
    """Raises NonFiniteError for the first step of a chunk that is not finite.

    Args:
      plan: the run.
      state: the state before the chunk.
      order: the epoch's order of the examples.
      epoch: the epoch, counted from 1.
      start: the chunk's first step.
      finite: whether the loss and the measured gradient norm of each step are finite.
    """
    # Measure every gradient now: if the loss is finite and its gradient is not, only the next loss
    # is affected.
    stop = start + len(finite)
    _, losses, norms = plan.run_steps(state, order, start, stop, "every")
    bad = int(np.argmin(finite & np.isfinite(losses) & np.isfinite(norms)))
    # Run up to that step, for the learning rate that it used.
    end = start + bad + 1
    state, *_ = plan.run_steps(state, order, start, end, "every")
    loss_is_finite = np.isfinite(losses[bad])
    quantity = "gradient norm" if loss_is_finite else "training loss"
    value = float(norms[bad] if loss_is_finite else losses[bad])
    examples = np.asarray(order)[(end - 1) * plan.batch_size :][: plan.batch_size]
    hint = _label_hint(plan, state, examples) if np.isnan(value) else ""
    raise NonFiniteError(epoch, end, quantity, value, learning_rate(state), hint)


def _label_hint(plan: Plan, state: TrainState, indices: np.ndarray) -> str:
    """Explains a NaN by a class label out of range, if the step's batch has one."""
    data = plan.train_data
    labels: Any = data.targets
    outputs = jax.eval_shape(predict_batch, state, jax.tree.map(lambda x: x[:1], data.inputs))
    if not (hasattr(labels, "dtype") and hasattr(outputs, "shape") and outputs.shape):
        return ""
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.ndim != len(outputs.shape) - 1:
        return ""
    classes = outputs.shape[-1]
    batch = np.asarray(labels)[indices].reshape(len(indices), -1)
    wrong = (batch < 0) | (batch >= classes)
    if data.weights is not None and np.shape(data.weights) == labels.shape:
        wrong &= np.asarray(data.weights)[indices].reshape(batch.shape) != 0
    if classes == 1 or not wrong.any():
        return ""
    row, column = np.argwhere(wrong)[0]
    return (
        f"train_data.targets holds the label {batch[row, column]} at example {indices[row]}; "
        f"expected labels from 0 to {classes - 1}, since the model has {classes} outputs"
    )
