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
    ("monitor", "sign"),
    [
        ("validation_loss", 1),
        ("test_mean_squared_error", 1),
        ("test_euclidean_distance", 1),
        ("validation_accuracy", -1),
        ("validation_f1", -1),
    ],
)
def test_the_name_of_a_column_tells_what_is_better(monitor: str, sign: int) -> None:
    assert jt.callbacks.early_stopping(1, monitor).sign == sign
    assert jt.callbacks.early_stopping(1, monitor, mode="min").sign == 1
    assert jt.callbacks.early_stopping(1, monitor, mode="max").sign == -1


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
        with pytest.raises(jt.errors.InputError, match="monitor is 3; expected the name"):
            jt.callbacks.early_stopping(1, 3)


def test_a_column_of_arrays_cannot_be_monitored(small_state, small_classes) -> None:
    def ones(predictions, targets, weights):
        return jnp.ones(3)

    options = {**OPTIONS, "metric_fns": {"ones": (ones, lambda sums: sums)}}
    stopping = jt.callbacks.early_stopping(3, "test_ones")
    with pytest.raises(jt.errors.InputError, match=r"has an array.*one of epoch, train_l"):
        jt.fit(small_state, small_classes, small_classes, callbacks=[stopping], **options)
