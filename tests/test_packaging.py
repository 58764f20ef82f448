"""The version, the citation and the files of the repository's host agree with the package."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import jaxtrain as jt

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))


def read_yaml(*names: str) -> dict:
    # BaseLoader: all values are strings, and "on" is not a boolean.
    return yaml.load(ROOT.joinpath(*names).read_text(), Loader=yaml.BaseLoader)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert metadata.version("jaxtrain") == jt.__version__
    assert read_yaml("CITATION.cff")["version"] == jt.__version__
    assert f"\n## {jt.__version__} - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_has_what_its_format_requires() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == metadata.metadata("jaxtrain")["License-Expression"]


def test_publishing_needs_a_token_only_and_follows_the_test_of_the_package() -> None:
    workflow = read_yaml(".github", "workflows", "publish.yml")
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    assert text.count("${{") == text.count("${{ secrets.PYPI_API_TOKEN }}") == 1
    steps = workflow["jobs"]["publish"]["steps"]
    assert {"run": "make package"} in steps[:-1]
    assert steps[-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_the_workflow_of_ci_runs_its_script() -> None:
    steps = read_yaml(".github", "workflows", "ci.yml")["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").is_file()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_fields_with_labels(form: Path) -> None:
    body = read_yaml(".github", "ISSUE_TEMPLATE", form.name)["body"]
    assert {field["type"] for field in body} <= {"textarea", "input"}
    assert all(field["attributes"]["label"] for field in body)
    assert len({field["id"] for field in body}) == len(body)


def test_the_command_of_the_bug_report_prints_the_versions(tmp_path: Path) -> None:
    body = read_yaml(".github", "ISSUE_TEMPLATE", "bug_report.yml")["body"]
    (text,) = [f["attributes"]["description"] for f in body if f["id"] == "versions"]
    command = shlex.split(text.split("`")[1])
    assert command[0] == "python"
    result = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"'jaxtrain': '{jt.__version__}'" in result.stdout
