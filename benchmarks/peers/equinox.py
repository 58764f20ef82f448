"""Equinox as a peer: a step under `eqx.filter_jit`, on slices of NumPy arrays."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from benchmarks.networks import equinox as networks
from benchmarks.peers.optax_optimizers import make_optimizer
from benchmarks.problem import Params, Problem, Trainer, normalize


def step_by_step(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a Python loop over the step."""
    model, model_state = networks.make(problem, params)
    optimizer = make_optimizer(problem.optimizer)
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

    inputs, targets = normalize(problem.images), problem.labels.astype(np.int32)
    first = jnp.asarray(inputs[: problem.batch_size]), jnp.asarray(targets[: problem.batch_size])

    def steps(count: int) -> None:
        nonlocal carry
        for _ in range(count):
            carry, _ = train_step(carry, *first)
        jax.block_until_ready(eqx.filter(carry, eqx.is_array))

    def losses() -> np.ndarray:
        nonlocal carry
        collected = []
        for index in range(problem.steps):
            part = slice(index * problem.batch_size, (index + 1) * problem.batch_size)
            carry, loss = train_step(carry, inputs[part], targets[part])
            collected.append(loss)
        return np.asarray(jax.block_until_ready(jnp.stack(collected)))

    def prepare(images: np.ndarray) -> jax.Array:
        return jnp.asarray(normalize(images))

    def predict(images: jax.Array) -> np.ndarray:
        return np.asarray(logits_of(carry[0], carry[1], images))

    return Trainer(steps, losses, losses, prepare, predict, lambda: int(carry[-1]))
