"""How Sphinx builds the site, with every code cell executed: `make docs`.

The build needs no network if MNIST is in `$JAXTRAIN_DATA_DIR`; without it, T2 trains on digits.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]
# The kernels that execute the tutorials import the same jaxtrain.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
)
# PyTorch's threads wait for each other actively, which is slow where others use the cores as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtrain  # noqa: E402, for its version

PROJECT: dict[str, Any] = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
version = release = jaxtrain.__version__
copyright = f"the authors of {project}, licensed under {PROJECT['license']}"
language = "en"

extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "framework_tabs",
    "notebook_downloads",
    "repository_links",
]
exclude_patterns = ["_build", "_extensions", "images"]

# Links from a page to a file outside docs/ lead to this address, if there is one. Otherwise the
# site contains the files that its pages link to.
repository_url = PROJECT.get("urls", {}).get("Repository", "")
# These files are pages of the site.
repository_pages = {
    "README.md": "index",
    "CONTRIBUTING.md": "about/contributing",
    "CHANGELOG.md": "about/change_log",
    "tests/README.md": "about/tests",
    "benchmarks/NOTES.md": "about/benchmark_notes",
}

# Tutorials: every cell is executed in each build, and an exception fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_execution_show_tb = True
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Reference. Names of other packages are not links, because their indexes are not available offline.
# Nor are type variables, and the classes that the functions of `jt.callbacks` return.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!jaxtrain\.).*"),
    (r"py:.*", r".*\._.*"),
    (
        r"py:class",
        r"jaxtrain\.(training\.\w+\.State|callbacks\.\w+\.(EarlyStopping|Checkpoint|ReduceOnPlateau))",
    ),
]
default_role = "code"  # docstrings are Markdown as much as reStructuredText
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
viewcode_line_numbers = True

html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}  # light or dark as the browser prefers
html_title = project
html_use_index = False
html_domain_indices = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "footer_content_items": ["copyright.html"],
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escapes the bars of absolute values in a docstring, which reStructuredText would replace."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line)


def shorten_arrays(
    app: Any, what: str, name: str, obj: Any, options: Any, arguments: str, result: str
) -> tuple[str, str]:
    """Writes `Float[Array, "batch"]` in a signature as the code does."""
    short = [part and part.replace("jaxlib._jax.Array", "Array") for part in (arguments, result)]
    return short[0], short[1]


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a class, which its docstring describes."""
    return True if what == "class" and not (callable(obj) or isinstance(obj, property)) else None


def insert_operations(app: Any, page: str, source: list[str]) -> None:
    """Inserts the table of the operations of PyTorch that have a rule."""
    families = jaxtrain.adapters.torch.operations().items()
    rows = [f"| {family} | {', '.join(f'`{n}`' for n in names)} |" for family, names in families]
    table = "\n".join(["| family | operations |", "|---|---|", *rows])
    source[0] = source[0].replace("<!-- operations -->", table)


def setup(app: Any) -> None:
    """Registers the functions above."""
    app.connect("source-read", insert_operations)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-signature", shorten_arrays)
    app.connect("autodoc-skip-member", skip_fields)
