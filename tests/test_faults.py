"""The tables of faults in README.md name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = [
    line
    for line in (FOLDER / "README.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| fault |")
]


def test_every_row_names_tests_that_exist() -> None:
    assert len(ROWS) >= 50
    for row in ROWS:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 5, row
        named = re.findall(r"`([\w/]*test_\w+\.py)::(test_\w+)`", cells[4])
        assert named, row
        for file, name in named:
            tree = ast.parse((FOLDER / file).read_text())
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in found, f"{file}::{name}"
