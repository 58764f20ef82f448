"""Arguments of the wrong type, which the tests' own type checker would stop before the checks."""

from __future__ import annotations

import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain import progress
from jaxtrain.checks import check_key, check_whole
from jaxtrain.command import seed_key
from jaxtrain.data.dataset import check_dataset
from jaxtrain.steps import metric_items

# `make check` puts a type checker on every function, which stops these before the checks do.
RUNTIME_TYPES = hasattr(jt.init_state, "__wrapped__")


@pytest.mark.parametrize("value", [2.5, "64", None, True, float("nan")])
def test_only_whole_numbers_count(value) -> None:
    with pytest.raises(jt.InputError, match=f"steps is {value!r}; expected a whole number"):
        check_whole(value, "steps", least=0)


def test_bounds() -> None:
    check_whole(3, "steps", least=3, most=3)
    with pytest.raises(jt.InputError, match=r"steps is 4; .*at least 3 and at most 3"):
        check_whole(4, "steps", least=3, most=3)
    with pytest.raises(jt.InputError, match=r"steps is 2; .*at least 3"):
        check_whole(2, "steps", least=3)


def test_a_tuple_is_no_dataset() -> None:
    with pytest.raises(jt.InputError, match=r"train_data is a tuple; expected a jaxtrain.Dataset"):
        check_dataset(([1.0], [2.0]), "train_data")


def test_lists_and_scalars_are_no_arrays() -> None:
    with pytest.raises(jt.InputError, match=r"data\.inputs is a list; expected an array"):
        check_dataset(jt.Dataset([1.0], np.ones(1)), "data")
    with pytest.raises(jt.InputError, match=r"data\.targets is of shape \(\); expected an array"):
        check_dataset(jt.Dataset(np.ones(1), np.float32(1)), "data")


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999])
def test_a_seed_that_jax_would_take_for_another_is_refused(seed: int) -> None:
    with pytest.raises(jt.InputError, match=f"seed is {seed}"):
        seed_key(seed)


@pytest.mark.skipif(RUNTIME_TYPES, reason="the type checker is faster")
def test_what_is_no_state_is_named() -> None:
    model = jt.models.LinearRegression()
    optimizer = jt.optimizers.sgd(0.1)
    with pytest.raises(jt.InputError, match="key is 0; expected a PRNG key"):
        jt.init_state(model, optimizer, np.ones((1, 1), np.float32), key=0)
    with pytest.raises(jt.InputError, match="optimizer is 'adam'; expected an optax"):
        jt.init_state(model, "adam", np.ones((1, 1), np.float32), key=seed_key(0))
    with pytest.raises(jt.InputError, match=r"metric_fns is <.*accuracy"):
        metric_items(jt.losses.cross_entropy, jt.metrics.accuracy)
    with pytest.raises(jt.InputError, match="report is a context manager"):
        jt.fit(None, jt.Dataset(np.ones(1), np.ones(1)), loss_fn=None, report=progress.console())


@pytest.mark.skipif(RUNTIME_TYPES, reason="the type checker is faster")
def test_words_that_are_none_of_the_choices_are_named(tmp_path, small_state, small_classes) -> None:
    options = {"loss_fn": jt.losses.cross_entropy, "checkpoint_dir": tmp_path}
    with pytest.raises(jt.InputError, match="resume is 'maybe'; expected 'auto', 'never' or"):
        jt.fit(small_state, small_classes, **options, resume="maybe")
    with pytest.raises(jt.InputError, match="on_nonfinite is 'go'; expected 'stop' or 'skip'"):
        jt.fit(small_state, small_classes, **options, on_nonfinite="go")


def test_a_number_is_no_key() -> None:
    with pytest.raises(jt.InputError, match=r"key is 0; expected a PRNG key, jax\.random\.key"):
        check_key(0, "key")
