"""The version and the citation agree with the package."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import jaxtrain as jt

ROOT = Path(__file__).parents[1]


def test_the_version_and_the_license_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert "version" not in project
    assert metadata.version("jaxtrain") == citation["version"] == jt.__version__
    assert metadata.metadata("jaxtrain")["License-Expression"] == citation["license"]
    assert f"\n## {jt.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
