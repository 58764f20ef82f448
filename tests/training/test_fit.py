"""fit: reproducible runs, their history and callbacks, and runs that diverge."""

from __future__ import annotations

import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close, assert_identical, assert_same_run, without_clock

LOSS = jt.losses.cross_entropy
METRICS = {"accuracy": jt.metrics.accuracy}


def fit(state, data, **options):
    defaults = {"loss_fn": LOSS, "metric_fns": METRICS, "batch_size": 16, "key": jax.random.key(3)}
    return jt.fit(state, data, data, **{**defaults, "epochs": 3, "callbacks": [], **options})


@pytest.fixture(scope="module")
def straight(small_state, small_classes):
    """A run of three epochs."""
    return fit(small_state, small_classes)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_callback_cannot_write_into_the_history(
    tmp_path, small_state, small_classes, resumed
) -> None:
    """A row may have an array of a metric, and the log has the losses of the steps."""
    written = []

    class Writer(jt.callbacks.Callback):
        def on_steps(self, run: jt.Run) -> None:
            arrays = [run.losses, *run.step_losses, *jax.tree.leaves(run.log)]
            arrays += [each for row in run.rows for each in row.values() if np.ndim(each)]
            for array in arrays:
                written.append(array)
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 9

        on_epoch = on_steps

    callbacks: list = [jt.callbacks.checkpoint(tmp_path)] if resumed else []
    metrics = {"confusion": jt.metrics.confusion_matrix}
    if resumed:
        fit(small_state, small_classes, metric_fns=metrics, epochs=1, callbacks=callbacks)
    fit(small_state, small_classes, metric_fns=metrics, callbacks=[*callbacks, Writer()])
    assert len(written) > 20


@pytest.fixture(scope="module")
def divergence():
    """A line that is fitted to integers."""
    data = jt.Dataset(jnp.eye(50, 6), (jnp.arange(50)[:, None] % 3).astype(float))
    model, optimizer = jt.models.LinearRegression(), jt.optimizers.sgd(1e4)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0)), data


class Recorder(jt.callbacks.Callback):
    """Keeps the runs that it is called with, and may raise an error or ask for pauses."""

    def __init__(self, interval: int = 0, raises: BaseException | None = None, at: int = 0) -> None:
        self.interval, self.raises, self.at = interval, raises, at
        self.calls: list[str] = []
        self.steps: list[jt.Run] = []
        self.epochs: list[jt.Run] = []

    def on_start(self, run: jt.Run) -> None:
        self.calls.append("start")

    def next_pause(self, run: jt.Run) -> int | None:
        return (run.step // self.interval + 1) * self.interval if self.interval else None

    def on_steps(self, run: jt.Run) -> None:
        self.calls.append("steps")
        self.steps.append(run)
        if self.raises is not None and run.epoch == self.at:
            raise self.raises

    def on_epoch(self, run: jt.Run) -> None:
        self.calls.append("epoch")
        self.epochs.append(run)

    def on_end(self, run: jt.Run, error: BaseException | None) -> None:
        self.calls.append(f"end {type(error).__name__}")


def margin(logits, labels):
    """The lead of the largest logit over the mean."""
    return logits.max(axis=-1) - logits.mean(axis=-1) + 0 * labels


def test_equal_seeds_give_identical_bits_and_other_seeds_do_not(
    small_state, small_classes, straight
) -> None:
    """Also on NumPy arrays; the history is a data frame."""
    arrays = jax.tree.map(np.asarray, small_classes)
    assert_same_run(fit(small_state, arrays), straight)
    _, other = fit(small_state, small_classes, key=jax.random.key(4))
    assert (other.step_losses != straight[1].step_losses).all()
    frame = pandas.DataFrame(straight[1])
    assert list(frame.columns) == list(straight[1])
    assert len(frame) == 3


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
    assert_close(fitted.params, state.params)


@pytest.fixture(scope="module")
def expected(small_state, small_classes):
    """A run with a metric that is a sum of fractions."""
    return fit(small_state, small_classes, metric_fns={"margin": margin})


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_more_frequent_reports_do_not_change_the_run(
    small_state, small_classes, expected, interval
) -> None:
    """Not even the last bit of a sum."""
    recorder, metric_fns = Recorder(interval), {"margin": margin}
    state, history = fit(small_state, small_classes, callbacks=[recorder], metric_fns=metric_fns)
    assert_same_run((state, history), expected)

    assert recorder.calls[0] == "start"
    assert recorder.calls[-1] == "end NoneType"
    reached = {(run.epoch, run.step) for run in recorder.steps}
    assert reached >= {(epoch, 4) for epoch in (0, 1, 2)}
    assert reached >= {(epoch, s) for epoch in (0, 1, 2) for s in range(interval, 4, interval)}
    for run in recorder.steps:
        assert (run.last_epoch, run.steps_per_epoch, run.examples_per_epoch) == (3, 4, 50)
        assert run.examples == min(16 * run.step, 50)
        before = history.step_losses[run.epoch * 4 :][: run.step]
        np.testing.assert_array_equal(run.losses, before[-len(run.losses) :])
        np.testing.assert_array_equal(run.log.loss, before)
    losses = np.concatenate([run.losses for run in recorder.steps])
    np.testing.assert_array_equal(losses, history.step_losses)
    assert [run.epoch for run in recorder.epochs] == [1, 2, 3]
    assert_identical(recorder.epochs[-1].state, state)
    assert recorder.epochs[1].history["test_loss"].tolist() == history["test_loss"][:2].tolist()


def test_slow_steps_are_reported_one_by_one(small_state, small_classes) -> None:
    """A call takes about a second, so that a step of 0.6 seconds is one."""

    def wait(step):
        time.sleep(0.6)
        return step

    def step(state, batch):
        after = jax.pure_callback(wait, state.step, state.step)
        return state.replace(step=after + 1), {"loss": 1.0}

    recorder, options = Recorder(), {"step_fn": step, "epochs": 1, "batch_size": 10}
    jt.fit(small_state, small_classes[:40], callbacks=[recorder], **options)
    assert [run.step for run in recorder.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("weights", [None, jnp.arange(50) % 2 * 2.0])
def test_the_training_metrics_are_those_of_the_steps_own_predictions(
    small_state, small_classes, weights
) -> None:
    """Each batch is predicted in training mode, with dropout, before its update.

    They are weighted means: examples of weight 0 do not count, in whatever batch they are.
    """
    data = small_classes.replace(weights=weights)
    _, history = fit(small_state, data, epochs=1, key=None)

    @jax.jit
    def step(state, batch):
        (_, aux), grads = jt.gradients(state, batch, LOSS)
        return jt.apply_gradients(state, grads), jt.metrics.accuracy(aux.predictions, batch.targets)

    state, correct = small_state, 0.0
    for start in range(0, 50, 16):
        batch = data[start : start + 16]
        state, right = step(state, batch)
        correct += float((right if weights is None else right * batch.weights).sum())
    assert history["train_accuracy"] == pytest.approx([correct / 50])


def test_arrays_may_be_columns_of_the_history(small_state, small_classes) -> None:
    metric_fns = {
        "confusion": jt.metrics.confusion_matrix,
        "recall": jt.metrics.recall(None),
        "accuracy": jt.metrics.accuracy,
    }
    _, history = fit(small_state, small_classes, metric_fns=metric_fns, epochs=2)
    for part in ("train", "test"):
        confusion = history[f"{part}_confusion"]
        np.testing.assert_array_equal(confusion.sum(axis=2), [[17, 17, 16]] * 2)
        correct = np.trace(confusion, axis1=1, axis2=2)
        np.testing.assert_allclose(history[f"{part}_accuracy"], correct / 50, rtol=1e-6)
        recall = np.diagonal(confusion, axis1=1, axis2=2) / [17, 17, 16]
        np.testing.assert_allclose(history[f"{part}_recall"], recall, rtol=1e-6)


def test_two_epochs_and_then_one_equal_three(small_state, small_classes, straight) -> None:
    state, first = fit(small_state, small_classes, epochs=2)
    state, second = fit(state, small_classes, epochs=1)
    assert_identical(state, straight[0])
    for name, values in without_clock(straight[1]).items():
        assert_identical(values, np.concatenate([first[name], second[name]]))


def test_training_and_evaluation_compile_once_each(small_classes) -> None:
    """Five epochs with a partial last batch, and an event every 3 steps."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **more: str) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(more["fun_name"])

    schedule = jt.optimizers.step_lr(0.1, 1, 0.9, steps_per_epoch=4)
    model, optimizer = jt.models.FeedForward((7, 3)), jt.optimizers.sgd(schedule)
    state = jt.init_state(model, optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    pauses = jt.callbacks.every_steps(3, lambda run: None)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(state, small_classes, epochs=5, test_batch_size=20, callbacks=[pauses])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # The partial last batch is a segment, and so a program, of its own.
    assert compiled.count("jit(compiled_steps)") == 2
    assert compiled.count("jit(compiled_evaluate)") == 1
    assert not any("train" in name for name in compiled)


def test_epochs_and_test_data_may_be_absent(small_state, small_classes) -> None:
    state, history = fit(small_state, small_classes, epochs=0)
    assert_identical(state.params, small_state.params)
    columns = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    columns += ["learning_rate", "seconds"]
    assert list(history) == columns
    assert not any(len(values) for values in history.values())
    assert not len(history.step_losses)
    _, history = jt.fit(small_state, small_classes, loss_fn=LOSS, epochs=1)
    assert "test_loss" not in history


def test_a_nonfinite_loss_stops_the_run_and_names_epoch_and_step(divergence) -> None:
    """The squared error at a learning rate of 10,000 overflows after a few epochs of two steps."""
    (state, data), loss_fn = divergence, jt.losses.mean_squared_error
    with pytest.raises(jt.errors.NonFiniteError) as raised:
        jt.fit(state, data, loss_fn=loss_fn, epochs=20, batch_size=25)
    error = raised.value
    finished = error.history["train_loss"]
    assert 1 <= len(finished) == error.epoch - 1
    assert np.isfinite(finished).all()
    assert error.quantity == "training loss"
    assert not np.isfinite(error.value)
    assert error.learning_rate == pytest.approx(1e4)
    # The named step is the first whose loss is not finite.
    _, losses = jt.train_epoch(error.state, data, loss_fn, batch_size=25)
    assert np.flatnonzero(~np.isfinite(losses))[0] + 1 == error.step
    assert f"epoch {error.epoch}, step {error.step} at learning rate 10000" in str(error)
    assert "smaller learning rate (such as 1000)" in str(error)


def test_the_error_has_the_learning_rate_of_the_step_that_diverged(divergence) -> None:
    """The learning rate grows tenfold per step."""
    state, data = divergence
    state = jt.with_optimizer(state, jt.optimizers.sgd(lambda count: 1e-3 * 10.0**count))
    with pytest.raises(jt.errors.NonFiniteError) as raised:
        jt.fit(state, data, loss_fn=jt.losses.mean_squared_error, batch_size=2)
    assert raised.value.learning_rate == pytest.approx(1e-3 * 10 ** (raised.value.step - 1))


def test_a_nonfinite_test_loss_stops_the_run(divergence) -> None:
    """The square of an error of 1e30 overflows float32."""
    state, data = divergence
    far = data.replace(targets=data.targets.at[7].set(1e30))
    with pytest.raises(jt.errors.NonFiniteError, match="test loss became inf after epoch 1"):
        jt.fit(state, data, far, loss_fn=jt.losses.mean_squared_error, batch_size=25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"test_batch_size": 0}, "test_batch_size is 0"),
    ],
)
def test_invalid_arguments_are_named(small_state, small_classes, options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        fit(small_state, small_classes, **options)


def test_training_and_test_labels_are_checked(small_state, small_classes) -> None:
    wrong = small_classes.replace(targets=small_classes.targets + 1)
    with pytest.raises(jt.errors.InputError, match=r"test\.targets holds the label 3"):
        jt.fit(small_state, small_classes, wrong, loss_fn=LOSS)
    with pytest.raises(jt.errors.InputError, match=r"train\.targets holds the label 3"):
        jt.fit(small_state, wrong, small_classes, loss_fn=LOSS)


@pytest.mark.parametrize("name", ["soft_cross_entropy", "sigmoid_binary_cross_entropy"])
def test_probabilities_outside_0_to_1_are_refused(small_state, small_classes, name) -> None:
    probabilities = jax.nn.one_hot(small_classes.targets, 3)
    loss_fn = getattr(jt.losses, name)
    for value in (-0.25, 1.5):
        wrong = small_classes.replace(targets=probabilities.at[7, 1].set(value))
        message = rf"targets holds the probability {value}; expected"
        with pytest.raises(jt.errors.InputError, match=message):
            jt.fit(small_state, wrong, loss_fn=loss_fn)


def test_a_function_is_called_after_each_epoch_and_may_end_the_run(
    small_state, small_classes
) -> None:
    def at_target(run: jt.Run) -> bool:
        return np.float32(run.rows[-1]["test_accuracy"]) > 0.8

    state, history = fit(small_state, small_classes, epochs=60, callbacks=[at_target])
    accuracy = history["test_accuracy"]
    assert len(accuracy) == state.epoch < 60
    assert accuracy[-1] > 0.8 >= accuracy[:-1].max()


def test_a_callback_may_replace_the_state(small_state, small_classes) -> None:
    """Training continues from the replaced state: here, with other parameters each epoch."""
    zeros = jax.tree.map(jnp.zeros_like, small_state.params)

    def reset(run: jt.Run) -> jt.Run:
        return run.replace(state=run.state.replace(params=zeros))

    state, history = fit(small_state, small_classes, epochs=2, callbacks=[reset])
    assert_identical(state.params, zeros)
    np.testing.assert_allclose(history.step_losses[4], np.log(3), rtol=1e-6)


def test_the_best_state_of_a_run_is_returned(small_state, small_classes) -> None:
    states = []

    def keep_first(run: jt.Run) -> jt.Run | None:
        states.append(run.state)
        return run.replace(best=run.state) if run.epoch == 1 else None

    state, history = fit(small_state, small_classes, epochs=2, callbacks=[keep_first])
    assert_identical(state, states[0])
    assert len(history["epoch"]) == 2


def test_callbacks_that_save_start_first_and_are_called_last(small_state, small_classes) -> None:
    order: list[str] = []

    class Named(jt.callbacks.Callback):
        def __init__(self, name: str, saves: bool) -> None:
            self.name, self.saves = name, saves

        def on_start(self, run: jt.Run) -> None:
            order.append(f"start {self.name}")

        def on_epoch(self, run: jt.Run) -> None:
            order.append(self.name)

        def on_end(self, run: jt.Run, error: BaseException | None) -> None:
            order.append(f"end {self.name}")

    callbacks = [Named("store", True), Named("first", False), Named("second", False)]
    fit(small_state, small_classes, epochs=1, callbacks=callbacks)
    assert order[:3] == ["start store", "start first", "start second"]
    assert order[3:6] == ["first", "second", "store"]
    assert order[-1] == "end store"


def test_the_end_is_called_for_all_callbacks_that_were_started(small_state, small_classes) -> None:
    class Refusing(jt.callbacks.Callback):
        def on_start(self, run: jt.Run) -> None:
            raise OSError("no space")

    first, last = Recorder(), Recorder()
    with pytest.raises(OSError, match="no space") as raised:
        fit(small_state, small_classes, callbacks=[first, Refusing(), last])
    assert first.calls == ["start", "end OSError"]
    assert last.calls == []
    assert raised.value.state.epoch == 0


class Misnamed(jt.callbacks.Callback):
    def on_epoch_end(self, run):
        """The name in other libraries."""


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first")
@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (jt.callbacks.early_stopping(3), r"callbacks is .*; expected a list"),
        ([3], "callbacks has 3; expected what jaxtrain.callbacks returns"),
        ([jt.callbacks.Callback], "callbacks has the class Callback; expected an object"),
        ([jt.callbacks.progress], "callbacks has the function progress itself"),
        ([lambda epoch, logs: None], "one argument: missing a required argument: 'logs'"),
        ([Misnamed()], "the callback Misnamed with the method on_epoch_end, which is never called"),
    ],
)
def test_what_is_no_callback_is_refused(small_state, small_classes, callbacks, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        fit(small_state, small_classes, epochs=1, callbacks=callbacks)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_carries_the_state_and_history_of_the_completed_epochs(
    small_state, small_classes, straight, kind
) -> None:
    recorder = Recorder(1, raises=kind(), at=3)
    with pytest.raises(kind) as raised:
        fit(small_state, small_classes, epochs=9, callbacks=[recorder])
    assert recorder.calls[-1] == f"end {kind.__name__}"
    error = raised.value
    assert_same_run((error.state, error.history), straight)


def test_the_state_of_the_caller_stays_usable(small_state, small_classes) -> None:
    """The memory of the state is reused from call to call, but not that of the caller's."""
    before = jax.tree.map(np.asarray, small_state.params)
    recorder = Recorder(1)
    fit(small_state, small_classes, epochs=2, callbacks=[recorder])
    jax.tree.map(np.testing.assert_array_equal, small_state.params, before)
    for run in recorder.epochs:  # the state after an epoch stays, too
        assert np.isfinite(np.asarray(jax.tree.leaves(run.state.params)[0])).all()


def test_only_true_ends_the_run(small_state, small_classes) -> None:
    """Of what a callback may return; anything else is refused, since it may mean something."""
    for index, value in enumerate([None, False, True, np.bool_(True), jnp.asarray(True)]):
        _, history = fit(small_state, small_classes, epochs=2, callbacks=[lambda run, v=value: v])
        assert history["epoch"].tolist() == ([1, 2] if index < 2 else [1])

    message = r"the callback <lambda> returned .*; expected True to end the run"
    for value in (1, 0.5, "yes", np.ones(2, bool), {"stop": True}, [[1], [1, 2]]):
        with pytest.raises(jt.errors.InputError, match=message):
            fit(small_state, small_classes, epochs=2, callbacks=[lambda run, v=value: v])
