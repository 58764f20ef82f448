"""minimize on functions whose minimum is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.optimizers import Stop


def parabola(w):
    return jnp.sum((w - 3.0) ** 2)


def test_gradient_descent_equals_a_solution_by_hand() -> None:
    """The error, w − 3, is halved in each step, so that the losses are 9, 9/4, 9/16, …"""
    result = jt.minimize(parabola, jnp.array(0.0), optax.sgd(0.25), max_steps=4)
    np.testing.assert_allclose(result.losses, 9 / 4.0 ** np.arange(5), rtol=1e-6)
    assert result.params == pytest.approx(3 - 3 / 2**4)
    assert (result.steps, result.evaluations) == (4, 5)
    assert Stop(result.stop).message == "step limit"


def test_it_stops_below_the_threshold() -> None:
    result = jt.minimize(
        parabola, jnp.array(0.0), optax.sgd(0.25), max_steps=100, loss_threshold=0.1
    )
    assert result.steps == 4  # 9 / 4⁴ = 0.035 is the first below
    assert Stop(result.stop).message == "loss below the threshold"
    assert np.isnan(result.losses[5:]).all()


def test_runs_under_vmap_stop_independently() -> None:
    """Learning rates that crawl, halve the error, solve in one step, oscillate, and diverge."""
    rates = jnp.array([1e-6, 0.25, 0.5, 1.0, 20.0])
    result = jax.vmap(
        lambda rate: jt.minimize(
            parabola,
            jnp.array(0.0),
            jt.optimizers.sgd(rate),
            max_steps=50,
            loss_threshold=1e-9,
        )
    )(rates)
    assert [Stop(stop).message for stop in result.stop] == [
        "step limit",
        "loss below the threshold",
        "loss below the threshold",
        "step limit",
        "loss not finite",
    ]
    assert result.steps[2] == 1
    np.testing.assert_allclose(result.losses[3], 9.0)
    alone = jt.minimize(
        parabola, jnp.array(0.0), optax.sgd(0.25), max_steps=50, loss_threshold=1e-9
    )
    assert alone.steps == result.steps[1]
    np.testing.assert_allclose(alone.losses, result.losses[1], rtol=1e-5)


def test_lbfgs_minimizes_the_rosenbrock_function() -> None:
    result = jax.jit(
        lambda start: jt.minimize(
            lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
            start,
            jt.optimizers.lbfgs(),
            max_steps=100,
            gradient_tolerance=1e-4,
        )
    )(jnp.array([-1.2, 1.0]))
    np.testing.assert_allclose(result.params, [1, 1], atol=1e-3)
    assert result.steps < 60


def test_a_start_at_the_minimum_takes_no_step() -> None:
    result = jt.minimize(
        parabola, jnp.array(3.0), jt.optimizers.lbfgs(), max_steps=9, gradient_tolerance=1e-6
    )
    assert result.steps == 0
    assert Stop(result.stop).message == "gradient below the tolerance"


def test_a_line_search_without_progress_ends_the_descent() -> None:
    """Without a tolerance, L-BFGS would search until the step limit."""
    result = jt.minimize(parabola, jnp.array(0.0), jt.optimizers.lbfgs(), max_steps=100)
    assert result.steps < 20
    assert result.params == pytest.approx(3.0, abs=1e-3)
    result = jt.minimize(
        lambda x: jnp.sum(jnp.abs(x - 0.3)), jnp.zeros(3), jt.optimizers.lbfgs(), max_steps=100
    )
    assert Stop(result.stop).message == "line search without progress"
    assert result.steps < 100


def test_every_reason_to_stop_has_a_message() -> None:
    assert len({stop.message for stop in Stop}) == len(Stop) == 5
    assert Stop(jnp.int32(1)) is Stop.LOSS_THRESHOLD
    assert Stop.LOSS_THRESHOLD.message == "loss below the threshold"


def test_a_negative_step_limit_is_refused() -> None:
    with pytest.raises(jt.errors.InputError, match="max_steps is -1"):
        jt.minimize(parabola, jnp.array(0.0), optax.sgd(0.1), max_steps=-1)


def test_line_searches_refuse_mini_batches(small_state, small_classes) -> None:
    model = jt.models.FeedForward((8, 3), dropout_rate=0.0, mean=0.0, std=1.0)
    state = jt.init_state(
        model, jt.optimizers.lbfgs(), small_classes.inputs[:1], key=jax.random.key(0)
    )
    loss_fn = jt.losses.cross_entropy
    for train in (
        lambda size: jt.train_epoch(state, small_classes, loss_fn, batch_size=size),
        lambda size: jt.fit(state, small_classes, loss_fn=loss_fn, batch_size=size, epochs=3),
    ):
        with pytest.raises(jt.errors.InputError, match=r"batch_size is 16 of 50 .* line search"):
            train(16)
        after, _ = train(50)
        start = jt.evaluate(state, small_classes, loss_fn)["loss"]
        assert jt.evaluate(after, small_classes, loss_fn)["loss"] < start


BACKTRACKING = optax.scale_by_backtracking_linesearch(20)


@pytest.mark.parametrize(
    "optimizer",
    [
        jt.optimizers.lbfgs(),
        optax.lbfgs(linesearch=BACKTRACKING),  # which does not keep the gradient
        optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(20, store_grad=True)),
    ],
    ids=["zoom", "backtracking", "backtracking with gradient"],
)
def test_line_searches_of_any_kind_minimize(optimizer) -> None:
    result = jt.minimize(parabola, jnp.zeros(3), optimizer, max_steps=20, loss_threshold=1e-6)
    np.testing.assert_allclose(result.params, 3, atol=1e-3)
    assert result.evaluations > result.steps


@pytest.mark.parametrize("optimizer", [jt.optimizers.lbfgs(), optax.lbfgs(linesearch=BACKTRACKING)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_line_searches_minimize_with_64_bits(optimizer, dtype) -> None:
    with jax.enable_x64(True):
        start = jnp.zeros(3, dtype)
        result = jt.minimize(parabola, start, optimizer, max_steps=20, loss_threshold=1e-6)
        assert result.params.dtype == dtype
        np.testing.assert_allclose(result.params, 3, atol=1e-3)


def test_an_optimizer_that_changes_the_type_of_its_state_is_named() -> None:
    def update(grads, count, params=None):
        return grads, count + 0.5

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    message = r"returned state\.opt_state as float32\[\]; expected int32\[\]"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.minimize(parabola, jnp.array(0.0), optimizer, max_steps=3)
