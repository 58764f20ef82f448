"""Equinox as a peer: a step under `eqx.filter_jit`, on slices of NumPy arrays."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problem import PIXELS, Params, Problem, Trainer, normalize


class FeedForward(eqx.Module):
    """The network, for one example, with ReLU and dropout after each hidden layer."""

    layers: list[eqx.nn.Linear]
    dropout: eqx.nn.Dropout

    def __init__(self, problem: Problem, params: Params) -> None:
        """Starts from these parameters."""
        widths = (PIXELS, *problem.features)
        self.layers = []
        for layer, (fan_in, width) in enumerate(itertools.pairwise(widths)):
            start = params[f"Dense_{layer}"]
            linear = eqx.nn.Linear(fan_in, width, key=jax.random.key(layer))
            leaves = jnp.asarray(start["kernel"].T), jnp.asarray(start["bias"])
            linear = eqx.tree_at(lambda linear: (linear.weight, linear.bias), linear, leaves)
            self.layers.append(linear)
        self.dropout = eqx.nn.Dropout(problem.dropout_rate)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits of one example."""
        for layer in self.layers[:-1]:
            use, key = (None, None) if key is None else jax.random.split(key)
            x = self.dropout(jax.nn.relu(layer(x)), key=use, inference=use is None)
        return self.layers[-1](x)


def step_by_step(problem: Problem, params: Params) -> Trainer:
    """Returns a trainer whose epoch is a Python loop over the step."""
    model = FeedForward(problem, params)
    sgd = optax.chain(
        optax.add_decayed_weights(problem.weight_decay), optax.sgd(problem.learning_rate)
    )
    opt_state = sgd.init(eqx.filter(model, eqx.is_inexact_array))
    key = jax.random.key(0)

    @eqx.filter_jit
    def train_step(
        model: FeedForward,
        opt_state: optax.OptState,
        key: jax.Array,
        inputs: jax.Array,
        targets: jax.Array,
    ) -> tuple[FeedForward, optax.OptState, jax.Array, jax.Array]:
        key, dropout_key = jax.random.split(key)

        def loss_fn(model: FeedForward) -> jax.Array:
            logits = jax.vmap(model)(inputs, jax.random.split(dropout_key, len(inputs)))
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        updates, opt_state = sgd.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, key, loss

    @eqx.filter_jit
    def predict(model: FeedForward, inputs: jax.Array) -> jax.Array:
        return jax.vmap(model)(inputs).argmax(-1)

    inputs, targets = normalize(problem.images), problem.labels.astype(np.int32)
    first = jnp.asarray(inputs[: problem.batch_size]), jnp.asarray(targets[: problem.batch_size])

    def steps(count: int) -> None:
        nonlocal model, opt_state, key
        for _ in range(count):
            model, opt_state, key, _ = train_step(model, opt_state, key, *first)
        jax.block_until_ready(eqx.filter(model, eqx.is_array))

    def losses() -> np.ndarray:
        nonlocal model, opt_state, key
        collected = []
        for index in range(problem.steps):
            part = slice(index * problem.batch_size, (index + 1) * problem.batch_size)
            # filter_jit treats NumPy arrays as constants, and would compile for each batch.
            batch = jnp.asarray(inputs[part]), jnp.asarray(targets[part])
            model, opt_state, key, loss = train_step(model, opt_state, key, *batch)
            collected.append(loss)
        return np.asarray(jax.block_until_ready(jnp.stack(collected)))

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        found = np.asarray(predict(model, jnp.asarray(normalize(images))))
        return float((found == labels).mean())

    return Trainer(steps, losses, losses, accuracy)
