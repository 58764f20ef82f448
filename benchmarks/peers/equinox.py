"""Equinox as a peer: a step under `eqx.filter_jit`, on slices of NumPy arrays."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from benchmarks.networks import equinox as networks
from benchmarks.peers import loop
from benchmarks.problem import Params, Problem, Trainer


def step_by_step(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a Python loop over the step."""
    model, model_state = networks.make(problem, params)
    optimizer = loop.make_optimizer(problem.optimizer)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    carry = (model, model_state, opt_state, jax.random.key(0), jnp.int32(0))

    @eqx.filter_jit
    def train_step(carry: Any, inputs: ArrayLike, targets: ArrayLike) -> tuple[Any, jax.Array]:
        model, model_state, opt_state, key, count = carry
        key, dropout_key = jax.random.split(key)

        def loss_fn(model: Any) -> tuple[jax.Array, Any]:
            keys = jax.random.split(dropout_key, jnp.shape(inputs)[0])
            logits, updated = jax.vmap(
                model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None)
            )(inputs, model_state, keys)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean(), updated

        (loss, model_state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        updates, opt_state = optimizer.update(
            grads, opt_state, eqx.filter(model, eqx.is_inexact_array)
        )
        model = eqx.apply_updates(model, updates)
        return (model, model_state, opt_state, key, count + 1), loss

    @eqx.filter_jit
    def logits_of(model: Any, model_state: Any, inputs: jax.Array) -> jax.Array:
        model = eqx.nn.inference_mode(model)
        return jax.vmap(lambda image: model(image, model_state, None)[0])(inputs)

    def step(inputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        nonlocal carry
        carry, loss = train_step(carry, inputs, targets)
        return loss

    return loop.make_trainer(
        problem,
        step,
        lambda images: logits_of(carry[0], carry[1], images),
        lambda: eqx.filter(carry, eqx.is_array),
        lambda: carry[-1],
    )
