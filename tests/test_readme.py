"""The code in the README and in docs/ runs, and the links of every page lead to a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", ROOT / "benchmarks" / "NOTES.md"]
README_LINES = 130


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def files(page: Path) -> dict[str, str]:
    """Returns the files that a page shows, in blocks such as "python server.py"."""
    pattern = r"^```python (\S+)\n(.*?)^```"
    return dict(re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE))


def commands(page: Path) -> list[tuple[str, str]]:
    """Returns the Python commands of a page, such as "predict.py", and what they print."""
    pattern = r"^```console\n\$ python (.*?)\n(.*?)^```"
    return re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Returns the relative paths that a page links to or shows, without anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    paths = {link.partition("#")[0] for link in found if not re.match(r"[a-z]+:", link)}
    return sorted(paths - {""})


def test_the_readme_has_code_and_fits_on_130_lines() -> None:
    assert len(code_blocks(README)) >= 2
    assert len(README.read_text().splitlines()) <= README_LINES


PAGES = [
    README,
    *(pytest.param(page, marks=pytest.mark.slow) for page in DOCS if code_blocks(page)),
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs_from_top_to_bottom_and_prints_what_its_comments_say(
    page: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    if any("import torch" in block for block in code_blocks(page)):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in files(page).items():
        (tmp_path / name).write_text(text)
    names: dict[str, object] = {}
    with jax.numpy_rank_promotion("allow"):  # JAX's default, unlike in the other tests
        for block in code_blocks(page):
            exec(compile(block, page.name, "exec"), names)
            for line, printed in re.findall(r"^ *(print\(.*\))  # (.+)$", block, re.MULTILINE):
                capsys.readouterr()
                exec(line, names)
                assert capsys.readouterr().out.strip() == printed, line
    for command, printed in commands(page):
        run = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert (run.stdout, run.returncode) == (printed, 0), run.stderr


@pytest.mark.parametrize("page", [README, *DOCS, *OTHERS], ids=name_of)
def test_links_and_images_exist(page: Path) -> None:
    """Notebooks are written when the site is built, whose own links are tested as well."""
    found = [path for path in links(page) if not path.endswith(".ipynb")]
    assert [path for path in found if not (page.parent / path).exists()] == []
