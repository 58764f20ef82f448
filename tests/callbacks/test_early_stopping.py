"""early_stopping: the best epoch of a run, its state, and where a run ends."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.callbacks.early_stopping import best_row, is_improvement

METRICS = {"accuracy": jt.metrics.accuracy}
OPTIONS: dict[str, Any] = {
    "loss_fn": jt.losses.cross_entropy,
    "metric_fns": METRICS,
    "batch_size": 16,
    "epochs": 30,
}
NAN = float("nan")


@pytest.fixture(scope="module")
def contrary(small_classes: jt.Dataset) -> jt.Dataset:
    """Its labels contradict those of the training data, so that training raises its loss."""
    return small_classes.replace(targets=(small_classes.targets + 1) % 3)


def assert_same_params(one: jt.TrainState, two: jt.TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


@pytest.mark.parametrize("column", ["loss", "accuracy"])
def test_the_state_of_the_best_epoch_is_returned(
    small_state, small_classes, contrary, column
) -> None:
    states = []
    monitor = f"validation_{column}"
    stopping = jt.callbacks.early_stopping(3, monitor=monitor)
    callbacks = [stopping, lambda run: states.append(run.state)]
    state, history = jt.fit(
        small_state, small_classes, validation=contrary, callbacks=callbacks, **OPTIONS
    )
    values = history[monitor]
    best = int(values.argmin() if column == "loss" else values.argmax())
    assert len(values) == best + 1 + 3 < 30
    assert_same_params(state, states[best])
    # Early stopping does not change the training itself.
    options = {**OPTIONS, "epochs": len(values), "callbacks": []}
    _, unwatched = jt.fit(small_state, small_classes, **options)
    np.testing.assert_array_equal(history["train_loss"], unwatched["train_loss"])


@pytest.mark.parametrize("is_first", [False, True])
def test_a_run_that_is_over_trains_nothing(
    small_state, small_classes, contrary, tmp_path, is_first
) -> None:
    def fit(calls: list[int]) -> tuple[jt.TrainState, jt.History]:
        callbacks = [jt.callbacks.early_stopping(2), jt.callbacks.checkpoint(tmp_path)]
        callbacks.append(jt.callbacks.every_steps(1, lambda run: calls.append(run.step)))
        if is_first:
            callbacks.reverse()
        options = {**OPTIONS, "callbacks": callbacks}
        return jt.fit(small_state, small_classes, validation=contrary, **options)

    state, history = fit([])
    calls: list[int] = []
    again, rows = fit(calls)
    assert calls == []
    assert_same_params(state, again)
    np.testing.assert_array_equal(history["validation_loss"], rows["validation_loss"])


def test_the_first_of_equal_rows_is_the_best() -> None:
    rows = [{"loss": value} for value in (3.0, 1.0, 2.0, 1.0, 1.0)]
    assert best_row(rows, "loss", "min") == best_row(rows, "loss", None) == 1
    assert best_row(rows, "loss", "max") == 0
    assert is_improvement(rows[:2], "loss", "min")
    assert not is_improvement(rows, "loss", "min")
    assert best_row(rows[:1], "loss", "min") == 0


def test_nan_is_the_worst() -> None:
    for mode in ("min", "max"):
        rows = [{"loss": value} for value in (NAN, 2.0, NAN)]
        assert best_row(rows, "loss", mode) == 1
        assert best_row([{"loss": NAN}, {"loss": NAN}], "loss", mode) == 0
        assert best_row([{"loss": np.inf}, {"loss": -np.inf}], "loss", mode) == (mode == "min")


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("validation_loss", "min"),
        ("test_mean_squared_error", "min"),
        ("test_euclidean_distance", "min"),
        ("validation_accuracy", "max"),
        ("validation_f1", "max"),
        ("validation_mae", "min"),
        ("test_rmse", "min"),
        ("validation_cross_entropy", "min"),
        ("validation_r2", "max"),
    ],
)
def test_the_name_of_a_column_tells_what_is_better(monitor: str, mode: str) -> None:
    assert jt.callbacks.early_stopping(1, monitor).mode == mode
    assert jt.callbacks.early_stopping(1, monitor, mode="min").mode == "min"
    assert jt.callbacks.early_stopping(1, monitor, mode="max").mode == "max"


def test_equal_settings_share_a_compiled_program() -> None:
    first = jt.callbacks.early_stopping(2)
    assert first == jt.callbacks.early_stopping(2, mode="min")
    assert hash(first) == hash(jt.callbacks.early_stopping(2))
    assert first != jt.callbacks.early_stopping(3)


def test_a_column_to_monitor_is_needed(small_state, small_classes) -> None:
    stopping = jt.callbacks.early_stopping(3)
    message = r"monitors 'validation_loss', but the history has .*validation=, for example"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(small_state, small_classes, callbacks=[stopping], **OPTIONS)
    with pytest.raises(jt.errors.InputError, match="patience is 0"):
        jt.callbacks.early_stopping(0)
    if not hasattr(jt.init_state, "__wrapped__"):  # the type checker of `TYPES=1` raises first
        with pytest.raises(jt.errors.InputError, match="mode is 'best'; expected 'min' or 'max'"):
            jt.callbacks.early_stopping(1, mode="best")
        with pytest.raises(jt.errors.InputError, match="monitor is 3; expected a string"):
            jt.callbacks.early_stopping(1, 3)


def test_a_column_of_arrays_cannot_be_monitored(small_state, small_classes) -> None:
    def ones(predictions, targets, weights):
        return jnp.ones(3)

    options = {**OPTIONS, "metric_fns": {"ones": (ones, lambda sums: sums)}}
    stopping = jt.callbacks.early_stopping(3, "test_ones")
    with pytest.raises(jt.errors.InputError, match=r"has an array.*one of epoch, train_l"):
        jt.fit(small_state, small_classes, small_classes, callbacks=[stopping], **options)


def keras_rule(values, patience, sign, min_delta, min_epochs):
    """`keras.callbacks.EarlyStopping`: the number of epochs, and the index of the best or None."""
    best, best_epoch, waited = None, None, 0
    for epoch, value in enumerate(values):
        if epoch < min_epochs:
            continue
        waited += 1
        if best is None or sign * value + np.float32(min_delta) < sign * best:
            best, best_epoch, waited = value, epoch, 0
        if waited >= patience:
            return epoch + 1, best_epoch
    return len(values), best_epoch


WANDERING = np.array([0.1, 0.9, 0.8, 0.85, 0.74, 0.76, 0.7, 0.71, 0.5, 0.6, 0.6, 0.6], np.float32)
WANDER = jt.Model(
    lambda key, inputs: ({"w": jnp.zeros(())}, {}),
    lambda params, state, inputs, *, train, key: (inputs, state),
)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("patience", "min_delta", "min_epochs"),
    [(2, 0.0, 0), (2, 0.0, 1), (3, 0.15, 0), (2, 0.05, 1), (1, 0.2, 4), (2, 0.0, 12), (9, 0.3, 2)],
)
def test_min_delta_and_min_epochs_are_those_of_keras(patience, min_delta, min_epochs, sign) -> None:
    """The monitored value of each epoch is given, in `fit` and in the compiled `train`."""
    values = sign * WANDERING
    expected, best = keras_rule(values, patience, sign, min_delta, min_epochs)

    def step(state, batch):
        value = jnp.asarray(values)[state.step]
        return state.replace(step=state.step + 1), {"loss": value}

    stopping = jt.callbacks.early_stopping(
        patience,
        "train_loss",
        mode="min" if sign == 1 else "max",
        min_delta=min_delta,
        min_epochs=min_epochs,
    )
    data = jt.Dataset(np.zeros((1, 1), np.float32))
    state = jt.init_state(WANDER, jt.optimizers.sgd(0.1), data.inputs, key=jax.random.key(0))
    options = {"step_fn": step, "epochs": len(values)}
    after, history = jt.fit(state, data, callbacks=[stopping], **options)
    assert len(history["epoch"]) == expected
    assert after.epoch == (expected if best is None else best + 1)
    compiled, rows = jt.train(state, data, early_stopping=stopping, **options)
    assert np.count_nonzero(rows["epoch"]) == expected
    assert compiled.epoch == after.epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_delta": -0.1}, "min_delta is -0.1; expected a finite number of at least 0"),
        ({"min_delta": NAN}, "min_delta is nan"),
        ({"min_epochs": -1}, "min_epochs is -1; expected an integer of at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.callbacks.early_stopping(1, **options)
