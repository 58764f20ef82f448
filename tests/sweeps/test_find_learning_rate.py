"""find_learning_rate: solved by hand, against a sweep of rates, divergence, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.sweeps.find_learning_rate import _batches, _result

LOSS = jt.losses.cross_entropy
RATES = np.geomspace(1e-5, 10, 200)
# The type checker of `make test TYPES=1` raises before this check does.
wrong_types = pytest.mark.skipif(
    hasattr(jt.init_state, "__wrapped__"), reason="the type checker raises first"
)


@pytest.fixture
def state(small_classes):
    model = jt.models.FeedForward(features=(8, 3), dropout_rate=0.0, mean=0.0, std=1.0)
    inputs = small_classes.inputs[:1]
    return jt.init_state(model, jt.optimizers.sgd(0.1), inputs, key=jax.random.key(0))


def curve(falls_at: float, rises_at: float = 2.0) -> np.ndarray:
    """Losses that fall from 2 to 1 around one rate, and rise above all bounds at another."""
    fall = 1 / (1 + np.exp(-8 * np.log10(RATES / falls_at)))
    return 2 - fall + (RATES / rises_at) ** 8


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.1])
def test_the_suggestion_is_where_the_loss_falls_fastest(rate) -> None:
    for losses in (curve(rate), curve(rate) - 10):  # they may be negative
        test = _result(RATES, losses)
        assert test.suggestion == pytest.approx(rate, rel=0.1)  # the rates are 7 % apart
    noise = np.random.default_rng(0).normal(0, 0.05, len(RATES))
    assert rate / 2 < _result(RATES, curve(rate) + noise).suggestion < 2 * rate


@pytest.mark.parametrize("beyond", [np.nan, np.inf, 1e6])
def test_the_result_ends_where_the_run_diverges(beyond) -> None:
    losses = np.where(RATES > 1, beyond, curve(0.01))
    test = _result(RATES, losses)
    assert test.suggestion == pytest.approx(0.01, rel=0.1)
    assert 0.4 < test.rates[-1] <= 1  # the smoothing looks ahead by half a window
    assert len(test.rates) == len(test.losses) == len(test.smoothed_losses)
    assert test.smoothed_losses.max() < 2.2  # no loss after the run diverged


def test_the_steepest_slope_after_the_minimum_does_not_count() -> None:
    losses = curve(0.01, rises_at=5)
    losses[170:180] += np.linspace(2, 0, 10)  # a spike, which falls faster than the loss before
    losses[160:170] += np.linspace(0, 2, 10)
    losses[180:] += 0.2
    assert _result(RATES, losses).suggestion == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    "make_optimizer", [jt.optimizers.sgd, lambda rate: optax.lookahead(optax.sgd(rate), 99, 0.5)]
)
def test_losses_are_those_of_training_at_the_rates_of_the_ramp(
    state, small_classes, make_optimizer
) -> None:
    test = jt.find_learning_rate(
        state,
        small_classes,
        make_optimizer,
        loss_fn=LOSS,
        lowest=1e-3,
        highest=0.1,
        steps=20,
        batch_size=len(small_classes),
    )
    np.testing.assert_allclose(test.rates, np.geomspace(1e-3, 0.1, 20), rtol=1e-5)
    for rate, loss in zip(test.rates, test.losses, strict=True):
        state = jt.set_learning_rate(state, float(rate))
        state, metrics = jt.train_step(state, small_classes, LOSS)
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-5)


def test_batches_are_those_of_epochs() -> None:
    stored = _batches(10, 4, 5, None)
    assert stored.ravel().tolist() == [*range(10), *range(10)]
    shuffled = _batches(10, 4, 5, jax.random.key(0)).ravel()
    assert sorted(shuffled[:10].tolist()) == sorted(shuffled[10:].tolist()) == list(range(10))
    orders = [list(range(10)), shuffled[:10].tolist(), shuffled[10:].tolist()]
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("make_optimizer", [jt.optimizers.sgd, jt.optimizers.adam])
def test_the_suggestion_trains_as_well_as_the_best_of_ten_rates(make_optimizer) -> None:
    train, test = jt.data.load("digits")
    mean, std = jt.data.STATISTICS["digits"]
    model = jt.models.FeedForward((32, 10), mean=mean, std=std)

    def start(optimizer, seed):
        return jt.init_state(model, optimizer, train.inputs[:1], key=jax.random.key(seed))

    def run(learning_rate, seed):
        return jt.train(
            start(make_optimizer(learning_rate), seed),
            train,
            test,
            loss_fn=LOSS,
            metric_fns={"accuracy": jt.metrics.accuracy},
            epochs=5,
            key=jax.random.key(seed),
        )[1]

    first = start(make_optimizer(0.1), 0)
    found = jt.find_learning_rate(
        first, train, make_optimizer, loss_fn=LOSS, key=jax.random.key(0)
    ).suggestion
    rates = [*np.geomspace(1e-4, 1, 10).tolist(), found]
    result = jt.sweep(run, {"learning_rate": rates, "seed": range(2)}, at_once=22)
    accuracies = result.final("test_accuracy").mean(axis=1)
    assert accuracies[-1] > np.nanmax(accuracies[:-1]) - 0.01  # the highest rates may diverge


def test_the_picture_shows_losses_and_suggestion() -> None:
    test = _result(RATES, curve(0.01))
    [axes] = test.plot().axes
    assert axes.get_xscale() == "log"
    each, smoothed, suggestion = axes.lines
    np.testing.assert_array_equal(each.get_ydata(), test.losses)
    np.testing.assert_array_equal(smoothed.get_ydata(), test.smoothed_losses)
    assert set(suggestion.get_xdata()) == {test.suggestion}
    assert [text.get_text() for text in axes.get_legend().get_texts()][
        -1
    ] == f"suggestion: {test.suggestion:.2g}"


@pytest.mark.parametrize(
    "losses",
    [
        1 + np.linspace(0, 1, len(RATES)),
        np.full(len(RATES), 2.3),
        2.3 + np.random.default_rng(0).normal(0, 1e-7, len(RATES)),  # rounding
        2.3 + np.random.default_rng(0).normal(0, 0.5, len(RATES)),  # of different batches
    ],
    ids=["rises", "constant", "rounding", "noise"],
)
def test_a_loss_that_never_falls_is_an_error(losses) -> None:
    with pytest.raises(jt.errors.InputError, match=r"falls at no learning rate from 1e-05"):
        _result(RATES, losses)


def test_a_model_that_does_not_learn_has_no_suggestion(state, small_classes) -> None:
    def loss_fn(predictions, targets):
        return 1.0 + 0 * predictions[:, 0]

    with pytest.raises(jt.errors.InputError, match="so there is no suggestion"):
        jt.find_learning_rate(state, small_classes, jt.optimizers.sgd, loss_fn=loss_fn)


MAKERS = {
    "accumulated": lambda rate: jt.optimizers.accumulate_gradients(jt.optimizers.sgd(rate), 2),
    "MultiSteps": lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(),
    "skipping": lambda rate: jt.optimizers.skip_nonfinite(MAKERS["accumulated"](rate)),
    "schedule of a schedule": lambda rate: jt.optimizers.accumulate_gradients(
        jt.optimizers.sgd(lambda count: rate(count // 10)), 2
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_accumulated_updates_are_made_at_the_rates_that_are_reported(
    state, small_classes, name: str
) -> None:
    """Two batches per update. A rate is tried once, and its loss is the mean of both batches."""
    data = small_classes[:48]
    test = jt.find_learning_rate(
        *(state, data, MAKERS[name]),
        **{"loss_fn": LOSS, "lowest": 1e-3, "highest": 0.5, "steps": 20, "batch_size": 24},
    )
    np.testing.assert_allclose(test.rates, np.geomspace(1e-3, 0.5, 20), rtol=1e-5)
    for rate, loss in zip(test.rates, test.losses, strict=True):
        state = jt.set_learning_rate(state, float(rate))
        state, metrics = jt.train_step(state, data, LOSS)
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-5)


def test_the_rates_are_those_that_the_optimizer_applies(state, small_classes) -> None:
    def make_optimizer(rate):
        scale = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=1.0)  # in each step
        return optax.chain(jt.optimizers.sgd(lambda count: 3 * rate(count)), scale)

    test = jt.find_learning_rate(
        *(state, small_classes, make_optimizer),
        **{"loss_fn": LOSS, "lowest": 0.01, "highest": 10.0, "steps": 20, "batch_size": 50},
    )
    expected = 3 * np.geomspace(0.01, 10, 20) * 0.5 ** np.arange(1, 21)
    np.testing.assert_allclose(test.rates, expected[: len(test.rates)], rtol=1e-5)


def test_a_loss_that_is_nan_from_the_start_is_an_error(state, small_classes) -> None:
    def loss_fn(predictions, targets):
        return jnp.full(len(targets), jnp.nan)

    with pytest.raises(
        jt.errors.InputError, match=r"the loss is nan at the learning rate 1e-05, after 0"
    ):
        jt.find_learning_rate(state, small_classes, jt.optimizers.sgd, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        pytest.param(
            optax.sgd(0.1),
            "make_optimizer is a GradientTransformation.*without parentheses",
            marks=wrong_types,
        ),
        (lambda schedule: optax.sgd(0.1), "make_optimizer ignores the schedule"),
        (jt.optimizers.lbfgs, "make_optimizer makes an optimizer with a line search"),
    ],
)
def test_an_optimizer_without_a_rate_to_find(state, small_classes, make_optimizer, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.find_learning_rate(state, small_classes, make_optimizer, loss_fn=LOSS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5}, "steps is 5; expected an integer of at least 20"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lowest": 0.0}, r"lowest is 0.0 and highest is 10.0; expected rates"),
        ({"lowest": 1.0, "highest": 0.1}, "lowest is 1.0 and highest is 0.1"),
        ({"highest": float("inf")}, "highest is inf"),
    ],
)
def test_bad_arguments(state, small_classes, arguments, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.find_learning_rate(state, small_classes, optax.sgd, loss_fn=LOSS, **arguments)
