"""Every flag of an experiment is read by its script or by the code that scripts share."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from jaxtrain.cli.flags import ExperimentFlags, Safety

ROOT = Path(__file__).parents[2]
CLI = ROOT / "jaxtrain" / "cli"
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_is_dead(name: str) -> None:
    script = importlib.import_module(f"experiments.{name}")
    assert issubclass(script.Config, ExperimentFlags)
    shared = "".join(path.read_text() for path in CLI.glob("*.py"))
    text = Path(script.__file__).read_text() + shared
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"\bconfig\.{field.name}\b", text), field.name
    for field in dataclasses.fields(Safety):
        assert re.search(rf"\bsafety\.{field.name}\b", text), field.name
