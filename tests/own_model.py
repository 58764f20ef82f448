"""Trains a user's own model with what `pip install jaxtrain` installs, without extras."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxtrain as jt

x = jnp.linspace(-1, 1, 64)[:, None]
data = jt.Dataset(x, 2 * x)
state = jt.init_state(nn.Dense(1), optax.sgd(0.1), x[:1], key=jax.random.key(0))
state, history = jt.fit(
    state,
    data,
    data,
    loss_fn=jt.losses.mean_squared_error,
    epochs=3,
    batch_size=8,
    callbacks=[jt.callbacks.progress(), jt.callbacks.checkpoint("checkpoints")],
)
jt.save("model.safetensors", state)
jt.load("model.safetensors", state)
print(history["test_loss"][-1] < history["test_loss"][0])
