"""Steps of the user's own: a GAN, several optimizers, extra arguments, and in `fit` and `train`."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close, assert_identical

LOSS = jt.losses.cross_entropy


@jax.jit
def gradients(state, batch):
    return jt.gradients(state, batch, LOSS)


def test_train_step_is_gradients_then_apply_gradients(small_state, small_classes) -> None:
    (loss, aux), grads = gradients(small_state, small_classes)
    ours = jt.apply_gradients(small_state, grads, model_state=aux.model_state)
    theirs, metrics = jt.train_step(small_state, small_classes, LOSS)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
    assert_close(ours.params, theirs.params)
    assert ours.step == theirs.step == 1
    np.testing.assert_allclose(LOSS(aux.predictions, small_classes.targets).mean(), loss, rtol=1e-6)


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
    _, grads = gradients(state, small_classes)
    for _ in range(4):
        state = jt.apply_gradients(state, grads, value=jnp.float32(1.0))
    scale = optax.tree_utils.tree_get(state.opt_state, "scale")
    assert scale < 1


def test_a_variational_autoencoder_draws_from_its_own_stream() -> None:
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
    states = [state, state, state.replace(key=jax.random.key(9))]
    first, again, other = [jt.train_step(s, data, negative_elbo)[1]["loss"] for s in states]
    assert first == again != other


def test_gradients_of_another_structure_or_shape_are_refused(small_state, small_classes) -> None:
    _, grads = gradients(small_state, small_classes)
    with pytest.raises(jt.errors.InputError, match=r"grads has the .*, grads = gradients\("):
        jt.apply_gradients(small_state, {"Dense_0": grads["Dense_0"]})
    wide = jax.tree.map(lambda leaf: leaf[None], grads)
    message = r"grads\.Dense_0\.bias has the shape \(1, 8\); expected that of the parameter, \(8,\)"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.apply_gradients(small_state, wide)


def test_a_model_with_a_state_needs_the_next_one(small_classes) -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(inputs))

    state = jt.init_state(Network(), optax.sgd(0.1), small_classes.inputs, key=jax.random.key(0))
    (_, aux), grads = gradients(state, small_classes)
    with pytest.raises(jt.errors.InputError, match="model_state is missing, and the model has one"):
        jt.apply_gradients(state, grads)
    after = jt.apply_gradients(state, grads, model_state=aux.model_state)
    expected, _ = jt.train_step(state, small_classes, LOSS)
    assert_close(after.model_state, expected.model_state)


def test_a_batch_may_be_a_tuple(small_state, small_classes) -> None:
    pair = (small_classes.inputs, small_classes.targets)
    triple = (*pair, jnp.linspace(0, 1, 50))
    options = {"loss_fn": LOSS, "epochs": 1, "batch_size": 50}
    calls = (
        lambda data: jt.train_step(small_state, data, LOSS)[1],
        lambda data: gradients(small_state, data)[1],
        lambda data: jt.eval_step(small_state, data, LOSS),
        lambda data: jt.train_epoch(small_state, data, LOSS, batch_size=50)[1],
        lambda data: jt.evaluate(small_state, data, LOSS),
        lambda data: jt.train(small_state, data, data, **options)[1],
        lambda data: jt.fit(small_state, data, data, **options)[1].step_losses,
    )
    for call in calls:
        assert_identical(call(pair), call(small_classes))
    step, weighted = calls[0], jt.Dataset(*triple)
    assert_identical(step(triple), step(weighted))
    with pytest.raises(jt.errors.InputError, match="batch is a tuple of 4; expected a jaxtrain"):
        jt.train_step(small_state, (*triple, 1), LOSS)


def own_step(state, batch):
    """What `train_step` does, with the norm of the predictions beside the loss."""
    (loss, aux), grads = jt.gradients(state, batch, LOSS)
    state = jt.apply_gradients(state, grads, model_state=aux.model_state)
    return state, {"loss": loss, "size": jnp.mean(jnp.abs(aux.predictions))}


def test_a_step_of_ones_own_trains_as_train_step(small_state, small_classes) -> None:
    """In all loops, in memory and on a stream, with evaluation."""
    batches = [small_classes[start : start + 16] for start in range(0, 50, 16)]
    options = {"loss_fn": LOSS, "metric_fns": {"accuracy": jt.metrics.accuracy}, "epochs": 2}
    expected, history = jt.fit(small_state, small_classes, small_classes, batch_size=16, **options)
    for function, data in ((jt.fit, small_classes), (jt.fit, batches), (jt.train, small_classes)):
        state, found = function(
            small_state, data, small_classes, step_fn=own_step, batch_size=16, **options
        )
        jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
        for name in ("train_loss", "test_loss", "test_accuracy"):
            np.testing.assert_allclose(found[name], history[name], rtol=1e-6)
        assert "train_accuracy" not in found  # the step returns no predictions
        assert np.shape(found["train_size"]) == (2,)
    epoch, losses = jt.train_epoch(small_state, small_classes, step_fn=own_step, batch_size=16)
    np.testing.assert_array_equal(losses, history.step_losses[:4])
    on_stream, losses = jt.train_epoch(small_state, batches, step_fn=own_step)
    np.testing.assert_array_equal(losses, history.step_losses[:4])
    jax.tree.map(np.testing.assert_array_equal, on_stream.params, epoch.params)
    assert epoch.epoch == 1


def test_values_of_a_step_are_means_over_the_examples(small_state, small_classes) -> None:
    """Three batches of 16 examples and one of 2, of which each returns its first input."""

    def step(state, batch):
        loss = jnp.zeros((), jnp.bfloat16)
        return state.replace(step=state.step + 1), {"loss": loss, "first": batch.inputs[0, 0]}

    _, history = jt.fit(small_state, small_classes, step_fn=step, epochs=1, batch_size=16)
    firsts = np.asarray(small_classes.inputs[::16, 0])
    expected = np.average(firsts, weights=[16, 16, 16, 2])
    np.testing.assert_allclose(history["train_first"], [expected], rtol=1e-6)
    assert history["train_loss"].dtype != jnp.bfloat16


class Gan(NamedTuple):
    """Two networks as one state."""

    step: Any
    epoch: Any
    key: Any
    generator: jt.TrainState
    critic: jt.TrainState


def gan_step(gan: Gan, batch: jt.Dataset) -> tuple[Gan, dict[str, Any]]:
    ones, zeros = jnp.ones(len(batch)), jnp.zeros(len(batch))
    bce = jt.losses.sigmoid_binary_cross_entropy
    noise = jax.random.normal(jax.random.fold_in(gan.key, gan.step), batch.inputs.shape)
    fake = jt.predict(gan.generator, noise)
    both = (jnp.concatenate([batch.inputs, fake]), jnp.concatenate([ones, zeros]))
    (critic_loss, _), grads = jt.gradients(gan.critic, both, bce)
    critic = jt.apply_gradients(gan.critic, grads)

    def fools(fake, targets):
        return bce(jt.predict(critic, fake), targets)

    (loss, _), grads = jt.gradients(gan.generator, (noise, ones), fools)
    generator = jt.apply_gradients(gan.generator, grads)
    gan = gan._replace(step=gan.step + 1, generator=generator, critic=critic)
    return gan, {"loss": loss, "critic_loss": critic_loss}


class Generator(nn.Module):
    """Shifts noise."""

    @nn.compact
    def __call__(self, noise, train: bool = False):
        return noise + self.param("shift", nn.initializers.zeros, (1, 1))


class Critic(nn.Module):
    """Tells data from what the generator makes."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return nn.Dense(1)(nn.relu(nn.Dense(16)(inputs)))[:, 0]


@pytest.fixture(scope="module")
def gan() -> Gan:
    keys, one = jax.random.split(jax.random.key(0), 3), jnp.ones((1, 1))
    return Gan(
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        keys[2],
        jt.init_state(Generator(), optax.adam(0.03), one, key=keys[0]),
        jt.init_state(Critic(), optax.adam(0.01), one, key=keys[1]),
    )


def test_a_gan_trains_in_fit_and_resumes(tmp_path, gan) -> None:
    """The generator shifts noise around 0 to data around 3."""
    real = jt.Dataset(jax.random.normal(jax.random.key(1), (640, 1)) + 3)
    options = {"step_fn": gan_step, "key": jax.random.key(2)}
    after, history = jt.fit(gan, real, epochs=40, **options)
    assert float(after.generator.params["shift"][0, 0]) == pytest.approx(3.0, abs=0.7)
    assert (after.step, after.epoch, history["epoch"][-1]) == (400, 40, 40)
    assert history["train_critic_loss"].shape == (40,)
    options["callbacks"] = [jt.callbacks.checkpoint(tmp_path, every=3)]
    jt.fit(gan, real, epochs=3, **options)
    resumed, again = jt.fit(gan, real, epochs=40, **options)
    assert_identical(resumed, after)
    assert_identical(again["train_loss"], history["train_loss"])


def test_a_nan_in_a_step_of_ones_own_is_named(small_state, small_classes) -> None:
    def step(state, batch):
        loss = jnp.where(state.step == 5, jnp.nan, 1.0)
        return state.replace(step=state.step + 1), {"loss": loss}

    message = "training loss became nan in epoch 2, step 2"
    with pytest.raises(jt.errors.NonFiniteError, match=message):
        jt.fit(small_state, small_classes, step_fn=step, batch_size=16)


BAD_STEPS = {
    "not a function": (3, "step_fn is 3; expected a function"),
    "only a state": (lambda state, batch: state, "step_fn returned a TrainState; expected the ne"),
    "a number": (lambda state, batch: (state, 1.0), "step_fn returned an array; expected"),
    "no loss": (lambda state, batch: (state, {"cost": 1.0}), r"returned cost of shape \(\); exp"),
    "a vector": (
        lambda state, batch: (state, {"loss": batch.inputs[:, 0]}),
        r"returned loss of shape \(50,\); expected scalars",
    ),
    "another dtype": (
        lambda state, batch: (state.replace(step=state.step + 1.0), {"loss": 1.0}),
        r"returned state\.step as float32\[\]; expected int32\[\]",
    ),
    "another structure": (
        lambda state, batch: (state.replace(params={}), {"loss": 1.0}),
        "returned a state of another structure",
    ),
    "no step taken": (
        lambda state, batch: (state, {"loss": 1.0}),
        r"state\.step is 0 after 1 step.*expected step_fn to increase it by one",
    ),
}


TYPED = hasattr(jt.init_state, "__wrapped__")  # the type checker of `TYPES=1` raises first


@pytest.mark.parametrize(
    "case", [case for case in BAD_STEPS if case != "not a function" or not TYPED]
)
def test_a_step_of_another_form_is_refused(small_state, small_classes, case: str) -> None:
    step_fn, message = BAD_STEPS[case]
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(small_state, small_classes, step_fn=step_fn)


def test_evaluation_needs_a_model_and_a_loss(gan, small_state, small_classes) -> None:
    with pytest.raises(
        jt.errors.InputError, match="test is given, but state is a Gan, which has no"
    ):
        jt.fit(gan, small_classes, small_classes, loss_fn=LOSS, step_fn=gan_step)
    with pytest.raises(jt.errors.InputError, match="loss_fn is None with data or metrics"):
        jt.fit(small_state, small_classes, small_classes, step_fn=own_step)
    with pytest.raises(jt.errors.InputError, match="loss_fn is a NoneType; expected a function"):
        jt.fit(small_state, small_classes)
    if not TYPED:
        with pytest.raises(jt.errors.InputError, match=r"Gan; .*, fit\(\.\.\., step_fn="):
            jt.fit(gan, small_classes, loss_fn=LOSS)
    with pytest.raises(jt.errors.InputError, match="state is a dict without step; expected"):
        jt.fit({"weights": jnp.ones(3)}, small_classes, step_fn=own_step)
