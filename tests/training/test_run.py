"""train: the results of fit in one program, under vmap, gradients and early stopping."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close, assert_identical

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy, "confusion": jt.metrics.confusion_matrix}
FAST = jt.optimizers.sgd(3.0)
OPTIONS = {
    "loss_fn": LOSS,
    "metric_fns": METRICS,
    "batch_size": 16,
    "test_batch_size": 30,
    "key": jax.random.key(3),
}


def assert_same_as_fit(state, train, validation, **options) -> dict[str, jax.Array]:
    options = {**OPTIONS, **options}
    ours, found = jt.train(state, train, validation=validation, **options)
    options["callbacks"] = [options.pop("early_stopping")] if "early_stopping" in options else []
    state_metrics = options.pop("state_metrics", {})
    theirs, history = jt.fit(state, train, validation=validation, **options)
    assert_identical(ours, theirs)
    columns = [name for name in found if name not in (*state_metrics, "step_losses")]
    assert columns == [name for name in history if name != "seconds"]
    rows = len(history["epoch"])
    for name, values in found.items():
        if name in state_metrics:
            continue
        expected = history.step_losses if name == "step_losses" else history[name]
        values = np.ravel(values[:rows]) if name == "step_losses" else np.asarray(values[:rows])
        if name == "learning_rate":  # fit rounds it to seven digits
            np.testing.assert_allclose(values, expected, rtol=1e-6)
        else:
            np.testing.assert_array_equal(values, expected.astype(values.dtype), err_msg=name)
    return found


def step_count(state):
    return state.step


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_has_the_bits_of_fit(small_state, small_classes, weighted: bool) -> None:
    train, validation = small_classes.split(0.2, jax.random.key(0))
    if weighted:
        train = train.replace(weights=jnp.linspace(0.0, 1.0, len(train)))
    state_metrics = {"step": step_count}
    found = assert_same_as_fit(
        small_state, train, validation, epochs=2, state_metrics=state_metrics
    )
    assert found["step_losses"].shape == (2, 3)
    assert found["step"].tolist() == [3, 6]


def test_a_run_continues_from_the_state_of_an_earlier_one(small_state, small_classes) -> None:
    straight, _ = jt.train(small_state, small_classes, epochs=2, **OPTIONS)
    state, _ = jt.train(small_state, small_classes, epochs=1, **OPTIONS)
    state, history = jt.train(state, small_classes, epochs=1, **OPTIONS)
    assert_identical(state, straight)
    assert history["epoch"].tolist() == [2]


@pytest.mark.parametrize(("monitor", "mode"), [("loss", "min"), ("accuracy", "max")])
def test_early_stopping_returns_the_best_state_of_fit(
    small_state, small_classes, monitor: str, mode: str
) -> None:
    train, validation = small_classes.split(0.2, jax.random.key(0))
    state = jt.with_optimizer(small_state, FAST)
    early_stopping = jt.callbacks.early_stopping(2, monitor=f"validation_{monitor}", mode=mode)
    found = assert_same_as_fit(state, train, validation, epochs=20, early_stopping=early_stopping)
    trained = int(np.count_nonzero(found["epoch"]))
    assert 2 < trained < 20
    assert np.isnan(found["train_loss"][trained:]).all()
    assert np.isnan(found["step_losses"][trained:]).all()


def test_vmapped_runs_stop_early_on_their_own(small_state, small_classes) -> None:
    """One learns until the last epoch, one stops, and one diverges."""
    train, validation = small_classes.split(0.2, jax.random.key(0))

    @jax.jit
    def run(rate):
        return jt.train(
            jt.with_optimizer(small_state, jt.optimizers.sgd(rate)),
            train,
            validation=validation,
            epochs=8,
            early_stopping=jt.callbacks.early_stopping(2),
            **OPTIONS,
        )

    rates = jnp.array([0.05, 3.0, jnp.inf])
    states, history = jax.vmap(run)(rates)
    trained = np.count_nonzero(history["epoch"], axis=1)
    assert trained[0] == 8 > trained[1]
    assert np.isnan(history["validation_loss"][2]).all()
    for index, rate in enumerate(rates[:2]):
        alone, single = run(rate)
        assert trained[index] == np.count_nonzero(single["epoch"])
        one = jax.tree.map(lambda leaf, i=index: leaf[i], states.params)
        assert_close(one, alone.params, rtol=1e-4, atol=1e-5)


def test_the_gradient_with_respect_to_a_learning_rate_is_that_of_finite_differences() -> None:
    x = jnp.linspace(-1.0, 1.0, 8)[:, None]
    data = jt.Dataset(x, 2 * x + 1)
    start = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(0.1), x[:1], key=jax.random.key(0)
    )

    @jax.jit
    def final_loss(rate):
        state = jt.with_optimizer(start, jt.optimizers.sgd(rate))
        loss_fn = jt.losses.mean_squared_error
        return jt.train(state, data, data, loss_fn=loss_fn, epochs=2, batch_size=4)[1]["test_loss"][
            -1
        ]

    found = jax.grad(final_loss)(0.1)
    difference = (final_loss(0.101) - final_loss(0.099)) / 0.002
    np.testing.assert_allclose(found, difference, rtol=1e-2)


def test_a_nonfinite_loss_is_left_out_of_the_mean_only_where_its_step_is_skipped(
    small_state, small_classes
) -> None:
    order = jnp.argsort(small_classes.inputs[:, 0])
    data = small_classes.take(order)

    def broken(predictions, targets):
        return jnp.where(targets == 0, jnp.nan, LOSS(predictions, targets))

    _, history = jt.train(small_state, data, epochs=1, **{**OPTIONS, "loss_fn": broken})
    assert np.isnan(history["train_loss"]).all()
    safe = jt.with_optimizer(small_state, jt.optimizers.skip_nonfinite(jt.optimizers.sgd(0.1)))
    options = {**OPTIONS, "loss_fn": broken, "key": None}
    _, history = jt.train(safe, data, epochs=1, **options)
    losses = np.asarray(history["step_losses"][0])
    finite = np.isfinite(losses)
    assert 0 < np.count_nonzero(finite) < len(finite)
    assert history["skipped_steps"].tolist() == [np.count_nonzero(~finite)]
    expected = np.average(losses[finite], weights=np.array([16, 16, 16, 2])[finite])
    np.testing.assert_allclose(history["train_loss"][0], expected, rtol=1e-6)


def test_a_column_that_only_fit_has_cannot_be_monitored(small_state, small_classes) -> None:
    early_stopping = jt.callbacks.early_stopping(1, monitor="seconds")
    with pytest.raises(jt.errors.InputError, match="early_stopping monitors 'seconds'"):
        jt.train(small_state, small_classes, early_stopping=early_stopping, **OPTIONS)


def test_a_run_that_does_not_fit_is_an_error(small_state, small_classes, monkeypatch) -> None:
    def out_of_memory(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("jaxtrain.training.run._train", out_of_memory)
    with pytest.raises(jt.errors.OutOfMemoryError, match="out of memory at batch_size 16"):
        jt.train(small_state, small_classes, epochs=1, **OPTIONS)


@pytest.mark.parametrize(
    "name", ["epoch", "train_loss", "test_accuracy", "seconds", "step_losses", "learning_rate"]
)
def test_a_state_metric_cannot_take_the_name_of_another_column(
    small_state, small_classes, name
) -> None:
    with pytest.raises(jt.errors.InputError, match=f"two columns named '{name}'"):
        jt.train(
            small_state,
            small_classes,
            small_classes,
            state_metrics={name: lambda state: 7.0},
            **OPTIONS,
        )
