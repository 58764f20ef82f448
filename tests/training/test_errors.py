"""Invalid arguments raise an InputError of one sentence instead of an error of Python or JAX."""

from __future__ import annotations

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from flax.training import train_state

import jaxtrain as jt

LOSS = jt.losses.cross_entropy
MODEL, SGD, KEY = jt.models.FeedForward((3,)), optax.sgd(0.1), jax.random.key(0)
# The type checker of `make test TYPES=1` raises before these checks do.
pytestmark = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first"
)


def refused(message: str):
    return pytest.raises(jt.errors.InputError, match=message)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((4, 6), ">f4"), r"inputs has the dtype >f4, .*astype\('float32'\)"),
        (np.ones((4, 6), np.longdouble), r"inputs has the dtype .*astype\('float64'\)"),
        ([[1.0] * 6] * 4, r"inputs\.0\.0 is a float; expected a NumPy or JAX array"),
        ("images", r"inputs is a str; expected a NumPy or JAX array"),
        (
            np.array([[1.0, "north"]] * 4, object),
            r"inputs has the dtype object; .*\[0, 1\] is 'north': .*pandas\.Categorical",
        ),
        (np.array(["1"] * 4), r"inputs has the dtype <U1; .*\[0\] is '1': "),
        (np.ones((4, 6), complex), "inputs has the dtype complex128; expected real numbers$"),
    ],
    ids=["big-endian", "long double", "list", "str", "table", "text", "complex"],
)
def test_unsupported_arrays_are_refused(small_state, inputs, message) -> None:
    labels = np.zeros(4, np.int32)
    with refused("train." + message):
        jt.fit(small_state, jt.Dataset(inputs, labels), loss_fn=LOSS)
    with refused("sample_" + message):
        jt.init_state(MODEL, SGD, inputs, key=KEY)


def test_a_data_frame_is_refused(small_state) -> None:
    frame = pandas.DataFrame(np.ones((1, 6), np.float32))
    with refused(r"inputs is a pandas\.DataFrame; .*frame\.to_numpy\(\)"):
        jt.fit(small_state, jt.Dataset(frame, np.zeros(1, np.int32)), loss_fn=LOSS)


def test_invalid_keys_are_refused(small_state, small_classes) -> None:
    with refused(r"key is 0; expected a PRNG key, such as jax\.random\.key\(0\)"):
        jt.train_epoch(small_state, small_classes, LOSS, key=0)
    batch = jax.random.split(jax.random.key(0), 3)
    with refused(r"key is a batch of keys of shape \(3,\); expected a single PRNG key"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, key=batch)
    with refused(r"key is a batch of keys of shape \(3,\); expected a single PRNG key"):
        jt.models.dropout(jnp.ones(3), 0.5, batch)
    with refused(r"key is an array of float32\[2\]; expected a PRNG key"):
        jt.train_epoch(small_state, small_classes, LOSS, key=jnp.ones(2))
    legacy = jax.random.PRNGKey(0)
    jt.train_epoch(small_state, small_classes, LOSS, key=legacy)


@pytest.mark.parametrize("function", [jt.train_step, jt.eval_step, jt.train_epoch, jt.evaluate])
def test_objects_other_than_a_train_state_are_refused(function, small_classes) -> None:
    with refused(r"state is a jaxtrain.*FeedForward; expected a jaxtrain\.TrainState"):
        function(MODEL, small_classes, LOSS)
    flax_state = train_state.TrainState.create(apply_fn=MODEL.apply, params={}, tx=SGD)
    with refused(r"state is a flax\.training\.train_state\.TrainState; expected a jaxtrain"):
        function(flax_state, small_classes, LOSS)


def test_a_loss_given_by_name_is_refused(small_state, small_classes) -> None:
    for function in (jt.train_step, jt.eval_step, jt.train_epoch, jt.evaluate):
        with refused("loss_fn is 'cross_entropy'; expected a function, such as jaxtrain.losses"):
            function(small_state, small_classes, "cross_entropy")
    with refused("loss_fn is 'cross_entropy'"):
        jt.fit(small_state, small_classes, loss_fn="cross_entropy")


def test_validation_data_of_another_width_are_refused(small_state, small_classes) -> None:
    wide = small_classes.replace(inputs=jnp.ones((50, 7)))
    with refused(r"does not take the inputs of validation \(.*float32\[1, 7\] per example"):
        jt.fit(small_state, small_classes, validation=wide, loss_fn=LOSS)


def test_labels_of_wrapped_losses_are_checked(small_state, small_classes) -> None:
    @functools.wraps(LOSS)
    def wrapped(predictions, targets):
        return 2 * LOSS(predictions, targets)

    wrong = small_classes.replace(targets=small_classes.targets + 1)
    nested = jt.losses.weighted_sum((0.1, LOSS), (0.5, jt.losses.weighted_sum((2.0, wrapped))))
    for loss_fn in (wrapped, functools.partial(LOSS, label_smoothing=0.1), nested):
        with refused(r"train\.targets holds the label 3"):
            jt.fit(small_state, wrong, loss_fn=loss_fn)
    weighted = wrong.replace(weights=jnp.ones(50))
    with refused(r"train\.targets holds the label 3"):
        jt.fit(small_state, weighted, loss_fn=LOSS)


IMAGES, ROWS = np.ones((8, 4, 4), np.float32), np.ones((8, 5), np.float32)
INTEGERS = np.arange(8, dtype=np.int32) % 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES, IMAGES, INTEGERS), r"weights int32\[8\] for the targets float32\[8,4,4\]"),
        ((ROWS, ROWS, INTEGERS), r"pass \(\(first, second\), target\)"),
        ((IMAGES, INTEGERS, IMAGES), r"weights float32\[8,4,4\] for the targets int32\[8\]"),
    ],
    ids=["images and labels", "rows and labels", "an image as weights"],
)
def test_two_inputs_and_a_target_are_not_taken_for_weights(small_state, batch, message) -> None:
    for data in (batch, [batch], [list(batch)], jt.Dataset(*batch)):
        with refused(message):
            jt.evaluate(small_state, data, LOSS)
    with refused(message):
        jt.train_step(small_state, tuple(map(jnp.asarray, batch)), LOSS)


def test_weights_of_all_kinds_are_weights() -> None:
    state = jt.init_state(nn.Dense(5), SGD, ROWS[:1], key=KEY)
    tokens = np.zeros((8, 5), np.int32)
    for targets, weights, loss in (
        (ROWS, INTEGERS.astype(np.float32), jt.losses.mean_squared_error),
        (ROWS, INTEGERS == 1, jt.losses.mean_squared_error),
        (INTEGERS, INTEGERS, LOSS),
        (ROWS[:, :1] * np.ones(5, np.float32), np.ones(8), jt.losses.mean_squared_error),
        (tokens, tokens + 1, lambda predictions, targets: predictions),
    ):
        assert jnp.isfinite(jt.evaluate(state, (ROWS, targets, weights), loss)["loss"])


def test_a_missing_axis_of_the_targets_is_named() -> None:
    state = jt.init_state(nn.Dense(1), SGD, ROWS[:1], key=KEY)
    for loss in (jt.losses.mean_squared_error, lambda predictions, targets: predictions - targets):
        with jax.numpy_rank_promotion("allow"), refused(r"targets\[:, None\]"):
            jt.evaluate(state, (ROWS, INTEGERS.astype(np.float32)), loss)


def test_control_characters_in_names_are_escaped(small_state, small_classes) -> None:
    def loud(predictions, targets):
        return predictions.mean()

    loud.__name__ = "\x1b[31mred\x1b[0m\n"
    with refused(r"\\x1b\[31mred") as raised:
        jt.train_step(small_state, small_classes, loud)
    assert str(raised.value).isprintable()


def test_objects_other_than_models_are_refused() -> None:
    for model in (jt.models.FeedForward, types.SimpleNamespace(), None):
        with refused("model is"):
            jt.init_state(model, SGD, jnp.ones((1, 2)), key=KEY)


def test_pytorch_tensors_are_refused(small_state) -> None:
    torch = pytest.importorskip("torch")
    batch = jt.Dataset(torch.ones(4, 6), np.zeros(4, np.int32))
    with refused(r"train\.inputs is a torch\.Tensor; .*tensor\.numpy\(\)"):
        jt.fit(small_state, batch, loss_fn=LOSS)
    with refused(r"sample_inputs is a torch\.Tensor; .*tensor\.numpy\(\)"):
        jt.init_state(MODEL, SGD, batch.inputs, key=KEY)
    for step in (jt.train_step, jt.eval_step):
        with refused(r"batch\.inputs is a torch\.Tensor"):
            step(small_state, batch, LOSS)


def test_inputs_that_the_model_does_not_take_are_named(small_state, small_classes) -> None:
    wrong = jt.Dataset(small_classes.inputs[:, :5], small_classes.targets)
    for call in (
        lambda: jt.train_step(small_state, wrong, LOSS),
        lambda: jt.eval_step(small_state, wrong, LOSS),
        lambda: jt.predict(small_state, wrong.inputs),
    ):
        with refused(r"the model does not take the inputs of .*float32\[1, 5\] per example"):
            call()
    with refused(r"inputs is float32\[6\], the shape of one example; .* inputs\[None\]"):
        jt.predict(small_state, small_classes.inputs[0])
    with pytest.raises(TypeError):  # of the loss
        jt.train_step(small_state, small_classes, lambda outputs, targets: outputs @ targets)


def test_held_out_inputs_of_another_kind_are_a_warning(small_state, small_classes) -> None:
    pixels = small_classes.replace(inputs=np.zeros((50, 6), np.uint8))
    with pytest.warns(UserWarning, match=r"train.inputs is float32 and test.inputs is uint8"):
        jt.fit(small_state, small_classes, pixels, loss_fn=LOSS, epochs=1, callbacks=[])


def test_gradients_checks_its_arguments(small_state, small_classes) -> None:
    with refused("loss_fn is 'mse'"):
        jt.gradients(small_state, small_classes, "mse")
    with refused("loss_fn is a Dataset; expected a function"):
        jt.gradients(small_state, small_classes, small_classes)
    with refused("state is a builtins.int"):
        jt.gradients(3, small_classes, LOSS)


def test_a_batch_of_states_is_refused(small_state, small_classes) -> None:
    many = jax.vmap(lambda key: small_state.replace(key=key))(jax.random.split(jax.random.key(0)))
    many = many.replace(step=jnp.zeros(2, jnp.int32))
    with refused(r"state is a batch of states of shape \(2,\); expected (one|a single) state"):
        jt.fit(many, small_classes, loss_fn=LOSS)


def test_invalid_inputs_of_predict_are_refused(small_state, small_classes) -> None:
    with refused(r"inputs\.a has 3, inputs\.b has 2 examples; expected the same number"):
        jt.predict(small_state, {"a": jnp.ones((3, 6)), "b": jnp.ones((2, 6))})
    with refused(
        r"not take the inputs of predict \(predict\.inputs has float32\[1, 7\] per example"
    ):
        jt.predict(small_state, jnp.ones((3, 7)))


def test_an_error_of_a_network_names_the_inputs_of_init_state() -> None:
    def columns(module, x, *, train, rngs):
        return module(x[:, :2])

    with pytest.raises(IndexError) as caught:
        jt.init_state(nn.Dense(1), SGD, jnp.ones(6), key=KEY, call=columns)
    (note,) = (each for each in caught.value.__notes__ if "init_state" in each)
    assert "with sample_inputs of float32[6]: their first axis is that of the examples" in note


def test_data_of_another_kind_name_what_to_pass(small_state, small_classes) -> None:
    with refused(r"such as those of rest, validation = data\.split\(0\.2, key\)"):
        jt.fit(small_state, small_classes, validation=0.2, loss_fn=LOSS)
    with refused("train is a function; .*: call the function, if it returns the data"):
        jt.fit(small_state, lambda: iter([]), loss_fn=LOSS)
    weighted = small_classes.replace(weights=np.ones((len(small_classes), 1)))
    with refused(r"has the shape \[examples\], such as weights\[:, 0\]"):
        jt.train_step(small_state, weighted, LOSS)


def test_unhashable_losses_and_missing_targets_are_refused(small_state, small_classes) -> None:
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


def test_invalid_streams_and_state_metrics_are_refused(small_state, small_classes) -> None:
    with refused("rngs is None; expected a sequence of strings"):
        jt.init_state(MODEL, SGD, small_classes.inputs, key=KEY, rngs=None)
    with refused("the state metric x is 3; expected a function of the state"):
        jt.train(small_state, small_classes, loss_fn=LOSS, state_metrics={"x": 3})


def test_arguments_of_another_type_are_refused(small_state, small_classes) -> None:
    with refused(r"early_stopping is 3; expected None or jaxtrain\.callbacks\.early_stopping"):
        jt.train(small_state, small_classes, loss_fn=LOSS, early_stopping=3)
    with refused("train is a NoneType; expected a jaxtrain"):
        jt.fit(small_state, None, loss_fn=LOSS)
    with refused("optimizer is an optax.MultiSteps; expected its gradient_transformation"):
        jt.init_state(MODEL, optax.MultiSteps(SGD, 2), small_classes.inputs, key=KEY)


@pytest.mark.parametrize("value", [2.5, "64", True, float("nan"), -1])
def test_values_that_are_not_counts_are_refused(small_state, small_classes, value) -> None:
    with refused(f"epochs is {value!r}; expected an integer of at least 0"):
        jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=value)


def test_data_without_examples_are_refused(small_state) -> None:
    with refused(r"dataset\.targets is a scalar; expected an array"):
        jt.evaluate(small_state, jt.Dataset(np.ones((1, 6)), np.float32(1)), LOSS)
    with refused(r"dataset\.inputs is empty"):
        jt.evaluate(small_state, jt.Dataset({}, np.ones(1)), LOSS)


def test_what_makes_an_optimizer_is_not_one(small_state) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    for optimizer, message in (
        (theirs, r"is PyTorch's Adam; .*pass jaxtrain\.optimizers\.from_torch\(optimizer\)"),
        (jt.optimizers.adam, r"is the function adam; .*call it: adam\(learning_rate\)"),
        (optax.adamw, r"is the function adamw; .*call it: adamw\(learning_rate\)"),
        (lambda rate: SGD, r"call it: optimizer\(learning_rate\)"),
    ):
        for call in (
            lambda optimizer=optimizer: jt.with_optimizer(small_state, optimizer),
            lambda optimizer=optimizer: jt.optimizers.accumulate_gradients(optimizer, 2),
            lambda optimizer=optimizer: jt.optimizers.evaluate_with(optimizer, max),
        ):
            with refused(message):
                call()


def test_invalid_optimizers_and_metrics_are_refused(small_state, small_classes) -> None:
    with refused("optimizer is 'adam'; expected an optax"):
        jt.init_state(MODEL, "adam", small_classes.inputs, key=KEY)
    with refused(r"optimizer is a FeedForward; expected .*such as jaxtrain\.optimizers\.sgd"):
        jt.with_optimizer(small_state, MODEL)
    with refused(r"metric_fns is <.*accuracy"):
        jt.evaluate(small_state, small_classes, LOSS, jt.metrics.accuracy)
    with refused("the metric a is 3; expected a function, or a pair"):
        jt.evaluate(small_state, small_classes, LOSS, {"a": 3})


@pytest.mark.parametrize("weights", [-jnp.ones(50), jnp.zeros(50)])
def test_negative_or_all_zero_weights_are_refused(small_state, small_classes, weights) -> None:
    with refused(r"train\.weights (ranges from -1|is 0 everywhere).*; expected (finite|some) wei"):
        jt.fit(small_state, small_classes.replace(weights=weights), loss_fn=LOSS)


def test_weights_of_another_shape_than_the_losses_are_refused(small_state, small_classes) -> None:
    wide = small_classes.replace(weights=jnp.ones((50, 2)))
    with refused(r"cross_entropy returned the shape \(50,\) .*one value per weight, \(50, 2\)"):
        jt.evaluate(small_state, wide, LOSS)
    with refused("cross_entropy returned the shape"):
        jt.fit(small_state, wide, loss_fn=LOSS)


def test_a_missing_rng_stream_is_named(small_classes) -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            x = nn.Dense(3)(inputs)
            return x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x

    with refused(r"draws from an RNG stream without a key .*init_state\(rngs=...\)"):
        jt.init_state(Noisy(), SGD, small_classes.inputs, key=KEY)


def test_fit_inside_a_traced_function_names_train(small_state, small_classes) -> None:
    with refused("fit is called inside a function that JAX traces.*call jaxtrain.train"):
        jax.jit(lambda state: jt.fit(state, small_classes, loss_fn=LOSS)[0])(small_state)


class TwoOutputs(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(3)(x), x


def test_a_loss_of_one_array_names_the_outputs_that_it_does_not_take() -> None:
    batch = (np.ones((4, 6), np.float32), np.zeros(4, int))
    state = jt.init_state(TwoOutputs(), SGD, batch[0], key=KEY)
    for call in (jt.train_step, jt.evaluate):
        with refused(r"cross_entropy fails on .* a tuple of 2 arrays.*call="):
            call(state, batch, LOSS)
    own = jt.train_step(state, batch, lambda outputs, targets: LOSS(outputs[0], targets))[1]
    assert np.isfinite(own["loss"])


@pytest.mark.parametrize("result", [(jnp.ones(4), jnp.ones(4)), [jnp.ones(4)], None])
def test_what_is_no_loss_per_example_names_its_type(result) -> None:
    batch = (np.ones((4, 6), np.float32), np.zeros(4, int))
    state = jt.init_state(MODEL, SGD, batch[0], key=KEY)
    with refused(f"own returned a {type(result).__name__} of .*WeightedMean"):

        def own(outputs, targets):
            return result

        jt.train_step(state, batch, own)


def test_a_loss_of_pytorch_is_refused() -> None:
    torch = pytest.importorskip("torch")
    batch = (np.ones((4, 6), np.float32), np.zeros(4, int))
    state = jt.init_state(MODEL, SGD, batch[0], key=KEY)
    of_torch = torch.nn.functional.cross_entropy
    for loss in (of_torch, torch.nn.MSELoss(), functools.partial(of_torch, label_smoothing=0.1)):
        with refused("of PyTorch; expected a function of JAX's arrays"):
            jt.train_step(state, batch, loss)
