"""One step: pure, correct on a case solved by hand, for any module and optimizer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

LOSS = jt.losses.cross_entropy


class ConvNet(nn.Module):
    """Has parameters, batch statistics and dropout."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = inputs.reshape(-1, 28, 28, 1).astype(jnp.float32) / 255
        x = nn.relu(nn.Conv(2, (3, 3), strides=4)(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


def test_a_step_solved_by_hand() -> None:
    """ŷ = w x + b at w = 1, b = 0 on (1, 3) and (2, 6): errors −2, −4; loss (4 + 16) / 2."""
    batch = jt.Dataset(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [6.0]]))
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(0.1), batch.inputs, key=jax.random.key(0)
    ).replace(params={"weight": jnp.array([[1.0]]), "bias": jnp.array([0.0])})
    state, metrics = jt.train_step(state, batch, jt.losses.mean_squared_error)
    assert metrics["loss"] == pytest.approx(10.0)
    # dL/dw = mean(2 · error · x) = (−4 − 16) / 2 = −10; dL/db = mean(2 · error) = −6.
    assert state.params["weight"].item() == pytest.approx(2.0)
    assert state.params["bias"].item() == pytest.approx(0.6)
    assert state.step == 1


def test_the_old_state_stays_usable(small_state, small_classes) -> None:
    before = jax.tree.map(np.array, small_state.params)
    first, _ = jt.train_step(small_state, small_classes, LOSS)
    again, _ = jt.train_step(small_state, small_classes, LOSS)
    jax.tree.map(np.testing.assert_array_equal, before, small_state.params)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_dropout_depends_on_the_step_and_the_key(small_state, small_classes) -> None:
    def loss(state):
        return jt.train_step(state, small_classes, LOSS)[1]["loss"].item()

    later = small_state.replace(step=small_state.step + 1)
    other = small_state.replace(key=jax.random.key(9))
    assert len({loss(small_state), loss(later), loss(other)}) == 3
    assert loss(small_state) == loss(small_state)


@pytest.mark.parametrize(
    "optimizer",
    [optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.003)), optax.lbfgs()],
    ids=["clipped rmsprop", "lbfgs"],
)
def test_a_convolutional_network_learns_with_any_optimizer(
    digits: jt.data.Resolved, optimizer
) -> None:
    batch = digits.train.take(jnp.arange(32))
    state = jt.init_state(ConvNet(), optimizer, batch.inputs[:1], key=jax.random.key(0))
    statistics = jax.tree.map(np.array, state.model_state)
    losses = []
    for _ in range(20):
        state, metrics = jt.train_step(state, batch, LOSS)
        losses.append(metrics["loss"].item())
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), statistics, state.model_state)
    assert all(jax.tree.leaves(moved))  # batch norm's running mean and variance


def test_evaluation_uses_the_running_statistics_and_no_dropout(digits: jt.data.Resolved) -> None:
    batch, optimizer = digits.test.take(jnp.arange(8)), jt.optimizers.sgd(0.1)
    state = jt.init_state(ConvNet(), optimizer, batch.inputs[:1], key=jax.random.key(0))
    metrics = {"accuracy": jt.metrics.accuracy}
    together = jt.eval_step(state, batch, LOSS, metrics)
    # With batch statistics, one example's loss would depend on the others in its batch.
    singly = [jt.eval_step(state, batch[i : i + 1], LOSS, metrics) for i in range(8)]
    for name in ("loss", "accuracy"):
        mean = np.mean([one[name].item() for one in singly])
        assert together[name].item() == pytest.approx(mean, rel=1e-4)


def test_a_loss_must_return_one_value_per_example(small_state, small_classes) -> None:
    def mean_loss(predictions, targets):
        return jt.losses.cross_entropy(predictions, targets).mean()

    with pytest.raises(jt.errors.InputError, match=r"mean_loss returned the shape \(\).*\(50,\)"):
        jt.train_step(small_state, small_classes, mean_loss)


def test_half_precision_losses_are_summed_in_float32(small_state) -> None:
    """The sum of 3,000 losses of 100 overflows float16."""
    data = jt.Dataset(jnp.zeros((3000, 6)), jnp.zeros(3000, int))

    def hundred(predictions, targets):
        return jnp.full(len(targets), 100, jnp.float16)

    assert jt.evaluate(small_state, data, hundred, batch_size=3000)["loss"] == 100


def test_a_batch_of_unequal_lengths_is_refused(small_state, small_classes) -> None:
    batch = small_classes.replace(targets=small_classes.targets[:-1])
    for step in (jt.train_step, jt.eval_step):
        with pytest.raises(
            jt.errors.InputError, match=r"batch\.inputs has 50 examples and batch\.targets has 49"
        ):
            step(small_state, batch, LOSS)


def test_a_metric_named_loss_is_refused(small_state, small_classes) -> None:
    with pytest.raises(jt.errors.InputError, match="named 'loss'"):
        jt.eval_step(small_state, small_classes, LOSS, {"loss": jt.metrics.accuracy})
