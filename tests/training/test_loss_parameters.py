"""Losses that receive parameters, the model state, inputs or a key, wherever a loss is used."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from tests.training.helpers import assert_close

KEY, DECAY = jax.random.key(0), 0.3
MSE = jt.losses.mean_squared_error
X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
Y = (X @ [1.0, -2.0, 3.0] + 0.5)[:, None].astype(np.float32)
DATA = jt.Dataset(X, Y)


def half_squares(params: Any) -> Any:
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def ridge(predictions, targets, *, params, scale=1.0):
    return MSE(predictions, targets) + scale * DECAY * half_squares(params)


def init(optimizer: Any = None, model: Any = None) -> jt.TrainState:
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return jt.init_state(nn.Dense(1) if model is None else model, optimizer, X[:1], key=KEY)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batches", [1, 3])
def test_an_l2_term_is_the_weight_decay_of_sgd(precision: str, batches: int) -> None:
    """Also in the row of the history, and where gradients of several batches are accumulated."""

    def run(loss_fn: Any, weight_decay: float) -> Any:
        optimizer = jt.optimizers.sgd(0.1, weight_decay=weight_decay)
        if batches > 1:
            optimizer = jt.optimizers.accumulate_gradients(optimizer, batches)
        model = nn.Dense(1) if precision == "float32" else jt.mixed_precision(nn.Dense(1))
        state = init(optimizer, model)
        return jt.train(
            state, DATA, DATA, loss_fn=loss_fn, epochs=2, batch_size=8, metric_fns={"mse": MSE}
        )

    (ours, history), (theirs, expected) = run(ridge, 0.0), run(MSE, DECAY)
    assert_close(ours.params, theirs.params, rtol=1e-5)
    assert_close(history["train_mse"], expected["train_mse"], rtol=1e-5)
    term = DECAY * half_squares(ours.params)
    assert_close(history["test_loss"][-1], expected["test_loss"][-1] + term, rtol=1e-5)


def test_a_line_search_sees_the_parameters_that_it_tries() -> None:
    state = init(jt.optimizers.lbfgs())
    state, _ = jt.train(state, DATA, loss_fn=ridge, epochs=20, batch_size=23)
    design = np.append(X, np.ones((23, 1)), axis=1).astype(float)
    solution = np.linalg.solve(
        design.T @ design * 2 / 23 + DECAY * np.eye(4), design.T @ Y * 2 / 23
    )
    assert_close(state.params, {"kernel": solution[:3], "bias": solution[3]}, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Ridge:
    scale: float

    def __call__(self, predictions, targets, params):
        return ridge(predictions, targets, params=params, scale=self.scale)


@functools.wraps(ridge)
def wrapped(*args, **further):
    return ridge(*args, **further)


@pytest.mark.parametrize(
    "loss_fn",
    [
        ridge,
        functools.partial(ridge, scale=1.0),
        Ridge(1.0),
        wrapped,
        jax.jit(ridge),
        jt.losses.ignore_nan(ridge),
        jt.losses.weighted_sum((0.5, ridge), (0.5, MSE), (0.5, wrapped)),
        jt.losses.ignore_nan(jt.losses.weighted_sum((1.0, functools.partial(ridge)))),
    ],
    ids=["function", "partial", "dataclass", "wraps", "jit", "ignore_nan", "weighted_sum", "both"],
)
def test_wrappers_pass_parameters_on(loss_fn: Any) -> None:
    state = init()
    (loss, _), grads = jt.gradients(state, DATA, loss_fn)
    (plain, _), expected = jt.gradients(state, DATA, MSE)
    scale = 1.5 if isinstance(loss_fn, jt.losses.WeightedSum) else 1.0
    plain, expected = jax.tree.map(lambda x: scale * x, (plain, expected))
    assert_close(loss, plain + DECAY * half_squares(state.params), rtol=1e-5)
    assert_close(grads, jax.tree.map(lambda g, p: g + DECAY * p, expected, state.params), rtol=1e-5)


def test_a_wrapper_that_loses_an_argument_is_named() -> None:
    @functools.wraps(ridge)
    def scaled(predictions, targets):
        return 2 * ridge(predictions, targets)

    with pytest.raises(jt.errors.InputError, match=r"ridge wraps .* params, .*\*\*context"):
        jt.train_step(init(), DATA, scaled)


def test_an_argument_that_a_partial_sets_stays() -> None:
    fixed = functools.partial(ridge, params={"one": jnp.ones(2)})
    found, plain = (jt.eval_step(init(), DATA, loss_fn)["loss"] for loss_fn in (fixed, MSE))
    assert_close(found, plain + DECAY)


def test_a_loss_receives_the_inputs_as_the_model_sees_them() -> None:
    """NaN of weight 0 is 0; a metric receives the same."""
    data = DATA.replace(inputs=X.copy(), weights=(np.arange(23) < 20).astype(np.float32))
    data.inputs[20:] = np.nan

    def first_input(predictions, targets, inputs):
        return inputs[:, 0] + 0 * predictions[:, 0] + 0 * jnp.sum(inputs)

    found = jt.evaluate(init(), data, first_input, {"same": first_input}, batch_size=8)
    _, losses = jt.train_epoch(init(), data, first_input, batch_size=23)
    for loss in (found["loss"], found["same"], losses[0]):
        assert_close(loss, X[:20, 0].mean())


def test_evaluation_uses_the_averaged_parameters() -> None:
    def weight(predictions, targets, *, params):
        return predictions[:, 0] * 0 + params["kernel"][0, 0]

    state = init(jt.optimizers.average_parameters(optax.sgd(0.1), 0.5))
    state, _ = jt.train_epoch(state, DATA, MSE, batch_size=8)
    average, newest = (p["kernel"][0, 0] for p in (state.evaluation_params, state.params))
    assert abs(average - newest) > 1e-3
    assert_close(jt.evaluate(state, DATA, weight)["loss"], average)
    assert_close(jt.gradients(state, DATA, weight)[0][0], newest)


class Encoder(nnx.Module):
    """Keeps the KL divergence of its code from a normal distribution in a variable."""

    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        self.kl = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        mean = self.layer(x)
        self.kl[...] = 0.5 * jnp.mean(mean**2)
        return mean


def test_a_variable_with_a_kl_term_is_that_of_the_batch() -> None:
    """In evaluation as well, where the state keeps that of the last training batch."""

    def with_kl(predictions, targets, *, model_state):
        return MSE(predictions, targets) + model_state["kl"]

    def by_hand(predictions, targets):
        return MSE(predictions, targets) + 0.5 * predictions[:, 0] ** 2

    state = init(model=Encoder())
    ours, theirs = (jt.gradients(state, DATA, loss) for loss in (with_kl, by_hand))
    assert_close((ours[0][0], ours[1]), (theirs[0][0], theirs[1]), rtol=1e-5)
    state, _ = jt.train_step(state, DATA, with_kl)
    found, expected = (jt.evaluate(state, DATA, loss)["loss"] for loss in (with_kl, by_hand))
    assert_close(found, expected, rtol=1e-5)


def test_a_physics_informed_term_is_differentiated_twice() -> None:
    """For u = a t² and the equation u' = 2t, the loss is 4 t² (a - 1)²."""
    model = jt.Model(
        lambda key, t: ({"a": jnp.asarray(3.0)}, {}),
        lambda params, model_state, t, *, train, key: (params["a"] * t[:, 0] ** 2, model_state),
    )
    t = jnp.linspace(0.0, 1.0, 8)[:, None]

    def residual(predictions, targets, *, params, inputs):
        def u(t):
            return model.apply(params, {}, t[None], train=True, key=None)[0][0]

        return (jax.vmap(jax.grad(u))(inputs)[:, 0] - 2 * inputs[:, 0]) ** 2

    state = jt.init_state(model, optax.sgd(0.1), t, key=KEY)
    (loss, _), grads = jt.gradients(state, jt.Dataset(t), residual)
    mean = jnp.mean(4 * t**2)
    assert_close((loss, grads["a"]), (mean * 4, mean * 4))


def noisy(predictions, targets, key):
    return MSE(predictions, targets) + jax.random.normal(key, (len(targets),))


def test_a_loss_draws_anew_in_each_step_and_evaluation() -> None:
    state = init(optax.sgd(0.0))
    state, history = jt.fit(
        state, DATA, DATA, loss_fn=noisy, metric_fns={"same": noisy}, epochs=2, callbacks=[]
    )
    assert len(np.unique([*history["train_loss"], *history["test_loss"]])) == 4
    np.testing.assert_array_equal(history["train_loss"], history["train_same"])
    evaluated = [jt.evaluate(state, DATA, noisy, key=k)["loss"] for k in (KEY, KEY, state.key)]
    assert evaluated[0] == evaluated[1] != evaluated[2]
    assert jt.eval_step(state, DATA, noisy, key=jax.random.fold_in(KEY, 0))["loss"] == evaluated[0]
    _, by_train = jt.train(init(optax.sgd(0.0)), DATA, DATA, loss_fn=noisy, epochs=2)
    assert_close(by_train["test_loss"], history["test_loss"])
    with pytest.raises(jt.errors.InputError, match="noisy takes a key, and the evaluation has no"):
        jt.evaluate(state, DATA, noisy)
    with pytest.raises(jt.errors.InputError, match="Dense draws no random numbers in evaluation"):
        jt.evaluate(state, DATA, MSE, key=KEY)


def test_verify_summary_and_find_learning_rate_take_such_losses() -> None:
    def loss_fn(predictions, targets, *, params, model_state, inputs, key):
        scale = 1 + 0.1 * jax.random.uniform(key, (len(targets),))
        return scale * ridge(predictions, targets, params=params) + 0.1 * inputs[:, 0] ** 2

    for each in (loss_fn, ridge):
        assert jt.verify(init(), DATA[:6], each).ok
    assert "Dense" in str(jt.summary(init(), X, Y, loss_fn=loss_fn))
    found = jt.find_learning_rate(init(), DATA, jt.optimizers.sgd, loss_fn=loss_fn, steps=40)
    assert 1e-4 < found.suggestion < 1


def test_other_required_arguments_are_refused() -> None:
    def focal(predictions, targets, gamma):
        return MSE(predictions, targets)

    match = "focal requires the argument 'gamma' besides predictions and targets; expected any of"
    for use in (jt.train_step, jt.evaluate):
        with pytest.raises(jt.errors.InputError, match=match):
            use(init(), DATA, focal)
    jt.eval_step(init(), DATA, functools.partial(focal, gamma=2.0))
    with pytest.raises(jt.errors.InputError, match="takes 1 positional arguments; expected loss"):
        jt.train_step(init(), DATA, lambda predictions: predictions[:, 0])


def test_missing_targets_are_refused_before_a_range_test() -> None:
    data = DATA.replace(targets=np.where(np.arange(23)[:, None] == 4, np.nan, Y))
    with pytest.raises(jt.errors.InputError, match=r"train\.targets holds nan at \[4, 0\]"):
        jt.find_learning_rate(init(), data, jt.optimizers.sgd, loss_fn=ridge)


class Bigrams(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        return nn.Embed(5, 5)(tokens)


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 5, (23, 7)))
LABELS = jnp.asarray(np.random.default_rng(2).integers(0, 5, (23, 7)))


def test_a_loss_per_token_means_over_all_tokens() -> None:
    """In a step, the history, evaluations and accumulated batches; as with weights of 1."""
    loss_fn, data = jt.losses.cross_entropy, jt.Dataset(TOKENS, LABELS)
    state = jt.init_state(Bigrams(), optax.sgd(0.0), TOKENS[:1], key=KEY)
    state, history = jt.fit(
        state,
        data,
        data,
        loss_fn=loss_fn,
        metric_fns={"correct": lambda p, t: jnp.argmax(p, axis=-1) == t},
        epochs=1,
        batch_size=8,
        test_batch_size=10,
        callbacks=[],
    )
    logits = np.asarray(jt.predict(state, TOKENS))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    correct = (logits.argmax(axis=-1) == LABELS).mean()
    for part in ("train", "test"):
        assert_close(history[f"{part}_loss"][0], expected)
        assert_close(history[f"{part}_correct"][0], correct)
    (loss, aux), grads = jt.gradients(state, data, loss_fn)
    assert_close((loss, aux.weight), (expected, 23 * 7))
    accumulated = jt.optimizers.accumulate_gradients(optax.sgd(1.0), 3)
    for weights in (None, jnp.ones((23, 7)), jnp.ones(23)):
        start = jt.with_optimizer(state, accumulated)
        after, _ = jt.train_epoch(start, data.replace(weights=weights), loss_fn, batch_size=8)
        updates = jax.tree.map(jnp.subtract, start.params, after.params)
        assert_close(updates, grads, rtol=1e-5)


def test_a_loss_that_pairs_the_examples_is_refused() -> None:
    """[23, 1] and [23] broadcast to [23, 23], which looks like a loss per token."""

    def squares(predictions, targets):
        with jax.numpy_rank_promotion("allow"):
            return (predictions - targets) ** 2

    flat = jt.Dataset(X, Y[:, 0])
    for use in (jt.train_step, jt.evaluate):
        with pytest.raises(jt.errors.InputError, match="second axis is the batch once more"):
            use(init(), flat, squares)
    square = jt.Dataset(X, np.zeros((23, 23), np.float32))  # as many tokens as examples
    loss = jt.evaluate(init(model=nn.Dense(23)), square, squares)["loss"]
    assert_close(loss, np.mean(np.asarray(jt.predict(init(model=nn.Dense(23)), X)) ** 2))
