"""train_step, eval_step: one batch, one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Shaped

from jaxtrain.data.dataset import Dataset, check_dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.state import TrainState

Metrics = dict[str, Float[Array, ""]]


@functools.partial(jax.jit, static_argnames="loss_fn")
def train_step(state: TrainState, batch: Dataset, loss_fn: Loss) -> tuple[TrainState, Metrics]:
    """One gradient step on one batch.

    Args:
      state: parameters, optimizer state and PRNG key; left untouched.
      batch: inputs [batch, ...] and targets [batch, ...].
      loss_fn: per-example loss; its mean over the batch is minimised. Pass the same function
        object each time: a new one (a lambda in the loop) compiles anew.

    Returns:
      The next state, and {"loss": mean loss before the update}.

    Raises:
      InputError: the batch is no Dataset of as many inputs as targets, or the loss is not one
        value an example.
    """
    next_state, loss, _ = gradient_step(state, batch, loss_fn)
    return next_state, {"loss": loss}


def gradient_step(
    state: TrainState, batch: Dataset, loss_fn: Loss
) -> tuple[TrainState, Float[Array, ""], PyTree]:
    """`train_step` to build on: the next state, the loss, and its gradient as it was computed."""
    check_dataset(batch, "batch")

    def mean_loss(params: PyTree) -> tuple[Array, PyTree]:
        predictions, model_state = state.apply_fn(
            {"params": params, **state.model_state},
            batch.inputs,
            train=True,
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            mutable=list(state.model_state),
        )
        return jnp.mean(per_example(loss_fn, predictions, batch)), model_state

    (loss, model_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    # Line searches (optax.lbfgs and its like) ask for these three; other optimizers ignore them.
    updates, opt_state = optax.with_extra_args_support(state.tx).update(
        grads,
        state.opt_state,
        state.params,
        value=loss,
        grad=grads,
        value_fn=lambda params: mean_loss(params)[0],
    )
    next_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        model_state=model_state,
    )
    return next_state, loss, grads


def unless_nonfinite(
    before: TrainState, after: TrainState, *values: Float[Array, ""]
) -> TrainState:
    """The state after a step, or where a value is NaN or infinite the one before it.

    The step is counted in either case, so that dropout's draws and the epoch go on.
    """
    finite = jnp.isfinite(jnp.stack(values)).all()
    kept = jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, after)
    return kept.replace(step=after.step)


def eval_step(
    state: TrainState,
    batch: Dataset,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
) -> Metrics:
    """Mean loss and metrics of one batch, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      batch: inputs [batch, ...] and targets [batch, ...].
      loss_fn: per-example loss.
      metric_fns: further per-example functions by name, {"accuracy": metrics.accuracy} for one.

    Returns:
      {"loss": …, and each name: its mean over the batch}.
    """
    return _eval_step(state, batch, metric_items(loss_fn, metric_fns))


@functools.partial(jax.jit, static_argnames="metrics")
def _eval_step(
    state: TrainState, batch: Dataset, metrics: tuple[tuple[str, Metric], ...]
) -> Metrics:
    check_dataset(batch, "batch")
    sums = metric_sums(state, batch, metrics)
    return {name: total / batch.num_examples for name, total in sums.items()}


def metric_items(
    loss_fn: Loss, metric_fns: Mapping[str, Metric] | None
) -> tuple[tuple[str, Metric], ...]:
    """The loss and the metrics as one hashable value, which `jax.jit` asks of static arguments."""
    metric_fns = {} if metric_fns is None else metric_fns
    if not isinstance(metric_fns, Mapping):
        raise InputError(
            f"metric_fns is {metric_fns!r}; expected functions by name, "
            '{"accuracy": metrics.accuracy} for instance'
        )
    if "loss" in metric_fns:
        raise InputError("metric_fns has a metric named 'loss'; that name is the loss's, rename it")
    return (("loss", loss_fn), *metric_fns.items())


def metric_sums(
    state: TrainState, batch: Dataset, metrics: tuple[tuple[str, Metric], ...]
) -> Metrics:
    """Each metric, summed over the examples of a batch."""
    predictions = predict_batch(state, batch.inputs)

    def total(fn: Metric) -> Array:
        values = per_example(fn, predictions, batch)
        # At least in float32: half precision overflows within a few hundred examples.
        return jnp.sum(values, dtype=jnp.promote_types(values.dtype, jnp.float32))

    return {name: total(fn) for name, fn in metrics}


def predict_batch(state: TrainState, inputs: Shaped[Array, "batch ..."]) -> Array:
    """The model's output for one batch, in evaluation mode."""
    return state.apply_fn({"params": state.params, **state.model_state}, inputs, train=False)


def per_example(fn: Metric, predictions: Array, batch: Dataset) -> Float[Array, "batch"]:
    """`fn(predictions, targets)`, refused unless it is one value an example."""
    values = fn(predictions, batch.targets)
    if jnp.shape(values) != (batch.num_examples,):
        raise InputError(
            f"{getattr(fn, '__name__', fn)} returned the shape {jnp.shape(values)} for a batch of "
            f"{batch.num_examples}; expected one value an example, ({batch.num_examples},): leave "
            "the mean over the batch to the step"
        )
    return values
