"""Every flag of an experiment is read by its script or by the code that scripts share."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from experiments import (
    gradient_descent,
    learning_rate,
    linear_regression,
    loss_landscape,
    losses,
    minibatch_regression,
    mnist,
    optimizers,
    tutorials,
)
from jaxtrain.cli.flags import ExperimentFlags, Safety

SCRIPTS = [
    *(gradient_descent, learning_rate, linear_regression, loss_landscape, losses),
    *(minibatch_regression, mnist, optimizers, tutorials),
]
CLI = Path(__file__).parents[2] / "jaxtrain" / "cli"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_flag_is_dead(script) -> None:
    assert issubclass(script.Config, ExperimentFlags)
    shared = "".join(path.read_text() for path in CLI.glob("*.py"))
    text = Path(script.__file__).read_text() + shared
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"\bconfig\.{field.name}\b", text), field.name
    for field in dataclasses.fields(Safety):
        assert re.search(rf"\bsafety\.{field.name}\b", text), field.name
