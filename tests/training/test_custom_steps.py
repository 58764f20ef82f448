"""Custom steps of `gradients` and `apply_gradients`: a GAN, several optimizers, extra arguments."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

LOSS = jt.losses.cross_entropy


def test_train_step_is_gradients_then_apply_gradients(small_state, small_classes) -> None:
    @jax.jit
    def step(state, batch):
        loss, grads, aux = jt.gradients(state, batch, LOSS)
        return jt.apply_gradients(state, grads, model_state=aux.model_state), loss, aux

    ours, loss, aux = step(small_state, small_classes)
    theirs, metrics = jt.train_step(small_state, small_classes, LOSS)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
        ours.params,
        theirs.params,
    )
    assert ours.step == theirs.step == 1
    np.testing.assert_allclose(LOSS(aux.predictions, small_classes.targets).mean(), loss, rtol=1e-6)


def test_a_gan_learns_the_mean_of_its_data() -> None:
    """The generator shifts noise around 0 to data around 3."""

    class Generator(nn.Module):
        @nn.compact
        def __call__(self, noise, train: bool = False):
            return noise + self.param("shift", nn.initializers.zeros, (1, 1))

    class Discriminator(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(1)(nn.relu(nn.Dense(16)(inputs)))[:, 0]

    ones, zeros, bce = jnp.ones(64), jnp.zeros(64), jt.losses.sigmoid_binary_cross_entropy
    keys = jax.random.split(jax.random.key(0), 3)
    generator = jt.init_state(Generator(), optax.adam(0.03), jnp.ones((1, 1)), key=keys[0])
    critic = jt.init_state(Discriminator(), optax.adam(0.01), jnp.ones((1, 1)), key=keys[1])

    @jax.jit
    def step(generator, critic, key):
        noise, real = jax.random.normal(key, (2, 64, 1))
        fake = jt.predict(generator, noise)
        both = jt.Dataset(jnp.concatenate([real + 3, fake]), jnp.concatenate([ones, zeros]))
        _, grads, _ = jt.gradients(critic, both, bce)
        critic = jt.apply_gradients(critic, grads)

        def fools(fake, targets):
            return bce(jt.predict(critic, fake), targets)

        _, grads, _ = jt.gradients(generator, jt.Dataset(noise, ones), fools)
        return jt.apply_gradients(generator, grads), critic

    for key in jax.random.split(keys[2], 400):
        generator, critic = step(generator, critic, key)
    assert float(generator.params["shift"][0, 0]) == pytest.approx(3.0, abs=0.7)


def test_partition_freezes_all_layers_but_the_first(small_state, small_classes) -> None:
    optimizer = optax.partition(
        {"first": optax.sgd(0.1), "rest": optax.set_to_zero()},
        lambda params: {n: "first" if n == "Dense_0" else "rest" for n in params},
    )
    state = jt.with_optimizer(small_state, optimizer)
    after, _ = jt.train_step(state, small_classes, LOSS)
    moved = {
        name: not np.array_equal(after.params[name]["weight"], state.params[name]["weight"])
        for name in state.params
    }
    assert moved == {"Dense_0": True, "Dense_1": False}


def test_extra_arguments_reach_the_optimizer(small_state, small_classes) -> None:
    """reduce_on_plateau halves the updates when the value passed to it does not fall."""
    optimizer = optax.chain(
        optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    )
    state = jt.with_optimizer(small_state, optimizer)
    _, grads, _ = jt.gradients(state, small_classes, LOSS)
    for _ in range(4):
        state = jt.apply_gradients(state, grads, value=jnp.float32(1.0))
    scale = optax.tree_utils.tree_get(state.opt_state, "scale")
    assert scale < 1


def test_a_variational_autoencoder_trains() -> None:
    """The latent variables are drawn from their own RNG stream."""

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            mean, log_std = jnp.split(nn.Dense(4)(inputs), 2, axis=-1)
            latent = mean
            if train:
                latent += jnp.exp(log_std) * jax.random.normal(self.make_rng("latent"), mean.shape)
            return {"outputs": nn.Dense(6)(latent), "mean": mean, "log_std": log_std}

    def negative_elbo(predictions, targets):
        error = jnp.square(predictions["outputs"] - targets).sum(axis=1)
        mean, log_std = predictions["mean"], predictions["log_std"]
        divergence = 0.5 * (jnp.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(axis=1)
        return error + 0.1 * divergence

    inputs = jax.nn.one_hot(jnp.arange(60) % 3, 6)
    data = jt.Dataset(inputs, inputs)
    state = jt.init_state(
        Autoencoder(), optax.adam(0.01), inputs[:1], key=jax.random.key(0), rngs=("latent",)
    )
    first, _ = jt.train_step(state, data, negative_elbo)
    again, _ = jt.train_step(state, data, negative_elbo)
    other, _ = jt.train_step(state.replace(key=jax.random.key(9)), data, negative_elbo)
    kernel = [s.params["Dense_1"]["kernel"] for s in (first, again, other)]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    assert (kernel[0] != kernel[2]).any()
    _, history = jt.fit(state, data, loss_fn=negative_elbo, epochs=150, batch_size=20)
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
