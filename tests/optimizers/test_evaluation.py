"""The parameters that are evaluated, saved and put in, where they are not those of training."""

from __future__ import annotations

from pathlib import Path

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
DATA = jt.Dataset(jnp.array([[1.0, 0.5], [0.0, 2.0]]), jnp.zeros(2))
LOSS = jt.losses.mean_squared_error
SCHEDULE_FREE = optax.contrib.schedule_free_sgd(0.1)
LOOKAHEAD = optax.lookahead(optax.adam(0.1), 2, 0.3)


def make_state(optimizer) -> jt.TrainState:
    return jt.init_state(MODEL, optimizer, DATA.inputs, key=jax.random.key(0))


def by_hand(optimizer, params, evaluated, steps: int = 5):
    """The loop of optax's documentation; returns the parameters of training and evaluation."""
    opt_state = optimizer.init(params)
    for _ in range(steps):
        trained = params.fast if isinstance(params, optax.LookaheadParams) else params
        grads = jax.grad(lambda p: jnp.mean((DATA.inputs @ p["w"] + p["v"] - DATA.targets) ** 2))(
            trained
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    trained = params.fast if isinstance(params, optax.LookaheadParams) else params
    return trained, evaluated(opt_state, params)


START = {"v": jnp.ones(()), "w": jnp.arange(1.0, 3.0)}


@pytest.mark.parametrize(
    ("optimizer", "start", "evaluated"),
    [
        (SCHEDULE_FREE, START, optax.contrib.schedule_free_eval_params),
        (
            LOOKAHEAD,
            optax.LookaheadParams.init_synced(START),
            lambda opt_state, params: params.slow,
        ),
    ],
    ids=["schedule_free", "lookahead"],
)
def test_optax_evaluates_as_its_documentation_says(
    tmp_path: Path, optimizer, start, evaluated
) -> None:
    trained, expected = by_hand(optimizer, start, evaluated)
    state, history = jt.fit(
        *(make_state(optimizer), DATA, DATA), loss_fn=LOSS, epochs=5, callbacks=[]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, trained)
    predicted = DATA.inputs @ expected["w"] + expected["v"]
    np.testing.assert_allclose(jt.predict(state, DATA.inputs), predicted, rtol=1e-5)
    assert not np.allclose(predicted, DATA.inputs @ trained["w"] + trained["v"], rtol=1e-2)
    assert history["test_loss"][-1] == pytest.approx(float(jnp.mean(predicted**2)), rel=1e-5)
    # What is saved is what was evaluated, and what is put in is evaluated.
    jt.save(tmp_path / "model", state)
    for put_in in (
        jt.load(tmp_path / "model", make_state(jt.optimizers.sgd(0.1))),
        jt.load(tmp_path / "model", state),
        make_state(optimizer).replace(params=state.evaluation_params),
    ):
        np.testing.assert_allclose(jt.predict(put_in, DATA.inputs), predicted, rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        jt.optimizers.skip_nonfinite,
        lambda optimizer: jt.optimizers.accumulate_gradients(optimizer, 1),
        lambda optimizer: jt.optimizers.average_parameters(optimizer, 0.9, evaluate=False),
        lambda optimizer: optax.chain(optax.clip(100.0), optimizer),
        lambda optimizer: jt.optimizers.evaluate_with(
            optimizer, optax.contrib.schedule_free_eval_params
        ),
    ],
    ids=["skip", "accumulate", "average", "chain", "explicit"],
)
def test_schedule_free_is_found_inside_others(wrap) -> None:
    _, expected = by_hand(SCHEDULE_FREE, START, optax.contrib.schedule_free_eval_params, 3)
    state = make_state(wrap(SCHEDULE_FREE))
    for _ in range(3):
        (_, _), grads = jt.gradients(state, DATA, LOSS)
        state = jt.apply_gradients(state, grads, weight=2.0)
    found = state.evaluation_params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_states_of_one_lookahead_optimizer_are_stacked_and_take_another_rate() -> None:
    first, second = make_state(LOOKAHEAD), make_state(LOOKAHEAD)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first.opt_state, second.opt_state)
    assert stacked.inner.slow["w"].shape == (2, 2)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jt.with_optimizer(first, first.optimizer).optimizer == second.optimizer
    # The synchronizations continue: the slow parameters after four steps are those of one run.
    expected, state = first, first
    for i in range(4):
        if i == 1:
            state = state.replace(optimizer=optax.lookahead(optax.adam(0.1), 2, 0.3))
        (_, _), grads = jt.gradients(state, DATA, LOSS)
        state = jt.apply_gradients(state, grads)
        expected = jt.apply_gradients(expected, grads)
    assert not np.allclose(state.evaluation_params["w"], first.params["w"])
    for name in ("v", "w"):
        np.testing.assert_array_equal(
            state.evaluation_params[name], expected.evaluation_params[name]
        )
    anew = state.replace(optimizer=LOOKAHEAD, opt_state=LOOKAHEAD.init(state.params))
    assert jax.tree.structure(anew) == jax.tree.structure(first)
    np.testing.assert_array_equal(anew.evaluation_params["w"], state.params["w"])


def test_a_function_of_ones_own_is_used_in_steps_runs_and_a_sweep() -> None:
    """Half of the parameters; a traced rate makes new functions, and the state stays the same."""

    def run(rate):
        optimizer = jt.optimizers.evaluate_with(
            jt.optimizers.sgd(rate), lambda opt_state, params: jax.tree.map(lambda x: x / 2, params)
        )
        return jt.train(make_state(optimizer), DATA, DATA, loss_fn=LOSS, epochs=2)

    states, history = jax.jit(jax.vmap(run))(jnp.array([0.1, 0.2]))
    predicted = jax.vmap(lambda p: DATA.inputs @ p["w"] / 2 + p["v"] / 2)(states.params)
    found = history["test_loss"][:, -1]
    np.testing.assert_allclose(found, jnp.mean(predicted**2, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            jt.optimizers.evaluate_with(optax.sgd(0.1), lambda opt_state, params: params["w"]),
            r"evaluate_with returned float32\[2\]; expected parameters with the structure",
        ),
        (optax.chain(optax.clip(1.0), LOOKAHEAD), "expected it around the complete optimizer"),
        (jt.optimizers.skip_nonfinite(LOOKAHEAD), r"optax\.lookahead\(optax\.chain\(\.\.\.\)"),
        (
            optax.partition({"a": SCHEDULE_FREE, "b": optax.sgd(0.1)}, {"v": "a", "w": "b"}),
            r"some of the parameters only; .*schedule_free\(optax\.partition",
        ),
        (
            optax.chain(SCHEDULE_FREE, optax.scale(0.5)),
            r"follows schedule_free; expected optax\.contrib\.schedule_free\(optax\.chain",
        ),
        (
            optax.chain(jt.optimizers.average_parameters(optax.sgd(0.1)), optax.scale(0.5)),
            r"expected average_parameters\(optax\.chain",
        ),
    ],
)
def test_what_would_evaluate_others_is_refused(optimizer, message: str) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        make_state(optimizer)
