"""Makes the links of pages to files outside docs/ work on the site.

The pages are also read in the repository, where a link such as `../experiments/mnist.py` leads to a
file. On the site, it leads to the page that includes the file, to the repository's address, or to a
page with the file's text.
"""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
LANGUAGES = {".py": "python", ".md": "markdown", ".json": "text", ".toml": "toml"}


class RepositoryLinks(SphinxTransform):
    """Replaces references to files of the repository, and to the notebooks of pages."""

    default_priority = 600

    def apply(self) -> None:
        """Changes the document."""
        for node in list(self.document.findall(is_relative_link)):
            target, _, anchor = node["reftarget"].partition("#")
            if target.startswith("/"):  # how MyST names a page outside docs/
                target, anchor = f"{target}.md", node["reftargetid"]
            path = os.path.relpath(ROOT / self.folder() / target, ROOT)
            if target and (uri := self.uri_of(path)):
                uri += f"#{anchor}" if anchor else ""
                link = nodes.reference("", "", *node.children, internal=True, refuri=uri)
                node.replace_self(link)

    def folder(self) -> str:
        """Returns the folder, seen from the repository's root, that the page's links start from."""
        pages = {docname: file for file, docname in self.config.repository_pages.items()}
        docname = self.env.docname
        file = pages.get(docname) if docname.startswith("about/") else None
        return os.path.dirname(file or f"docs/{docname}")

    def uri_of(self, path: str) -> str | None:
        """Returns the address of a file or folder of the repository; None if it does not exist."""
        uri = functools.partial(self.app.builder.get_relative_uri, self.env.docname)
        if path in self.config.repository_pages:
            return uri(self.config.repository_pages[path])
        name, suffix = os.path.splitext(path.removeprefix("docs/"))
        if path.startswith("docs/") and name in self.env.found_docs:
            here = os.path.dirname(self.env.docname)
            return uri(name) if suffix == ".md" else os.path.relpath(name + suffix, here)
        if path.startswith("..") or not (ROOT / path).exists():
            return None
        if self.config.repository_url:
            return f"{self.config.repository_url}/blob/main/{path}"
        linked_files(self.env).add(path)
        return uri(page_name(path))


def is_relative_link(node: nodes.Node) -> bool:
    """Returns whether MyST made the node from a relative link that leads to no page."""
    kinds = (addnodes.download_reference, addnodes.pending_xref)
    if not isinstance(node, kinds) or node.get("reftype") != "myst":
        return False
    return not node.get("refdomain") or node["reftarget"].startswith("/")


def linked_files(env: Any) -> set[str]:
    """Returns the files and folders that pages link to."""
    if not hasattr(env, "repository_files"):
        env.repository_files = set()
    return env.repository_files


def page_name(path: str) -> str:
    """Returns the page that shows a file or a folder."""
    return f"repository/{path}"


def collect_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields a page for each linked file, and for each linked folder and its files."""
    paths = linked_files(app.env)
    for folder in [path for path in paths if (ROOT / path).is_dir()]:
        paths |= {f"{folder}/{file.name}" for file in files_of(folder)}
    for path in sorted(paths):
        body = f"<h1>{html.escape(path)}</h1>"
        if (ROOT / path).is_dir():
            base = os.path.basename(path)
            items = (
                f'<li><a href="{base}/{f.name}.html">{f.name}</a></li>' for f in files_of(path)
            )
            body += f"<ul>{''.join(items)}</ul>"
        else:
            language = LANGUAGES.get(Path(path).suffix, "text")
            text = (ROOT / path).read_text(encoding="utf-8")
            body += app.builder.highlighter.highlight_block(text, language)
        yield page_name(path), {"title": path, "body": body, "parents": []}, "page.html"


def files_of(folder: str) -> list[Path]:
    """Returns the text files of a folder."""
    return [file for file in sorted((ROOT / folder).iterdir()) if file.suffix in LANGUAGES]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.add_config_value("repository_url", "", "env")
    app.add_config_value("repository_pages", {}, "env")
    app.add_transform(RepositoryLinks)
    app.connect("html-collect-pages", collect_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
