"""TrainState: its repr, its counters, and optimizers that are replaced or swept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close

LOSS = jt.losses.cross_entropy


def test_repr_shows_shapes_and_no_weights(small_state) -> None:
    text = repr(small_state)
    assert "TrainState(step=0, epoch=0, 83 params" in text
    assert "params.Dense_0.weight: float32[8, 6]" in text
    assert "Array(" not in text
    assert "step=" in repr(jax.vmap(lambda _: small_state)(jnp.arange(3)))
    assert "step=int32[]" in repr(jax.eval_shape(lambda: small_state))
    jax.jit(lambda state: [repr(state), state.step][1])(small_state)  # while traced


def test_a_state_is_frozen(small_state) -> None:
    with pytest.raises(AttributeError):
        small_state.step = 3


def test_epochs_are_counted_across_calls_and_batch_sizes(small_state, small_classes) -> None:
    state, recorded = small_state, []
    for batch_size in (50, 25):
        state, history = jt.fit(state, small_classes, loss_fn=LOSS, epochs=2, batch_size=batch_size)
        recorded += history["epoch"].tolist()
    assert recorded == [1, 2, 3, 4]
    assert state.epoch == 4


def test_two_calls_shuffle_differently(small_state, small_classes) -> None:
    """The order depends on the epoch of the state, even where the step is the same."""
    frozen = jt.with_optimizer(small_state, optax.sgd(0.0))
    frozen = frozen.replace(key=jax.random.key(0))
    options = {"loss_fn": LOSS, "epochs": 1, "batch_size": 25, "key": jax.random.key(3)}
    state, first = jt.fit(frozen, small_classes, **options)
    _, second = jt.fit(state.replace(step=frozen.step), small_classes, **options)
    assert not np.allclose(first.step_losses, second.step_losses)


def test_with_optimizer_starts_a_new_optimizer_on_trained_parameters(
    small_state, small_classes
) -> None:
    trained, _ = jt.train_epoch(small_state, small_classes, LOSS, batch_size=25)
    slow = jt.with_optimizer(trained, jt.optimizers.sgd(1e-3, momentum=0.9))
    assert (slow.step, slow.epoch) == (trained.step, trained.epoch)
    jax.tree.map(np.testing.assert_array_equal, slow.params, trained.params)
    after, _ = jt.train_step(slow, small_classes, LOSS)
    _, grads = jax.jit(lambda state: jt.gradients(state, small_classes, LOSS))(slow)
    jax.tree.map(
        lambda new, old, grad: np.testing.assert_allclose(new, old - 1e-3 * grad, rtol=1e-5),
        after.params,
        slow.params,
        grads,
    )


def test_a_state_without_an_optimizer_predicts_and_names_what_trains_it(small_classes) -> None:
    model, key = jt.models.FeedForward((8, 3), mean=0.0, std=1.0), jax.random.key(0)
    state = jt.init_state(model, None, small_classes.inputs[:1], key=key)
    assert jt.predict(state, small_classes.inputs).shape == (len(small_classes), 3)
    for train in (
        lambda: jt.train_step(state, small_classes, LOSS),
        lambda: jt.fit(state, small_classes, loss_fn=LOSS, epochs=1),
    ):
        with pytest.raises(jt.errors.InputError, match=r"no optimizer; .*with_optimizer\(state, "):
            train()
    trained, _ = jt.train_step(jt.with_optimizer(state, optax.sgd(0.1)), small_classes, LOSS)
    assert trained.step == 1


OPTIMIZERS = {
    "optax.sgd, swept momentum": lambda x: optax.sgd(0.01, momentum=x),
    "clipped, swept rate": lambda x: jt.optimizers.clip_gradients(jt.optimizers.adam(x), 1.0),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_state_from_a_sweep_can_be_trained_further(small_state, small_classes, make) -> None:
    """Each state of the sweep equals that of the same run alone."""

    def epoch(state):
        return jt.train_epoch(state, small_classes, LOSS, batch_size=50)

    @jax.jit
    @jax.vmap
    def sweep(value):
        return epoch(jt.with_optimizer(small_state, make(value)))[0]

    states, losses = jax.vmap(epoch)(sweep(jnp.array([0.03, 0.3])))
    expected = jt.with_optimizer(small_state, make(0.3))
    for _ in range(2):
        expected, last = epoch(expected)
    np.testing.assert_allclose(losses[1], last, rtol=1e-5)
    state = jax.tree.map(lambda leaf: leaf[1], states)
    assert_close(state.params, expected.params, rtol=1e-4)
    _, history = jt.fit(state, small_classes, loss_fn=LOSS, epochs=1)
    assert np.isfinite(history["train_loss"]).all()
