"""every_steps: a function is called after exactly the steps that it asks for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxtrain as jt

OPTIONS: dict[str, Any] = {
    "loss_fn": jt.losses.cross_entropy,
    "epochs": 2,
    "batch_size": 8,  # seven steps per epoch of `small_classes`
    "key": jax.random.key(1),
}


@pytest.mark.parametrize("steps", [3, 7, 8])
def test_a_function_is_called_at_the_multiples(small_state, small_classes, steps: int) -> None:
    calls = []

    def record(run: jt.Run) -> None:
        calls.append((run.epoch + 1, run.step, int(run.state.step), run.losses))

    callbacks = [jt.callbacks.every_steps(steps, record)]
    found, history = jt.fit(small_state, small_classes, callbacks=callbacks, **OPTIONS)
    at = list(range(steps, 8, steps))
    assert [call[:3] for call in calls] == [
        *((1, step, step) for step in at),
        *((2, step, 7 + step) for step in at),
    ]
    for epoch, step, _, losses in calls:
        end = 7 * (epoch - 1) + step
        np.testing.assert_array_equal(losses, history.step_losses[end - steps : end])
    # The run is the same as without a callback.
    state, expected = jt.fit(small_state, small_classes, callbacks=[], **OPTIONS)
    np.testing.assert_array_equal(history.step_losses, expected.step_losses)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def test_two_callbacks_share_the_pauses(small_state, small_classes) -> None:
    calls: list[tuple[str, int, int]] = []

    def record(name: str) -> Any:
        return lambda run: calls.append((name, run.step, len(run.losses)))

    callbacks = [jt.callbacks.every_steps(2, record("a")), jt.callbacks.every_steps(3, record("b"))]
    jt.fit(small_state, small_classes, callbacks=callbacks, **{**OPTIONS, "epochs": 1})
    assert calls == [("a", 2, 2), ("b", 3, 3), ("a", 4, 2), ("a", 6, 2), ("b", 6, 3)]


def test_the_other_methods_of_a_callback_are_called_as_usual(small_state, small_classes) -> None:
    calls: list[Any] = []

    class Recorder(jt.callbacks.Callback):
        monitor = "train_loss"

        def on_start(self, run: jt.Run) -> None:
            assert run.monitor == "train_loss"
            calls.append("start")

        def on_steps(self, run: jt.Run) -> None:
            calls.append(run.step)

        def on_epoch(self, run: jt.Run) -> bool:
            calls.append("epoch")
            return True

        def on_end(self, run: jt.Run, error: BaseException | None) -> None:
            calls.append(error)

    callbacks = [jt.callbacks.every_steps(3, Recorder())]
    _, history = jt.fit(small_state, small_classes, callbacks=callbacks, **OPTIONS)
    assert calls == ["start", 3, 6, "epoch", None]
    assert len(history["epoch"]) == 1


def test_arguments_are_checked() -> None:
    with pytest.raises(jt.errors.InputError, match="steps is 0; expected an integer of at least 1"):
        jt.callbacks.every_steps(0, print)
    if not hasattr(jt.init_state, "__wrapped__"):  # the type checker of `TYPES=1` raises first
        with pytest.raises(jt.errors.InputError, match="function is 3; expected a function of"):
            jt.callbacks.every_steps(1, 3)
