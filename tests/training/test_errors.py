"""Mistakes that raised a raw Python or JAX error in 0.1 are explained in one sentence."""

from __future__ import annotations

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.training import train_state

import jaxtrain as jt

LOSS = jt.losses.cross_entropy
# `make check` puts a type checker on every function, which stops these before the checks do.
pytestmark = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first"
)


def refused(message: str):
    return pytest.raises(jt.InputError, match=message)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((4, 6), ">f4"), r"inputs has the dtype >f4, .*astype\('float32'\)"),
        (np.ones((4, 6), np.longdouble), r"inputs has the dtype .*astype\('float64'\)"),
        (torch.ones(4, 6), r"inputs is a torch\.Tensor; .*tensor\.numpy\(\)"),
        ([[1.0] * 6] * 4, r"inputs\.0\.0 is a float; expected a NumPy or JAX array"),
        ("images", r"inputs is a str; expected a NumPy or JAX array"),
    ],
    ids=["big-endian", "long double", "torch", "list", "str"],
)
def test_arrays_that_are_not_arrays(small_state, inputs, message) -> None:
    labels = np.zeros(4, np.int32)
    with refused("train_data." + message):
        jt.fit(small_state, jt.Dataset(inputs, labels), loss_fn=LOSS)
    with refused("sample_" + message):
        model = jt.models.FeedForward((3,))
        jt.init_state(model, optax.sgd(0.1), inputs, key=jax.random.key(0))


def test_a_data_frame(small_state) -> None:
    """A stand-in: pandas is not installed with the tests."""
    DataFrame = type("DataFrame", (), {"__module__": "pandas.core.frame"})
    with refused(r"inputs is a pandas\.DataFrame; .*frame\.to_numpy\(\)"):
        jt.fit(small_state, jt.Dataset(DataFrame(), np.zeros(1, np.int32)), loss_fn=LOSS)


def test_keys(small_state, small_classes) -> None:
    with refused(r"key is 0; expected a PRNG key, such as jax\.random\.key\(0\)"):
        jt.train_epoch(small_state, small_classes, LOSS, key=0)
    batch = jax.random.split(jax.random.key(0), 3)
    with refused(r"key is a batch of keys of shape \(3,\); expected a single PRNG key"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, key=batch)
    with refused(r"key is an array of float32\[2\]; expected a PRNG key"):
        jt.train_epoch(small_state, small_classes, LOSS, key=jnp.ones(2))
    legacy = jax.random.PRNGKey(0)
    jt.train_epoch(small_state, small_classes, LOSS, key=legacy)


@pytest.mark.parametrize("function", [jt.train_step, jt.eval_step, jt.train_epoch, jt.evaluate])
def test_what_is_not_a_state(function, small_classes) -> None:
    model = jt.models.FeedForward((3,))
    with refused(r"state is a jaxtrain.*FeedForward; expected a jaxtrain\.TrainState"):
        function(model, small_classes, LOSS)
    params = model.init(jax.random.key(0), small_classes.inputs)
    flax_state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(0.1)
    )
    with refused(r"state is a flax\.training\.train_state\.TrainState; expected a jaxtrain"):
        function(flax_state, small_classes, LOSS)


def test_a_loss_by_name(small_state, small_classes) -> None:
    for function in (jt.train_step, jt.eval_step, jt.train_epoch, jt.evaluate):
        with refused("loss_fn is 'cross_entropy'; expected a function, such as jaxtrain.losses"):
            function(small_state, small_classes, "cross_entropy")
    with refused("loss_fn is 'cross_entropy'"):
        jt.fit(small_state, small_classes, loss_fn="cross_entropy")


def test_validation_data_of_another_width(small_state, small_classes) -> None:
    wide = small_classes.replace(inputs=jnp.ones((50, 7)))
    with refused(r"does not take the inputs of validation_data \(.*float32\[1, 7\] per example"):
        jt.fit(small_state, small_classes, validation_data=wide, loss_fn=LOSS)


def test_a_model_without_train_trains(small_classes) -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dense(3)(inputs)

    state = jt.init_state(Plain(), optax.sgd(0.1), small_classes.inputs, key=jax.random.key(0))
    _, history = jt.fit(state, small_classes, loss_fn=LOSS, epochs=2)
    assert history["train_loss"][1] < history["train_loss"][0]


def test_missing_batch_statistics(small_classes) -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(inputs))

    state = jt.init_state(Network(), optax.sgd(0.1), small_classes.inputs, key=jax.random.key(0))
    with refused("batch_stats"):
        jt.evaluate(state.replace(model_state={}), small_classes, LOSS)


def test_wrapped_losses_keep_the_label_check(small_state, small_classes) -> None:
    import functools

    @functools.wraps(LOSS)
    def wrapped(predictions, targets):
        return 2 * LOSS(predictions, targets)

    wrong = small_classes.replace(targets=small_classes.targets + 1)
    for loss_fn in (wrapped, functools.partial(LOSS), jt.losses.weighted_sum((0.5, LOSS))):
        with refused(r"train_data\.targets holds the label 3"):
            jt.fit(small_state, wrong, loss_fn=loss_fn)
    weighted = wrong.replace(weights=jnp.ones(50))
    with refused(r"train_data\.targets holds the label 3"):
        jt.fit(small_state, weighted, loss_fn=LOSS)


def test_control_characters_do_not_reach_the_terminal(small_state, small_classes) -> None:
    def loud(predictions, targets):
        return predictions.mean()

    loud.__name__ = "\x1b[31mred\x1b[0m\n"
    with refused(r"\\x1b\[31mred") as raised:
        jt.train_step(small_state, small_classes, loud)
    assert str(raised.value).isprintable()


def test_modules_that_are_not_models() -> None:
    inputs = jnp.ones((1, 2))
    for model in (torch.nn.Linear(2, 1), jt.models.FeedForward, types.SimpleNamespace(), None):
        with refused("model is"):
            jt.init_state(model, optax.sgd(0.1), inputs, key=jax.random.key(0))


def test_arrays_are_refused_by_single_steps_too(small_state) -> None:
    batch = jt.Dataset(torch.ones(4, 6), np.zeros(4, np.int32))
    for step in (jt.train_step, jt.eval_step):
        with refused(r"batch\.inputs is a torch\.Tensor"):
            step(small_state, batch, LOSS)


def test_steps_of_ones_own_are_checked(small_state, small_classes) -> None:
    with refused("loss_fn is 'mse'"):
        jt.gradients(small_state, small_classes, "mse")
    with refused("loss_fn is a Dataset; expected a function"):
        jt.gradients(small_state, small_classes, small_classes)
    with refused("state is a builtins.int"):
        jt.gradients(3, small_classes, LOSS)
    with refused("grads has the structure"):
        jt.apply_gradients(small_state, {"weight": jnp.ones(2)})


def test_a_batch_of_states(small_state, small_classes) -> None:
    many = jax.vmap(lambda key: small_state.replace(key=key))(jax.random.split(jax.random.key(0)))
    many = many.replace(step=jnp.zeros(2, jnp.int32))
    with refused(r"state is a batch of states of shape \(2,\); expected one"):
        jt.fit(many, small_classes, loss_fn=LOSS)


def test_inputs_of_predict(small_state, small_classes) -> None:
    with refused(r"inputs is a Dataset; expected its inputs, dataset\.inputs"):
        jt.predict(small_state, small_classes)
    with refused(r"inputs\.a has 3, inputs\.b has 2 examples; expected the same number"):
        jt.predict(small_state, {"a": jnp.ones((3, 6)), "b": jnp.ones((2, 6))})


def test_losses_that_cannot_be_used(small_state, small_classes) -> None:
    class Unhashable:
        __hash__ = None

        def __call__(self, predictions, targets):
            return predictions[:, 0]

    with refused("loss_fn is a Unhashable, which is not hashable"):
        jt.train_step(small_state, small_classes, Unhashable())
    with refused("targets is None; expected an array"):
        jt.train_step(
            small_state, small_classes.replace(targets=None), jt.losses.mean_squared_error
        )


def test_streams_and_state_metrics(small_state, small_classes) -> None:
    with refused("rngs is None; expected the names of RNG streams"):
        jt.init_state(
            jt.models.FeedForward((3,)),
            optax.sgd(0.1),
            small_classes.inputs,
            key=jax.random.key(0),
            rngs=None,
        )
    with refused("the state metric x is 3; expected a function of the state"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, state_metrics={"x": 3})
    for name in ("skipped_steps", "learning_rate", "step_losses"):
        with refused(f"state_metrics has a metric named '{name}'"):
            jt.fit(small_state, small_classes, loss_fn=LOSS, state_metrics={name: lambda s: 1.0})


def test_options_of_another_type(small_state, small_classes) -> None:
    with refused(r"checkpoint is 'folder'; expected None or jaxtrain\.CheckpointOptions"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, checkpoint="folder")
    with refused(r"early_stopping is 3; expected None or jaxtrain\.EarlyStopping"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, early_stopping=3)
    with refused("train_data is None; expected a jaxtrain"):
        jt.fit(small_state, None, loss_fn=LOSS)
    with refused("optimizer is an optax.MultiSteps; expected its gradient_transformation"):
        multi = optax.MultiSteps(optax.sgd(0.1), 2)
        jt.init_state(
            jt.models.FeedForward((3,)), multi, small_classes.inputs, key=jax.random.key(0)
        )
    with refused("sample_inputs is a Dataset; expected its inputs"):
        jt.init_state(
            jt.models.FeedForward((3,)), optax.sgd(0.1), small_classes, key=jax.random.key(0)
        )


@pytest.mark.parametrize("weights", [-jnp.ones(50), jnp.zeros(50)])
def test_weights_below_zero_or_all_zero(small_state, small_classes, weights) -> None:
    with refused(r"train_data\.weights ranges from .*; expected weights of at least 0, and some"):
        jt.fit(small_state, small_classes.replace(weights=weights), loss_fn=LOSS)


def test_weights_of_another_shape_than_the_labels(small_state, small_classes) -> None:
    wide = small_classes.replace(weights=jnp.ones((50, 2)))
    with refused(r"cross_entropy returned the shape \(50,\) .*one value per weight, \(50, 2\)"):
        jt.evaluate(small_state, wide, LOSS)
    with refused("cross_entropy returned the shape"):
        jt.fit(small_state, wide, loss_fn=LOSS)


def test_a_stream_that_is_not_named(small_classes) -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            x = nn.Dense(3)(inputs)
            return x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x

    state = jt.init_state(Noisy(), optax.sgd(0.1), small_classes.inputs, key=jax.random.key(0))
    with refused(r"draws from an RNG stream without a key .*init_state\(rngs=...\)"):
        jt.train_step(state, small_classes, LOSS)
