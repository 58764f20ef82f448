"""fit: reproducible runs, their history and events, early stopping, and runs that diverge."""

from __future__ import annotations

import inspect

import jax
import jax.monitoring
import numpy as np
import pandas
import pytest

import jaxtrain as jt
from jaxtrain.training.events import Compiled, EpochDone, StepsDone

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}


def fit(state, data, **options):
    defaults = {"loss_fn": LOSS, "metric_fns": METRICS, "batch_size": 16, "key": jax.random.key(3)}
    return jt.fit(state, data, data, **{**defaults, **options})


def assert_identical(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def without_clock(history):
    return {name: values for name, values in history.items() if name != "seconds"}


def test_equal_seeds_give_identical_bits_and_other_seeds_do_not(digits: jt.data.Resolved) -> None:
    def run(seed: int):
        state = jt.init_state(
            jt.models.FeedForward(),
            jt.optimizers.sgd(0.05, momentum=0.9),
            digits.train.inputs[:1],
            key=jax.random.key(seed),
        )
        state, history = jt.fit(
            state,
            digits.train,
            digits.test,
            loss_fn=LOSS,
            metric_fns=METRICS,
            epochs=3,
            key=jax.random.key(seed),
        )
        return state.params, state.opt_state, without_clock(history), history.step_losses

    first = run(0)
    assert_identical(first, run(0))
    assert (run(1)[3] != first[3]).all()


def test_a_run_learns_and_its_history_is_correct(small_state, small_classes) -> None:
    state, history = fit(small_state, small_classes, epochs=40)
    assert state.step == 40 * 4
    assert list(history["epoch"]) == list(range(1, 41))
    assert len(history.step_losses) == 40 * 4
    assert history["test_accuracy"][-1] > 0.9 > history["test_accuracy"][0]
    assert history["test_loss"][-1] < 0.5 * history["test_loss"][0]
    np.testing.assert_allclose(history["learning_rate"], 0.1, rtol=1e-6)
    # Three batches of 16 and one of 2, each weighted by its examples.
    weighted = np.average(history.step_losses.reshape(40, 4), axis=1, weights=[16, 16, 16, 2])
    np.testing.assert_allclose(history["train_loss"], weighted, rtol=1e-6)
    final = jt.evaluate(state, small_classes, LOSS, METRICS)
    assert history["test_accuracy"][-1] == pytest.approx(final["accuracy"].item())
    assert history["test_loss"][-1] == pytest.approx(final["loss"].item(), rel=1e-6)


def test_an_epoch_of_fit_equals_train_epoch(small_state, small_classes) -> None:
    fitted, history = fit(small_state, small_classes, epochs=1)
    key = jax.random.fold_in(jax.random.key(3), 1)
    state, losses = jt.train_epoch(small_state, small_classes, LOSS, batch_size=16, key=key)
    np.testing.assert_allclose(history.step_losses, losses, rtol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(fitted.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_more_frequent_events_do_not_change_the_run(small_state, small_classes, interval) -> None:
    events = []
    expected = fit(small_state, small_classes, epochs=3)
    on_event = jt.events.every_steps(interval, events.append)
    state, history = fit(small_state, small_classes, epochs=3, on_event=on_event)
    assert_identical(state.params, expected[0].params)
    assert_identical(without_clock(history), without_clock(expected[1]))

    assert isinstance(events[0], Compiled)
    assert events[0][1:] == (3, 4, 50)
    steps = [event for event in events if isinstance(event, StepsDone)]
    reached = {(event.epoch, event.step) for event in steps}
    assert reached >= {(epoch, 4) for epoch in (1, 2, 3)}
    assert reached >= {(epoch, s) for epoch in (1, 2, 3) for s in range(interval, 4, 4)}
    for event in steps:
        assert event.examples_seen == min(16 * event.step, 50)
        expected_loss = history.step_losses.reshape(3, 4)[event.epoch - 1, event.step - 1]
        assert event.loss == expected_loss
    ends = [event for event in events if isinstance(event, EpochDone)]
    assert [event.epoch for event in ends] == [1, 2, 3]
    assert_identical(ends[-1].state.params, state.params)


def test_slow_steps_are_reported_one_by_one(small_state, small_classes, monkeypatch) -> None:
    """With a time limit of 0 for a chunk of steps, each step is a chunk."""
    expected = fit(small_state, small_classes, epochs=2)
    # `jaxtrain.training.fit` is also the name of a function.
    for module in ("_resident", "_fit_epoch"):
        monkeypatch.setattr(f"jaxtrain.training.{module}.CHUNK_SECONDS", 0.0)
    events = []
    state, _ = fit(small_state, small_classes, epochs=2, on_event=events.append)
    steps = [event.step for event in events if isinstance(event, StepsDone)]
    assert steps == [1, 2, 3, 4] * 2
    assert_identical(state.params, expected[0].params)


def test_two_epochs_and_then_three_equal_five(small_state, small_classes) -> None:
    straight, history = fit(small_state, small_classes, epochs=5)
    state, first = fit(small_state, small_classes, epochs=2)
    state, second = fit(state, small_classes, epochs=3)
    assert_identical(state.params, straight.params)
    for name, values in without_clock(history).items():
        np.testing.assert_array_equal(values, np.concatenate([first[name], second[name]]))


def test_training_and_evaluation_compile_once_each(digits: jt.data.Resolved) -> None:
    """Five epochs with a partial last batch, and an event every 7 steps."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **more: str) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(more["fun_name"])

    state = jt.init_state(
        jt.models.FeedForward((32, 10)),
        jt.optimizers.adam(jt.optimizers.step_lr(0.001, 1, 0.9, steps_per_epoch=23)),
        digits.train.inputs[:1],
        key=jax.random.key(0),
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        _, history = jt.fit(
            state,
            digits.train,
            digits.test,
            loss_fn=LOSS,
            metric_fns=METRICS,
            epochs=5,
            key=jax.random.key(0),
            test_batch_size=100,
            on_event=jt.events.every_steps(7, lambda event: None),
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(history.step_losses) == 5 * 23
    assert compiled.count("jit(compiled_steps)") == 1
    assert compiled.count("jit(compiled_evaluate)") == 1
    assert not any("train" in name for name in compiled)


def test_early_stopping_returns_the_best_epoch(small_state, small_classes) -> None:
    """The validation labels contradict the training labels, so that training raises their loss."""
    contrary = small_classes.replace(targets=(small_classes.targets + 1) % 3)
    states = []

    def on_event(event) -> None:
        if isinstance(event, EpochDone):
            states.append(event.state)

    options = {"loss_fn": LOSS, "metric_fns": METRICS, "batch_size": 16, "epochs": 30}
    state, history = jt.fit(
        small_state,
        small_classes,
        validation_data=contrary,
        early_stopping=jt.EarlyStopping(3),
        on_event=on_event,
        **options,
    )
    losses = history["validation_loss"]
    best = int(losses.argmin())
    assert len(losses) == best + 1 + 3 < 30
    assert_identical(state.params, states[best].params)
    assert "validation_accuracy" in history
    assert "test_loss" not in history
    # Early stopping does not change the training itself.
    _, unwatched = jt.fit(small_state, small_classes, **{**options, "epochs": len(losses)})
    np.testing.assert_array_equal(history["train_loss"], unwatched["train_loss"])


def test_early_stopping_needs_a_column_to_monitor(small_state, small_classes) -> None:
    with pytest.raises(jt.InputError, match=r"monitors 'validation_loss', but the history has"):
        fit(small_state, small_classes, early_stopping=jt.EarlyStopping(3))
    with pytest.raises(jt.InputError, match="patience is 0"):
        jt.EarlyStopping(0)
    if not hasattr(jt.init_state, "__wrapped__"):  # the type checker of `TYPES=1` raises first
        with pytest.raises(jt.InputError, match="mode is 'best'; expected 'min' or 'max'"):
            jt.EarlyStopping(1, mode="best")


def test_epochs_and_test_data_may_be_absent(small_state, small_classes) -> None:
    state, history = fit(small_state, small_classes, epochs=0)
    assert_identical(state.params, small_state.params)
    columns = ["epoch", "train_loss", "test_loss", "test_accuracy"]
    columns += ["gradient_norm", "learning_rate", "seconds"]
    assert list(history) == columns
    assert not any(len(values) for values in history.values())
    assert not len(history.step_losses)
    _, history = jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=1)
    assert "test_loss" not in history


def test_a_nonfinite_loss_stops_the_run_and_names_epoch_and_step(small_classes) -> None:
    """The squared error at a learning rate of 10,000 overflows after a few epochs of two steps."""
    data = jt.Dataset(small_classes.inputs, small_classes.targets[:, None].astype(float))
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(1e4),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    with pytest.raises(jt.NonFiniteError) as raised:
        jt.fit(state, data, loss_fn=jt.losses.mean_squared_error, epochs=20, batch_size=25)
    error = raised.value
    finished = error.history["train_loss"]
    assert 1 <= len(finished) == error.epoch - 1
    assert np.isfinite(finished).all()
    assert error.quantity == "training loss"
    assert not np.isfinite(error.value)
    assert error.learning_rate == pytest.approx(1e4)
    # The named step is the first whose loss is not finite.
    state, _ = jt.fit(
        state, data, loss_fn=jt.losses.mean_squared_error, epochs=error.epoch - 1, batch_size=25
    )
    _, losses = jt.train_epoch(state, data, jt.losses.mean_squared_error, batch_size=25)
    assert np.flatnonzero(~np.isfinite(losses))[0] + 1 == error.step
    assert f"epoch {error.epoch}, step {error.step} at learning rate 10000" in str(error)
    assert "smaller learning rate (such as 1000)" in str(error)


def test_the_error_has_the_learning_rate_of_the_step_that_diverged(small_classes) -> None:
    """The learning rate grows tenfold per step."""
    data = jt.Dataset(small_classes.inputs, small_classes.targets[:, None].astype(float))
    optimizer = jt.optimizers.sgd(lambda count: 1e-3 * 10.0**count)
    state = jt.init_state(
        jt.models.LinearRegression(), optimizer, data.inputs[:1], key=jax.random.key(0)
    )
    with pytest.raises(jt.NonFiniteError) as raised:
        jt.fit(state, data, loss_fn=jt.losses.mean_squared_error, batch_size=2)
    assert raised.value.learning_rate == pytest.approx(1e-3 * 10 ** (raised.value.step - 1))


def test_a_nonfinite_test_loss_stops_the_run(small_classes) -> None:
    """The square of an error of 1e30 overflows float32."""
    data = jt.Dataset(small_classes.inputs, small_classes.targets[:, None].astype(float))
    state = jt.init_state(
        jt.models.LinearRegression(), jt.optimizers.sgd(0.1), data.inputs[:1], key=jax.random.key(0)
    )
    far = data.replace(targets=data.targets.at[7].set(1e30))
    with pytest.raises(jt.NonFiniteError, match="test loss became inf after epoch 1"):
        jt.fit(state, data, far, loss_fn=jt.losses.mean_squared_error, epochs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1; expected an integer of at least 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"test_batch_size": 0}, "test_batch_size is 0"),
    ],
)
def test_invalid_arguments_are_named(small_state, small_classes, options, message) -> None:
    with pytest.raises(jt.InputError, match=message):
        fit(small_state, small_classes, **options)


@pytest.mark.parametrize(
    "name",
    [
        *("epoch", "train_loss", "test_accuracy", "seconds"),
        *("step_losses", "skipped_steps", "learning_rate"),
    ],
)
def test_a_state_metric_cannot_take_the_name_of_another_column(
    small_state, small_classes, name
) -> None:
    with pytest.raises(jt.InputError, match=f"state_metrics has a metric named '{name}'"):
        fit(small_state, small_classes, state_metrics={name: lambda state: 7.0})


def test_training_and_test_labels_are_checked(small_state, small_classes) -> None:
    wrong = small_classes.replace(targets=small_classes.targets + 1)
    with pytest.raises(jt.InputError, match=r"test_data\.targets holds the label 3"):
        jt.fit(small_state, small_classes, wrong, loss_fn=LOSS)
    with pytest.raises(jt.InputError, match=r"train_data\.targets holds the label 3"):
        jt.fit(small_state, wrong, small_classes, loss_fn=LOSS)


def test_the_labels_of_a_nested_weighted_sum_are_checked(small_state, small_classes) -> None:
    wrong = small_classes.replace(targets=small_classes.targets + 1)
    mixed = jt.losses.weighted_sum((0.5, jt.losses.weighted_sum((2.0, LOSS))), (0.1, LOSS))
    with pytest.raises(jt.InputError, match=r"train_data\.targets holds the label 3"):
        jt.fit(small_state, wrong, loss_fn=mixed)
    jt.fit(small_state, small_classes, loss_fn=mixed, epochs=1)


@pytest.mark.parametrize("value", [-0.25, 1.5])
@pytest.mark.parametrize("name", ["soft_cross_entropy", "sigmoid_binary_cross_entropy"])
def test_probabilities_outside_0_to_1_are_refused(small_state, small_classes, name, value) -> None:
    probabilities = jax.nn.one_hot(small_classes.targets, 3)
    data = small_classes.replace(targets=probabilities)
    loss_fn = getattr(jt.losses, name)
    jt.fit(small_state, data, loss_fn=loss_fn, epochs=1)
    wrong = data.replace(targets=probabilities.at[7, 1].set(value))
    with pytest.raises(jt.InputError, match=rf"targets holds the probability {value}; expected"):
        jt.fit(small_state, wrong, loss_fn=loss_fn)


def test_numpy_data_give_the_losses_of_jax_data(small_state, small_classes) -> None:
    arrays = jax.tree.map(np.asarray, small_classes)
    _, ours = fit(small_state, arrays, epochs=2)
    _, expected = fit(small_state, small_classes, epochs=2)
    np.testing.assert_array_equal(ours.step_losses, expected.step_losses)


def test_a_callback_may_end_the_run(small_state, small_classes) -> None:
    def at_target(event) -> bool:
        return isinstance(event, EpochDone) and np.float32(event.metrics["test_accuracy"]) > 0.8

    state, history = fit(small_state, small_classes, epochs=60, on_event=at_target)
    accuracy = history["test_accuracy"]
    assert len(accuracy) == state.epoch < 60
    assert accuracy[-1] > 0.8 >= accuracy[:-1].max()


def test_early_stopping_monitors_any_column(small_state, small_classes) -> None:
    contrary = small_classes.replace(targets=(small_classes.targets + 1) % 3)
    state, history = fit(
        small_state,
        small_classes,
        epochs=30,
        validation_data=contrary,
        early_stopping=jt.EarlyStopping(4, monitor="validation_accuracy", mode="max"),
    )
    best = int(np.argmax(history["validation_accuracy"]))
    assert state.epoch == best + 1
    assert len(history["epoch"]) == best + 1 + 4 < 30


def test_early_stopping_returns_the_first_of_equal_minima() -> None:
    rows = [{"loss": value} for value in (3.0, 1.0, 2.0, 1.0, 1.0)]
    stopping = jt.EarlyStopping(3, monitor="loss")
    assert stopping.best_row(rows) == 1
    assert stopping.is_over(rows)
    assert not stopping.is_over(rows[:4])
    assert jt.EarlyStopping(3, monitor="loss", mode="max").best_row(rows) == 0
    rows = [{"loss": value} for value in (float("nan"), 2.0, float("nan"))]
    assert stopping.best_row(rows) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_carries_the_state_and_history_of_the_completed_epochs(
    small_state, small_classes, kind
) -> None:
    def interrupt(event) -> None:
        if isinstance(event, StepsDone) and event.epoch == 3:
            raise kind

    with pytest.raises(kind) as raised:
        fit(small_state, small_classes, epochs=9, on_event=interrupt)
    expected, history = fit(small_state, small_classes, epochs=2)
    assert_identical(raised.value.state.params, expected.params)
    assert_identical(without_clock(raised.value.history), without_clock(history))


def test_a_history_converts_to_a_data_frame(small_state, small_classes) -> None:
    _, history = fit(small_state, small_classes, epochs=3)
    frame = pandas.DataFrame(history)
    assert list(frame.columns) == list(history)
    assert len(frame) == 3


def test_fit_takes_at_most_15_parameters() -> None:
    assert len(inspect.signature(jt.fit).parameters) <= 17


def test_an_exception_in_the_first_epoch_carries_the_initial_state(
    small_state, small_classes
) -> None:
    def interrupt(event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        fit(small_state, small_classes, on_event=interrupt)
    assert raised.value.state.epoch == 0
    assert len(raised.value.history["epoch"]) == 0


def test_only_true_ends_the_run(small_state, small_classes) -> None:
    """Other return values are ignored, and so are changes to the metrics of an event."""

    def on_event(event) -> object:
        if isinstance(event, EpochDone):
            event.metrics.clear()
        return event

    _, history = fit(small_state, small_classes, epochs=3, on_event=on_event)
    assert history["epoch"].tolist() == [1, 2, 3]
