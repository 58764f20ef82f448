"""Arguments out of range or of the wrong type are refused by the functions that check them."""

from __future__ import annotations

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain._arguments import check_integer
from jaxtrain.cli.flags import seed_key
from jaxtrain.dataset import check_dataset
from jaxtrain.training.step import make_objective

# The type checker of `make test TYPES=1` raises before these checks do.
RUNTIME_TYPES = hasattr(jt.init_state, "__wrapped__")
skip_if_typed = pytest.mark.skipif(RUNTIME_TYPES, reason="the type checker raises first")


@pytest.mark.parametrize("value", [2.5, "64", None, True, float("nan")])
def test_values_that_are_not_integers_are_refused(value) -> None:
    with pytest.raises(jt.errors.InputError, match=f"steps is {value!r}; expected an integer"):
        check_integer(value, "steps", minimum=0)


def test_integers_out_of_bounds_are_refused() -> None:
    check_integer(3, "steps", minimum=3, maximum=3)
    with pytest.raises(jt.errors.InputError, match=r"steps is 4; .*at least 3 and at most 3"):
        check_integer(4, "steps", minimum=3, maximum=3)
    with pytest.raises(jt.errors.InputError, match=r"steps is 2; .*at least 3"):
        check_integer(2, "steps", minimum=3)


def test_a_tuple_is_not_a_dataset() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"train is a tuple of 2; expected a jaxtrain.Dataset"
    ):
        check_dataset(([1.0], [2.0]), "train")


def test_lists_and_scalars_are_not_arrays_of_examples() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"data\.inputs\.0 is a float; expected a NumPy or JAX"
    ):
        check_dataset(jt.Dataset([1.0], np.ones(1)), "data")
    with pytest.raises(jt.errors.InputError, match=r"data\.targets is a scalar; expected an array"):
        check_dataset(jt.Dataset(np.ones(1), np.float32(1)), "data")
    with pytest.raises(jt.errors.InputError, match=r"data\.inputs is empty"):
        check_dataset(jt.Dataset({}, np.ones(1)), "data")


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(jt.errors.InputError, match=f"seed is {seed}"):
        seed_key(seed)


@skip_if_typed
def test_invalid_optimizers_metrics_and_callbacks_are_refused(small_state, small_classes) -> None:
    model = jt.models.LinearRegression()
    with pytest.raises(jt.errors.InputError, match="optimizer is 'adam'; expected an optax"):
        jt.init_state(model, "adam", np.ones((1, 1), np.float32), key=seed_key(0))
    with pytest.raises(jt.errors.InputError, match=r"metric_fns is <.*accuracy"):
        make_objective(jt.losses.cross_entropy, jt.metrics.accuracy)
    with pytest.raises(
        jt.errors.InputError, match=r"the metric a is 3; expected a function, or a pair"
    ):
        make_objective(jt.losses.cross_entropy, {"a": 3})
    loss_fn = jt.losses.cross_entropy
    with pytest.raises(jt.errors.InputError, match=r"callbacks is .*; expected a list"):
        jt.fit(small_state, small_classes, loss_fn=loss_fn, callbacks=jt.callbacks.progress())
