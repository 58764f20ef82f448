"""Optimizers refuse invalid arguments and record their learning rate; for numbers see parity/."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

NAMES = ("sgd", "adam", "adamw", "rmsprop", "rprop", "adagrad", "adadelta", "lbfgs")


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_learning_rate_is_refused(name: str) -> None:
    for value in (-0.1, float("nan"), float("inf"), -1, np.float32(np.nan), "0.1", b"0.1"):
        message = r"learning_rate is .*; expected a number that is|typechecking"
        with pytest.raises((jt.errors.InputError, TypeError), match=message):
            jt.optimizers.make(name, value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentum": -0.9}, "momentum is -0.9"),
        ("sgd", {"weight_decay": float("nan")}, "weight_decay is nan"),
        ("sgd", {"nesterov": True}, "nesterov is True with momentum 0.0"),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening 0.1"),
        ("adam", {"betas": (0.9, 1.0)}, r"betas is 1\.0; expected a number that is in"),
        ("adam", {"eps": -1e-8}, "eps is -1e-08"),
        ("sgd", {"momentum": 0.9, "dampening": float("nan")}, "dampening is nan"),
        ("rmsprop", {"alpha": 1.5}, r"alpha is 1\.5"),
        ("rprop", {"etas": (1.2, 0.5)}, r"etas\[0\] is 1\.2; expected a factor in \(0, 1\)"),
        (
            "rprop",
            {"step_sizes": (1.0, 0.1)},
            r"step_sizes\[1\] is 0\.1; expected the largest",
        ),
        ("adagrad", {"lr_decay": -1.0}, r"lr_decay is -1\.0"),
        ("adadelta", {"rho": -0.1}, r"rho is -0\.1"),
        ("lbfgs", {"history_size": 0}, "history_size is 0"),
    ],
)
def test_other_arguments_out_of_range_are_refused(name, options, message) -> None:
    with pytest.raises(jt.errors.InputError, match=message):
        jt.optimizers.make(name, 0.1, **options)


def test_step_lr_changes_every_step_size_epochs() -> None:
    schedule = jt.optimizers.step_lr(1.0, step_size=2, gamma=0.5, steps_per_epoch=3)
    rates = [float(schedule(step)) for step in range(13)]
    np.testing.assert_allclose(rates, [1.0] * 6 + [0.5] * 6 + [0.25])
    assert jt.optimizers.step_lr(1.0, 1, gamma=0.0)(1) == 0


@pytest.mark.parametrize("options", [{"step_size": 0}, {"step_size": 1, "steps_per_epoch": 0}])
def test_step_lr_refuses_sizes_below_1(options) -> None:
    with pytest.raises(jt.errors.InputError, match="at least 1"):
        jt.optimizers.step_lr(0.1, **options)


def test_vmap_sweeps_over_any_argument() -> None:
    """On f(w) = w² / 2 from w = 1 the gradient is w; two steps of each, by hand."""

    def two_steps(learning_rate, momentum, weight_decay):
        optimizer = jt.optimizers.sgd(learning_rate, momentum, weight_decay=weight_decay)
        params = jnp.array(1.0)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    swept = jax.vmap(two_steps)(
        jnp.array([0.1, 0.1, 0.5]), jnp.array([0.0, 0.9, 0.0]), jnp.array([0.0, 0.0, 1.0])
    )
    # 0.9 · 0.9;  0.9 − 0.1 (0.9 + 0.9 · 1);  1 − 0.5 · 2 = 0, where it stays.
    np.testing.assert_allclose(swept, [0.81, 0.72, 0.0], atol=1e-6)


def test_rprop_refuses_a_schedule() -> None:
    with pytest.raises(jt.errors.InputError, match="learning rate of rprop is a schedule"):
        jt.optimizers.make("rprop", jt.optimizers.step_lr(0.1, 1))


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_any_schedule_of_optax_is_a_learning_rate(name: str) -> None:
    """Once a schedule has reached 0, the parameters no longer change."""
    optimizer = jt.optimizers.make(name, optax.cosine_decay_schedule(0.1, decay_steps=5))
    params = {"w": jnp.ones(2)}
    state, path = optimizer.init(params), []
    for _ in range(7):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"]))
    assert (path[0] != 1).all()
    np.testing.assert_array_equal(path[5], path[4])
    np.testing.assert_array_equal(path[6], path[4])


def test_make_refuses_arguments_that_an_optimizer_lacks_and_unknown_names() -> None:
    with pytest.raises(jt.errors.InputError, match=r"momentum is 0\.9 with the optimizer adam"):
        jt.optimizers.make("adam", 0.1, momentum=0.9)
    with pytest.raises(jt.errors.InputError, match="'sdg'; expected one of sgd, adam"):
        jt.optimizers.make("sdg", 0.1)
    jt.optimizers.make("adam", 0.1, momentum=0.0)
