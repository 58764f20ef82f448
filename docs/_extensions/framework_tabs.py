"""Shows a code cell tagged `torch` and the cell tagged `jax` that follows it as two tabs.

MyST-NB executes only cells at the top level of a page, so a page cannot put them into tabs itself.
In the notebook, the two cells stay one below the other.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx_design.shared import create_component

LABELS = {"torch": "PyTorch", "jax": "JAX"}


class FrameworkTabs(SphinxTransform):
    """Replaces neighboring cells of two frameworks by a set of tabs."""

    default_priority = 700

    def apply(self) -> None:
        """Changes the document."""
        for cell in list(self.document.findall(nodes.container)):
            other = cell.next_node(descend=False, siblings=True)
            if has_tag(cell, "torch") and has_tag(other, "jax"):
                other.parent.remove(other)
                tabs = [tab("torch", cell.deepcopy()), tab("jax", other)]
                cell.replace_self(
                    create_component("tab-set", classes=["sd-tab-set"], children=tabs)
                )


def has_tag(node: nodes.Node | None, tag: str) -> bool:
    """Returns whether a node is a code cell with the tag."""
    return isinstance(node, nodes.container) and f"tag_{tag}" in node["classes"]


def tab(tag: str, cell: nodes.container) -> nodes.container:
    """Returns the cell as a tab; all sets of tabs on a page switch together."""
    label = nodes.rubric("", LABELS[tag], classes=["sd-tab-label"])
    label["sync_group"], label["sync_id"] = "framework", tag
    content = create_component("tab-content", classes=["sd-tab-content"], children=[cell])
    return create_component("tab-item", classes=["sd-tab-item"], children=[label, content])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.add_transform(FrameworkTabs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
