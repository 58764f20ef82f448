"""Which differences between two runs are refused, and which only cause a warning."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import check_same_run, identify
from jaxtrain.errors import InputError


class State(NamedTuple):
    step: Any
    key: Any
    params: Any
    opt_state: Any = ()


def identity(*, step=0, seed=0, params=1.0, rate=0.1, program="a", **changes: Any):
    state = State(
        jnp.int32(step), jax.random.key(seed), jnp.float32(params), {"rate": jnp.float32(rate)}
    )
    settings = {"batch_size": 16, "training data": "50 examples"} | changes.get("settings", {})
    descriptions = {"model": "A()", "loss": "mse"} | changes.get("descriptions", {})
    found = identify(state, settings=settings, program=program, descriptions=descriptions)
    found["versions"] = found["versions"] | changes.get("versions", {})
    return found | {"configuration": changes.get("configuration", {})}


def check(**changes: Any) -> str | None:
    return check_same_run(identity(**changes), identity(), "it")


def test_the_same_run_is_accepted_silently() -> None:
    assert check() is None
    # A run that continues from a later state has other values.
    assert check(step=8, params=2.0, rate=0.3) is None
    # The text of a model may differ from process to process.
    assert check(descriptions={"model": "B()"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"batch_size": 17}}, "batch_size was 16 and is now 17; use the same"),
        ({"settings": {"new": None}, "seed": 1}, "the key of the state was [0-9a-f]+ and is now"),
        (
            {"settings": {"training data": "9"}, "configuration": {"rate": 1}},
            "rate was None and is now 1, training data was 50 examples and is now 9;",
        ),
    ],
)
def test_other_settings_and_keys_are_refused(changes, message: str) -> None:
    with pytest.raises(InputError, match=f"it belongs to another run: {message}"):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": "b"}, r"values \(of the model, the loss, the optimizer or the parameters\);"),
        (
            {"program": "b", "descriptions": {"loss": "l1"}, "versions": {"jax": "9"}},
            r"by other code .*\(loss was mse and is now l1, jax was \S+ and is now 9\)",
        ),
        ({"versions": {"python": "3.99"}}, r"other versions .*\(python was \S+ and is now 3.99\)"),
        ({"params": 2.0}, "from other initial values .* the values of the checkpoint"),
        (
            {"rate": 0.2, "descriptions": {"learning_rate": "0.2"}},
            r"other initial values \(learning_rate was None and is now 0.2\); the run",
        ),
    ],
)
def test_other_code_versions_and_initial_values_cause_a_warning(changes, message: str) -> None:
    found = check(**changes)
    assert found is not None
    assert re.search(message, found)
