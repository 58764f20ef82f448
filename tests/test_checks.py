"""Arguments of the wrong type, which the tests' own type checker would stop before the checks."""

from __future__ import annotations

import pytest

import jaxtrain as jt
from jaxtrain.checks import check_batch_size, check_epochs
from jaxtrain.data.dataset import check_dataset


@pytest.mark.parametrize("value", [2.5, "64", None, True, float("nan")])
@pytest.mark.parametrize("check", [check_batch_size, check_epochs])
def test_only_whole_numbers_count(check, value) -> None:
    with pytest.raises(jt.InputError, match=f"steps is {value!r}; expected a whole number"):
        check(value, "steps")


def test_a_tuple_is_no_dataset() -> None:
    with pytest.raises(jt.InputError, match=r"train_data is a tuple; expected a jaxtrain.Dataset"):
        check_dataset(([1.0], [2.0]), "train_data")
