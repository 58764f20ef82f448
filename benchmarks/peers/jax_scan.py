"""A training loop by hand as a peer: `lax.scan` over batches, with the same network and optimizer.

Its difference from jaxtrain is the cost of the library. It uses jaxtrain's layers and lowerings.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, PyTree

from benchmarks.networks import linen
from benchmarks.peers import loop
from benchmarks.peers.jaxtrain import make_optimizer
from benchmarks.problem import Params, Problem, Trainer
from jaxtrain import lowerings


def make(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is one scan, and a step for the partial last batch."""
    model, optimizer = linen.make(problem), make_optimizer(problem.optimizer)
    images, labels = jnp.asarray(problem.images), jnp.asarray(problem.labels)
    statistics = dict(model.init(jax.random.key(0), images[:1]))
    del statistics["params"]
    start = linen.load(problem, params)
    carry = (start, statistics, optimizer.init(start), jax.random.key(0), jnp.int32(0))

    def step(carry: PyTree, batch: tuple[Array, Array]) -> tuple[PyTree, Array]:
        params, statistics, opt_state, key, count = carry
        images, labels = batch

        def loss_fn(params: PyTree) -> tuple[Array, Any]:
            with lowerings.scope():
                logits, updated = model.apply(
                    {"params": params, **statistics},
                    images,
                    True,
                    rngs={"dropout": jax.random.fold_in(key, count)},
                    mutable=list(statistics),
                )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, dict(statistics), opt_state, key, count + 1), loss

    full, size = len(images) // problem.batch_size, problem.batch_size

    @jax.jit
    def epoch(carry: PyTree, images: Array, labels: Array) -> tuple[PyTree, Array]:
        batches = (
            images[: full * size].reshape(full, size, *images.shape[1:]),
            labels[: full * size].reshape(full, size),
        )
        carry, losses = lax.scan(step, carry, batches)
        if full * size < len(images):
            carry, last = step(carry, (images[full * size :], labels[full * size :]))
            losses = jnp.append(losses, last)
        return carry, losses

    def losses() -> np.ndarray:
        nonlocal carry
        carry, found = epoch(carry, images, labels)
        return np.asarray(found)

    @jax.jit
    def logits(carry: PyTree, images: Array) -> Any:
        return model.apply({"params": carry[0], **carry[1]}, images)

    def no_steps(count: int) -> None:  # the suite `step` does not measure the scan
        raise NotImplementedError

    return Trainer(
        loop.repeated(losses),
        losses,
        no_steps,
        lambda images: np.asarray(logits(carry, jnp.asarray(images))),
        lambda: int(carry[-1]),
    )
