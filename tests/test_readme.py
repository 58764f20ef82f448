"""The Python of the README and the guide runs, and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md"]
LINKS = [
    (page, path)
    for page in PAGES
    for path in sorted(set(re.findall(r"\]\(([\w./-]+)\)", page.read_text())))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_code_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
        for line, printed in re.findall(r"^ *(print\(.*\))  # (.+)$", block, flags=re.MULTILINE):
            capsys.readouterr()
            exec(line, names)
            assert capsys.readouterr().out.strip() == printed, line


@pytest.mark.parametrize(("page", "path"), LINKS, ids=lambda value: str(value)[-30:])
def test_what_it_links_to_exists(page: Path, path: str) -> None:
    assert (page.parent / path).exists()
