"""set_learning_rate: the rate changes and all else continues, in steps, in programs and in fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

MODEL = jt.Model(
    lambda key, x: ({"v": jnp.ones(()), "w": jnp.arange(1.0, 3.0)}, {}),
    lambda p, s, x, *, train, key: (x @ p["w"] + p["v"], s),
)
DATA = jt.Dataset(jnp.eye(2), jnp.zeros(2))
LOSS = jt.losses.mean_squared_error
NAMES = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta")
WITH_RATE = {name: getattr(jt.optimizers, name) for name in NAMES}
WRAPPED = {
    "wrapped": lambda rate: jt.optimizers.skip_nonfinite(
        jt.optimizers.average_parameters(
            jt.optimizers.accumulate_gradients(
                jt.optimizers.clip_gradients(jt.optimizers.adam(rate), 0.5), 1
            )
        )
    ),
    "chained": lambda rate: optax.chain(optax.clip(0.3), jt.optimizers.sgd(rate, momentum=0.9)),
    "groups": lambda rate: optax.partition(
        {"a": jt.optimizers.adam(rate), "b": jt.optimizers.sgd(rate), "c": optax.set_to_zero()},
        {"v": "a", "w": "b"},
    ),
    "adagrad with decay": lambda rate: jt.optimizers.adagrad(rate, lr_decay=0.5),
}
INJECTED = {"injected": lambda rate: optax.inject_hyperparams(optax.lion)(learning_rate=rate)}


def make_state(optimizer) -> jt.TrainState:
    return jt.init_state(MODEL, optimizer, DATA.inputs, key=jax.random.key(0))


def steps(state: jt.TrainState, count: int) -> jt.TrainState:
    def step(_, state):
        (_, _), grads = jt.gradients(state, DATA, LOSS)
        return jt.apply_gradients(state, grads)

    return jax.lax.fori_loop(0, count, step, state)


def test_the_steps_are_those_of_a_schedule_of_both_rates() -> None:
    """Compiled, with traced rates, for two pairs of rates at once, from a number or a schedule."""

    @jax.jit
    @jax.vmap
    def run(first, second):
        found = {}
        for name, make in (WITH_RATE | WRAPPED | INJECTED).items():
            expected = make_state(make(lambda count: jnp.where(count < 2, first, second)))
            if name == "adagrad with decay":
                expected = make_state(
                    jt.optimizers.adagrad(
                        lambda count: jnp.where(count < 2, first / (1 + count / 2), second)
                    )
                )
            starts = {"number": make(first)}
            if name not in INJECTED:
                starts["schedule"] = make(lambda count: first * 1.0)
            for kind, optimizer in starts.items():
                state = steps(make_state(optimizer), 2)
                state = steps(jt.set_learning_rate(state, second), 2)
                record = jt.optimizers.records(state.opt_state).get("learning_rate")
                rate = second if record is None else record.value  # two groups have none
                found[f"{name}, {kind}"] = (state.params, rate)
            found[name] = (steps(expected, 4).params, second)
        return found

    found = run(jnp.array([0.1, 0.3]), jnp.array([0.02, 0.0]))
    for name, (params, rate) in found.items():
        expected, second = found[name.partition(", ")[0]]
        np.testing.assert_allclose(rate, second, err_msg=name)
        for key in ("v", "w"):
            np.testing.assert_allclose(params[key], expected[key], rtol=1e-6, err_msg=name)
    assert len({float(params["v"][0]) for params, _ in found.values()}) > len(WITH_RATE)


def test_fit_reports_the_rate_that_a_callback_has_set_and_a_resumed_run_keeps_it(tmp_path) -> None:
    def lower(run):
        return jt.set_learning_rate(run.state, 0.4 / 2**run.epoch)

    def run(epochs: int, optimizer, *callbacks):
        options = {"loss_fn": LOSS, "epochs": epochs, "batch_size": 1}
        state = make_state(optimizer)
        return jt.fit(state, DATA, **options, callbacks=[lower, *callbacks])

    adam, schedule = jt.optimizers.adam(0.4), jt.optimizers.step_lr(0.4, 2, 0.5)
    state, history = run(4, adam)
    assert history["learning_rate"].tolist() == pytest.approx([0.4, 0.2, 0.1, 0.05])
    expected, _ = jt.fit(
        *(make_state(jt.optimizers.adam(schedule)), DATA),
        **{"loss_fn": LOSS, "epochs": 4, "batch_size": 1, "callbacks": []},
    )
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-6)
    run(2, adam, jt.callbacks.checkpoint(tmp_path))
    resumed, again = run(4, adam, jt.callbacks.checkpoint(tmp_path))
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])
    assert again["learning_rate"].tolist() == history["learning_rate"].tolist()


@pytest.mark.parametrize(
    ("optimizer", "rate", "message"),
    [
        (jt.optimizers.adam(1), -0.1, r"learning_rate is -0\.1; expected a number that is not neg"),
        (jt.optimizers.adam(1), lambda count: 0.1, r"is a function; .*state\.replace\(optimizer"),
        (jt.optimizers.adam(1), jnp.ones(2), "learning_rate"),
        (optax.adam(0.1), 0.1, r"no learning rate to set .*state\.replace\(optimizer=optax\.adam"),
        (jt.optimizers.rprop(0.1), 0.1, "no learning rate to set"),
        (jt.optimizers.lbfgs(), 0.1, "no learning rate to set"),
        (optax.inject_hyperparams(optax.sgd)(lambda count: 0.1), 0.1, "no learning rate to set"),
        (optax.inject_hyperparams(optax.sgd)(1), 0.1, r"is of int32; expected a float, such as 1"),
        (
            optax.partition(
                {"a": jt.optimizers.adam(0.1), "b": optax.sgd(0.1)}, {"v": "a", "w": "b"}
            ),
            0.1,
            "no learning rate to set in each group",
        ),
    ],
)
def test_what_cannot_be_set_is_one_sentence(optimizer, rate, message: str) -> None:
    with pytest.raises((jt.errors.InputError, TypeError), match=f"{message}|typechecking"):
        jt.set_learning_rate(make_state(optimizer), rate)


def test_a_rate_given_as_an_integer_can_become_a_fraction() -> None:
    state = jt.set_learning_rate(make_state(jt.optimizers.sgd(1)), 0.25)
    assert jt.optimizers.records(state.opt_state)["learning_rate"].value == 0.25


def test_another_optimizer_with_the_same_state_keeps_the_moments() -> None:
    """The fix that the errors name."""
    state = steps(make_state(optax.adam(0.1)), 1)
    state = steps(state.replace(optimizer=optax.adam(0.01)), 1)
    rates = optax.piecewise_constant_schedule(0.1, {1: 0.1})
    other = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rates))
    np.testing.assert_allclose(state.params["w"], steps(make_state(other), 2).params["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.replace(params={**state.params, "w": jnp.ones(3)}),
            r"a callback returned state\.params\.w as float32\[3\]; expected float32\[2\]",
        ),
        (
            lambda state: state.replace(params={**state.params, "v": jnp.int32(1)}),
            r"state\.params\.v as int32\[\]; expected float32\[\]",
        ),
        (
            lambda state: state.replace(params={**state.params, "b": jnp.ones(())}),
            r"of another structure, which differs at state\.params\.b",
        ),
        (
            lambda state: jt.with_optimizer(state, optax.sgd(0.1)),
            r"of another structure, which differs",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [lambda run, state: state, lambda run, s: run.replace(state=s)])
def test_a_callback_that_changes_the_type_of_the_state_is_named(change, message, wrap) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(
            *(make_state(jt.optimizers.sgd(0.1)), DATA),
            **{
                "loss_fn": LOSS,
                "epochs": 2,
                "callbacks": [lambda run: wrap(run, change(run.state))],
            },
        )


def test_a_callback_may_return_arrays_of_numpy() -> None:
    def zero(run):
        return run.state.replace(params={"v": 0.0, "w": np.zeros(2, np.float32)})

    state, history = jt.fit(
        *(make_state(jt.optimizers.sgd(0.1)), DATA),
        **{"loss_fn": LOSS, "epochs": 2, "callbacks": [zero]},
    )
    assert history["train_loss"][1] == 0
    assert isinstance(state.params["w"], jax.Array)
