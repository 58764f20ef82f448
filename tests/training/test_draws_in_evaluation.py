"""Models that draw random numbers in evaluation: refused, or with a key where they are meant to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from tests.training.helpers import Stop, assert_close, assert_same_run, stop_at

KEY = jax.random.key(0)
MSE, SGD = jt.losses.mean_squared_error, optax.sgd(0.0)
X = np.random.default_rng(0).normal(size=(203, 2)).astype(np.float32)
DATA = jt.Dataset(X, X)
NOISY = re.escape("random numbers in evaluation; expected outputs that the inputs determine")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.param("one", nn.initializers.ones, ()) * x
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class Nnx(nnx.Module):
    def __init__(self) -> None:
        self.one, self.rngs = nnx.Param(jnp.ones(())), nnx.Rngs(0)

    def __call__(self, x: Any) -> Any:
        return self.one * x + jax.random.normal(self.rngs.noise(), x.shape)


class Equinox(eqx.Module):
    one: Any

    def __call__(self, x: Any, key: Any) -> Any:
        return self.one * x + jax.random.normal(key, x.shape)


def apply(params: Any, model_state: Any, x: Any, *, train: bool, key: Any) -> Any:
    return params * x + jax.random.normal(key, x.shape), model_state


NETWORKS = {
    "Linen": Linen,
    "NNX": Nnx,
    "Equinox": lambda: Equinox(jnp.ones(())),
    "apply of the Model": lambda: jt.Model(lambda key, x: (jnp.ones(()), {}), apply),
}
KINDS = pytest.mark.parametrize("kind", NETWORKS)


def init(kind: str, **options: Any) -> jt.TrainState:
    options = {"rngs": ("noise",), "draws_in_evaluation": True, **options}
    return jt.init_state(NETWORKS[kind](), SGD, X[:1], key=KEY, **options)


def noise(state: jt.TrainState, key: Any, **options: Any) -> Any:
    return np.asarray(jt.predict(state, X, key=key, **options)) - X


@KINDS
def test_a_model_that_draws_is_refused_unless_it_is_meant_to(kind: str) -> None:
    match = rf"{kind} draws {NOISY}.*init_state\(\.\.\., draws_in_evaluation=True\)"
    with pytest.raises(jt.errors.InputError, match=re.compile(match, re.IGNORECASE)):
        init(kind, draws_in_evaluation=False)


@KINDS
def test_each_example_of_each_batch_draws_its_own_noise(kind: str) -> None:
    """Batch i draws from `fold_in(key, i)`."""
    state = init(kind)
    found = noise(state, KEY, batch_size=50)  # the last batch has 3 examples
    assert len(np.unique(found.round(5))) == found.size
    assert abs(found.mean()) < 5 / found.size**0.5
    assert 0.8 < found.std() < 1.2
    np.testing.assert_array_equal(found, noise(state, KEY, batch_size=50))
    assert (found != noise(state, jax.random.key(1), batch_size=50)).all()
    for i in (0, 1, 4):
        rows = slice(50 * i, min(50 * i + 50, 203))
        outputs, _ = state.model.apply(
            state.params, state.model_state, X[rows], train=False, key=jax.random.fold_in(KEY, i)
        )
        assert_close(found[rows], np.asarray(outputs) - X[rows], atol=1e-5)
    keys = jax.random.split(KEY, 3)
    samples = jax.vmap(lambda key: jt.predict(state, X, key=key))(keys)
    assert_close(samples[1], jt.predict(state, X, key=keys[1]), atol=1e-5)


@KINDS
def test_evaluation_without_a_key_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    state = init(kind)
    match = re.compile(f"{kind} draws random numbers in evaluation, and", re.IGNORECASE)
    for use in (
        lambda: jt.predict(state, X),
        lambda: jt.evaluate(state, DATA, MSE),
        lambda: jt.eval_step(state, DATA, MSE),
        lambda: jt.export.stablehlo(state, tmp_path / "model", X),
        lambda: jt.export.onnx(state, tmp_path / "model", X),
    ):
        with pytest.raises(jt.errors.InputError, match=match):
            use()
    jt.save(tmp_path / "model.safetensors", state)
    jt.load(tmp_path / "model.safetensors", state)


def test_evaluations_in_memory_and_of_a_stream_draw_the_same() -> None:
    state = init("NNX")
    in_memory = jt.evaluate(state, DATA, MSE, {"same": MSE}, batch_size=50, key=KEY)
    batches = [DATA[i : i + 50] for i in range(0, 203, 50)]
    streamed = jt.evaluate(state, batches, MSE, {"same": MSE}, key=KEY)
    assert_close(streamed, in_memory)
    assert_close(in_memory["loss"], np.mean(noise(state, KEY, batch_size=50) ** 2))
    step = jt.eval_step(state, batches[0], MSE, key=jax.random.fold_in(KEY, 0))
    assert_close(step["loss"], np.mean(noise(state, KEY, batch_size=50)[:50] ** 2))


def test_runs_evaluate_with_other_draws_after_each_epoch_and_resume_with_the_same(tmp_path) -> None:
    def fit(*callbacks: Any) -> Any:
        return jt.fit(
            init("Linen"), DATA, DATA, loss_fn=MSE, epochs=3, batch_size=50, callbacks=callbacks
        )

    unbroken = fit()
    losses = unbroken[1]["test_loss"]
    assert len(set(losses)) == 3
    assert np.all(abs(losses - 1) < 0.3)
    with pytest.raises(Stop):
        fit(jt.callbacks.checkpoint(tmp_path), stop_at(3, 1))
    assert_same_run(fit(jt.callbacks.checkpoint(tmp_path)), unbroken)
    _, history = jt.train(init("Linen"), DATA, DATA, loss_fn=MSE, epochs=3, batch_size=50)
    assert_close(history["test_loss"], losses)


class Dropping(nn.Module):
    rate: float = 0.25

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dense(1)(nn.Dropout(self.rate, deterministic=not train)(x))


def call_dropping(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
    return module(inputs, train=True)


def test_monte_carlo_dropout_has_the_mean_and_the_variance_of_the_mask() -> None:
    """Kept inputs are divided by 1 - p, so that the variance of w x is w² x² p / (1 - p)."""
    options = {"rngs": ("dropout",), "call": call_dropping, "draws_in_evaluation": True}
    state = jt.init_state(Dropping(), SGD, X[:1], key=KEY, **options)
    fixed = jt.init_state(Dropping(), SGD, X[:1], key=KEY)
    keys = jax.random.split(KEY, 1000)
    samples = jax.vmap(lambda key: jt.predict(state, X[:5], key=key))(keys)
    terms = np.asarray(state.params["Dense_0"]["kernel"])[:, 0] * X[:5]
    variance = (terms**2).sum(axis=1) * 0.25 / 0.75
    error = samples.mean(axis=0) - jt.predict(fixed, X[:5])
    assert (abs(error[:, 0]) < 5 * np.sqrt(variance / 1000)).all()
    np.testing.assert_allclose(samples.var(axis=0)[:, 0], variance, rtol=0.3)


class AlwaysDropping(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.BatchNorm(use_running_average=False)(x) if self.norm else x
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(20)(x))


def test_dropout_may_always_be_on_in_mixed_precision_as_well() -> None:
    model = jt.mixed_precision(AlwaysDropping())
    state = jt.init_state(model, SGD, X[:1], key=KEY, draws_in_evaluation=True)
    assert 0.4 < (jt.predict(state, X, key=KEY) == 0).mean() < 0.6


def test_what_is_not_meant_is_refused() -> None:
    """A flag or a key without draws, and batch norm in the wrong mode beside dropout that is."""

    def plain(params: Any, model_state: Any, x: Any, *, train: bool, key: Any) -> Any:
        return params * x, model_state

    def init_of(model: Any) -> jt.TrainState:
        return jt.init_state(model, SGD, X[:1], key=KEY, draws_in_evaluation=True)

    call = r"draws_in_evaluation is True, and Dropping draws nothing .*module\(inputs, train=True\)"
    for model, match in (
        (Dropping(), call),
        (jt.Model(lambda key, x: (jnp.ones(()), {}), plain), "plain of the Model draws nothing"),
        (AlwaysDropping(norm=True), "in evaluation, BatchNorm.* is in training mode"),
    ):
        with pytest.raises(jt.errors.InputError, match=match):
            init_of(model)
    state = jt.init_state(Dropping(), SGD, X[:1], key=KEY)
    for use in (
        lambda: jt.predict(state, X, key=KEY),
        lambda: jt.evaluate(state, DATA, MSE, key=KEY),
    ):
        with pytest.raises(jt.errors.InputError, match="key is given, but Dropping draws no"):
            use()
