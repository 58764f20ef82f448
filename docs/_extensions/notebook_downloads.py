"""Puts the executed notebook of a tutorial next to its page, and into the download button."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from sphinx.application import Sphinx


def add_notebook(
    app: Sphinx, page: str, _: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Copies the notebook that MyST-NB has written, if the page is one."""
    if doctree is not None and "kernelspec" in app.env.metadata[page]:
        written = Path(app.outdir).parent / "jupyter_execute" / f"{page}.ipynb"
        notebook = nbformat.read(written, as_version=4)
        for cell in notebook.cells:
            remove_repeated(cell.get("outputs", []))
        target = Path(app.outdir, f"{page}.ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        context["ipynb_source"] = f"../{page}.ipynb"  # the theme looks in _sources


def remove_repeated(outputs: list[nbformat.NotebookNode]) -> None:
    """Removes the parts of a stream that MyST-NB has added to the first part, but not removed."""
    first: dict[str, str] = {}
    for output in list(outputs):
        if output.output_type == "stream":
            text = first.setdefault(output.name, output.text)
            if text is not output.text and output.text.strip() in text:
                outputs.remove(output)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("html-page-context", add_notebook, priority=400)  # before the theme's
    return {"parallel_read_safe": True, "parallel_write_safe": True}
