"""reduce_on_plateau against ReduceLROnPlateau of PyTorch, in a run, and after a resume."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from jaxtrain.training.loop import StepLog

# A model that does not learn: its loss is the same in every epoch.
CONSTANT = jt.Model(
    lambda key, x: ({"w": jnp.ones(())}, {}), lambda p, s, x, *, train, key: (x + 0 * p["w"], s)
)
LOSS = jt.losses.mean_squared_error
DATA = jt.Dataset(jnp.arange(4.0), jnp.ones(4))


def start(optimizer) -> jt.TrainState:
    return jt.init_state(CONSTANT, optimizer, DATA.inputs[:1], key=jax.random.key(0))


def rate_of(state) -> float:
    return float(jt.optimizers.records(state.opt_state)["learning_rate"].value)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 3},
        {"patience": 0, "factor": 0.5, "min_lr": 0.02},
        {"patience": 1, "cooldown": 3, "threshold": 0.2},
        {"patience": 2, "threshold": 0.05, "threshold_mode": "abs", "eps": 0.001},
        {"patience": 1, "mode": "max"},
        {"patience": 1, "mode": "max", "threshold": 0.1, "threshold_mode": "abs", "cooldown": 1},
    ],
    ids=str,
)
def test_rates_are_those_of_pytorch(options: dict) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(0.5, 0.3, 60) + np.geomspace(1, 0.01, 60)
    values[7] = np.nan
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    callback = jt.callbacks.reduce_on_plateau(**{"mode": "min", **options})
    run = jt.Run(start(jt.optimizers.sgd(0.3)), 0, 60, ("validation_loss",), StepLog([], [], {}))
    rates = set()
    for value in values.tolist():
        optimizer.step()
        scheduler.step(value)
        run = run.replace(rows=(*run.rows, {"validation_loss": value}))
        run = callback.on_epoch(run) or run
        rates.add(rate_of(run.state))
        assert rate_of(run.state) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
    assert len(rates) > 2


def test_the_history_has_the_rate_of_each_epoch_and_a_resumed_run_continues_it(tmp_path) -> None:
    """The first epoch improves on nothing; then each second one reduces the rates of both groups.

    One of them is also an axis of `optax.inject_hyperparams`.
    """

    def run(epochs: int, *callbacks):
        plateau = jt.callbacks.reduce_on_plateau("test_loss", factor=0.5, patience=1)
        optimizer = jt.optimizers.average_parameters(jt.optimizers.sgd(0.8), 0.9)
        state, history = jt.fit(
            *(start(optimizer), DATA, DATA),
            **{"loss_fn": LOSS, "epochs": epochs, "batch_size": 2},
            callbacks=[plateau, *callbacks],
        )
        return state, history["learning_rate"].tolist()

    state, rates = run(6)
    assert rates == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.2])
    run(4, jt.callbacks.checkpoint(tmp_path))
    resumed, again = run(6, jt.callbacks.checkpoint(tmp_path))
    assert again == rates
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, state.opt_state)


def test_all_groups_are_reduced() -> None:
    optimizer = optax.partition(
        {"a": jt.optimizers.adam(0.5), "b": optax.inject_hyperparams(optax.lion)(0.25)},
        {"w": "a", "v": "b"},
    )
    model = jt.Model(
        lambda key, x: ({"w": jnp.ones(()), "v": jnp.ones(())}, {}),
        lambda p, s, x, *, train, key: (x + 0 * p["w"] * p["v"], s),
    )
    state = jt.init_state(model, optimizer, DATA.inputs[:1], key=jax.random.key(0))
    callback = jt.callbacks.reduce_on_plateau("train_loss", patience=0)
    state, _ = jt.fit(state, DATA, loss_fn=LOSS, epochs=2, callbacks=[callback])
    rates = optax.tree_utils.tree_get_all_with_path(state.opt_state, "learning_rate")
    assert [float(rate) for _, rate in rates] == pytest.approx([0.05, 0.025])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, r"factor is 1\.0; expected a number above 0 and below 1"),
        ({"factor": 0.0}, r"factor is 0\.0; expected a number above 0"),
        ({"patience": -1}, "patience is -1"),
        ({"mode": "least"}, "mode is 'least'; expected 'min' or 'max'"),
        ({"threshold_mode": "sum"}, "threshold_mode is 'sum'; expected 'rel' or 'abs'"),
        ({"min_lr": -1.0}, r"min_lr is -1\.0"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    # The type checker of `make test TYPES=1` may raise first.
    with pytest.raises((jt.errors.InputError, TypeError), match=f"{message}|typechecking"):
        jt.callbacks.reduce_on_plateau(**options)


@pytest.mark.parametrize(
    ("optimizer", "monitor", "message"),
    [
        (jt.optimizers.sgd(0.1), "validation_loss", "monitors 'validation_loss', but the history"),
        (optax.sgd(0.1), "train_loss", "finds no learning rate to change"),
        (jt.optimizers.sgd(lambda count: 0.1), "train_loss", "finds no learning rate to change"),
    ],
)
def test_a_run_without_the_column_or_a_rate_is_refused(optimizer, monitor, message) -> None:
    callback = jt.callbacks.reduce_on_plateau(monitor)
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(start(optimizer), DATA, loss_fn=LOSS, epochs=1, callbacks=[callback])
