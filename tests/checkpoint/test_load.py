"""load_checkpoint: a state or weights out of a checkpoint, for other settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.checkpoint.helpers import assert_identical

MODEL = jt.models.FeedForward((8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
LOSS = jt.losses.cross_entropy


def make_state(small_classes, optimizer, model=MODEL, seed=0):
    return jt.init_state(model, optimizer, small_classes.inputs[:1], key=jax.random.key(seed))


@pytest.fixture
def trained(small_classes, tmp_path):
    state = make_state(small_classes, jt.optimizers.sgd(0.1, momentum=0.9))
    checkpoint = jt.callbacks.checkpoint(tmp_path, best="train_loss")
    return jt.fit(
        state, small_classes, loss_fn=LOSS, epochs=2, batch_size=16, callbacks=[checkpoint]
    )


def test_the_state_continues_with_another_learning_rate(trained, small_classes, tmp_path) -> None:
    fresh = make_state(small_classes, jt.optimizers.sgd(0.01, momentum=0.9), seed=1)
    loaded = jt.load_checkpoint(tmp_path, fresh)
    assert_identical(loaded.params, trained[0].params)
    assert_identical(loaded.key, trained[0].key)
    assert (loaded.epoch, loaded.step) == (2, 8)
    options = {"loss_fn": LOSS, "epochs": 1, "batch_size": 16, "key": jax.random.key(1)}
    after, history = jt.fit(loaded, small_classes, **options)
    np.testing.assert_allclose(history["learning_rate"], [0.01], rtol=1e-6)
    assert history["epoch"][0] == 3
    # The momentum of the checkpoint continues: its arrays are those of the trained state.
    trace = [leaf for leaf in jax.tree.leaves(loaded.opt_state) if leaf.ndim]
    assert_identical(trace, [leaf for leaf in jax.tree.leaves(trained[0].opt_state) if leaf.ndim])
    assert after.epoch == 3


def test_a_new_schedule_replaces_a_rate_that_was_set(small_classes, tmp_path) -> None:
    """Its count continues: the rate is that of the fifth step."""
    options = {"loss_fn": LOSS, "epochs": 1, "batch_size": 16}
    state = make_state(small_classes, jt.optimizers.sgd(lambda count: 0.1))
    callbacks = [lambda run: jt.set_learning_rate(run.state, 0.5)]
    callbacks.append(jt.callbacks.checkpoint(tmp_path))
    jt.fit(state, small_classes, **options, callbacks=callbacks)
    fresh = make_state(small_classes, jt.optimizers.sgd(lambda count: 0.001 * (count + 1)))
    for start, rate in ((fresh, 0.005), (jt.set_learning_rate(fresh, 0.3), 0.3)):
        loaded = jt.load_checkpoint(tmp_path, start)
        loaded, _ = jt.train_step(loaded, small_classes, LOSS)
        found = jt.optimizers.records(loaded.opt_state)["learning_rate"].value
        np.testing.assert_allclose(found, rate, rtol=1e-6)


def test_the_weights_continue_with_another_optimizer(trained, small_classes, tmp_path) -> None:
    fresh = make_state(
        small_classes, jt.optimizers.average_parameters(jt.optimizers.adam(0.01), 0.9), seed=1
    )
    path = tmp_path / "epoch-2.safetensors"
    loaded = jt.load_checkpoint(path, fresh, weights_only=True)
    assert_identical(loaded.params, trained[0].params)
    assert_identical(loaded.evaluation_params, trained[0].params)
    assert (loaded.epoch, loaded.step) == (0, 0)
    assert_identical(loaded.key, fresh.key)
    jt.fit(loaded, small_classes, loss_fn=LOSS, epochs=1)
    with pytest.raises(jt.errors.InputError, match=r"opt_state.* weights_only=True"):
        jt.load_checkpoint(path, fresh)


def test_the_best_state_is_loaded(trained, small_classes, tmp_path) -> None:
    """`fit` returned the best one; with another column, the last epoch need not be the best."""
    state = make_state(small_classes, jt.optimizers.sgd(0.1))
    folder = tmp_path / "worse"
    contrary = small_classes.replace(targets=(small_classes.targets + 1) % 3)
    best, history = jt.fit(
        state,
        small_classes,
        contrary,
        loss_fn=LOSS,
        epochs=3,
        callbacks=[jt.callbacks.checkpoint(folder, best="test_loss")],
    )
    assert history["test_loss"].argmin() == 0
    assert_identical(jt.load_checkpoint(folder, state, best=True).params, best.params)
    assert jt.load_checkpoint(folder, state).epoch == 3
    first = jt.load_checkpoint(folder, state, best=True, weights_only=True)
    assert_identical(first.params, best.params)
    assert_identical(jt.load_checkpoint(tmp_path, trained[0], best=True).params, trained[0].params)


def test_a_checkpoint_within_an_epoch_is_loaded(small_classes, tmp_path) -> None:
    state = make_state(small_classes, optax.sgd(0.1))
    checkpoint = jt.callbacks.checkpoint(tmp_path, every_steps=3)
    jt.fit(state, small_classes, loss_fn=LOSS, epochs=1, batch_size=16, callbacks=[checkpoint])
    loaded = jt.load_checkpoint(tmp_path / "epoch-0-step-3.safetensors", state)
    assert (loaded.epoch, loaded.step) == (0, 3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((5, 3), r"params\.Dense_0\.bias is float32\[8\] in the file and float32\[5\] in state"),
        ((8, 3, 3), r"params\.Dense_2\.(weight|bias) is missing in the file and float32"),
        ((3,), r"params\.Dense_0\.bias is float32\[8\] in the file and float32\[3\] in state"),
    ],
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_the_first_differences_are_named(
    trained, small_classes, tmp_path, features, message, weights_only
) -> None:
    model = jt.models.FeedForward(features, dropout_rate=0.2, mean=0.0, std=1.0)
    other = make_state(small_classes, jt.optimizers.sgd(0.1, momentum=0.9), model)
    with pytest.raises(jt.errors.InputError, match=f"(?s)differs from state: .*({message})"):
        jt.load_checkpoint(tmp_path, other, weights_only=weights_only)


def test_what_is_not_a_checkpoint_is_refused(small_state, small_classes, tmp_path) -> None:
    with pytest.raises(jt.errors.InputError, match="has no checkpoint; expected a folder"):
        jt.load_checkpoint(tmp_path, small_state)
    with pytest.raises(jt.errors.InputError, match="cannot be read"):
        jt.load_checkpoint(tmp_path / "epoch-1.safetensors", small_state)
    jt.save(tmp_path / "model.safetensors", small_state)
    with pytest.raises(jt.errors.InputError, match="wrong checksum"):
        jt.load_checkpoint(tmp_path / "model.safetensors", small_state)
    options = {"loss_fn": LOSS, "epochs": 1, "callbacks": [jt.callbacks.checkpoint(tmp_path)]}
    jt.fit(small_state, small_classes, **options)
    with pytest.raises(jt.errors.InputError, match="has no best state; expected a run with"):
        jt.load_checkpoint(tmp_path, small_state, best=True)
    assert jnp.isfinite(jt.load_checkpoint(tmp_path, small_state).step)
