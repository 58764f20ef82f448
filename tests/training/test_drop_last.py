"""drop_last in memory and as a stream, and the warning of batch norm on single examples."""

from __future__ import annotations

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt

KEY = jax.random.key(3)
LOSS = jt.losses.mean_squared_error
X = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
DATA = jt.Dataset(X, X[:, :1])
DROPPED = DATA.replace(drop_last=True)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x).reshape(len(x), -1))


class Nnx(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(self.norm(x))


class Equinox(eqx.Module):
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.out = eqx.nn.Linear(4, 1, key=KEY)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.out(x), state


def state_of(module, inputs=X):
    return jt.init_state(module, optax.sgd(0.1), inputs[:2], key=jax.random.key(0))


def test_the_last_batch_is_left_out_of_every_loop() -> None:
    """9 examples in batches of 4 are 2 steps, of the examples that come first in the order."""
    state = state_of(nn.Dense(1))
    order = np.asarray(jax.random.permutation(jax.random.fold_in(KEY, 1), 9))
    expected = state
    for rows in (order[:4], order[4:8]):
        expected, _ = jt.train_step(expected, DATA.take(rows), LOSS)
    options = {"loss_fn": LOSS, "epochs": 1, "batch_size": 4, "key": KEY}
    fitted, history = jt.fit(state, DROPPED, DROPPED, **options)
    trained, rows = jt.train(state, DROPPED, DROPPED, **options)
    epoch, losses = jt.train_epoch(
        state, DROPPED, LOSS, batch_size=4, key=jax.random.fold_in(KEY, 1)
    )
    streamed, _ = jt.fit(state, jt.data.stream(DROPPED, 4, KEY), loss_fn=LOSS, epochs=1)
    assert len(losses) == len(history.step_losses) == rows["step_losses"].shape[1] == 2
    for each in (fitted, trained, epoch, streamed):
        assert each.step == 2
        np.testing.assert_allclose(each.params["kernel"], expected.params["kernel"], rtol=1e-6)
    # Evaluations use all examples.
    loss = jt.evaluate(expected, DATA, LOSS)["loss"]
    np.testing.assert_allclose(history["test_loss"], [loss], rtol=1e-5)
    np.testing.assert_allclose(rows["test_loss"], [loss], rtol=1e-5)


def test_a_complete_batch_is_needed() -> None:
    message = r"train has 9 examples for batches of 10, and drop_last is True; .*smaller batch_size"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(state_of(nn.Dense(1)), DROPPED, loss_fn=LOSS, batch_size=10, epochs=1)


def test_a_run_with_another_drop_last_does_not_resume(tmp_path) -> None:
    def fit(data):
        checkpoint = jt.callbacks.checkpoint(tmp_path)
        state = state_of(nn.Dense(1))
        return jt.fit(state, data, loss_fn=LOSS, batch_size=4, epochs=1, callbacks=[checkpoint])

    fit(DATA)
    with pytest.raises(jt.errors.InputError, match=r"is now .*without a partial last batch"):
        fit(DROPPED)


SINGLE = r"the last batch of .* has one example, so batch norm \(.*norm.*\).*drop_last=True"
MODULES = {"linen": Linen, "nnx": Nnx, "equinox": lambda: eqx.nn.make_with_state(Equinox)()}


@pytest.mark.parametrize("framework", MODULES)
def test_batch_norm_on_a_last_batch_of_one_example_warns(framework) -> None:
    state = state_of(MODULES[framework]())
    with pytest.warns(UserWarning, match=f"(?i){SINGLE}") as found:
        jt.fit(state, DATA, loss_fn=LOSS, batch_size=4, epochs=2, callbacks=[])
    assert len(found) == 1


def test_every_loop_warns_of_single_examples() -> None:
    state = state_of(Linen())
    for loop in (
        lambda: jt.train(state, DATA, loss_fn=LOSS, batch_size=4, epochs=1),
        lambda: jt.train_epoch(state, DATA, LOSS, batch_size=4),
        lambda: jt.fit(state, jt.data.stream(DATA, 4), loss_fn=LOSS, epochs=1),
        lambda: jax.vmap(lambda seed: jt.train_epoch(state, DATA, LOSS, batch_size=4))(
            jnp.arange(2)
        ),
    ):
        with pytest.warns(UserWarning, match=SINGLE.replace("norm.*\\", ".*\\")):
            loop()
    with pytest.warns(UserWarning, match="each batch of dataset has one example"):
        jt.train_epoch(state, DATA, LOSS, batch_size=1)


@pytest.mark.parametrize(
    ("module", "data", "size"),
    [
        (Linen(), DATA, 3),  # no batch of one example
        (Linen(), DROPPED, 4),
        (nn.Dense(1), DATA, 4),  # no batch norm
        (Linen(), jt.Dataset(np.ones((9, 5, 4), np.float32), X[:, :1]), 4),  # 5 values per channel
    ],
    ids=["divided", "dropped", "no batch norm", "images"],
)
def test_fine_runs_do_not_warn(module, data, size) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jt.train_epoch(state_of(module, data.inputs), data, LOSS, batch_size=size)
