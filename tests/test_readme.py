"""The README's Python runs as it stands there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_its_code_runs_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys) -> None:
    assert len(BLOCKS) >= 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
        for line, printed in re.findall(r"^(print\(.*\))  # (.+)$", block, flags=re.MULTILINE):
            capsys.readouterr()
            exec(line, names)
            assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_what_it_links_to_exists(path: str) -> None:
    assert os.path.exists(Path(__file__).parents[1] / path)
