"""What a reader opens: admonitions and solutions of class `dropdown` become native `<details>` elements.

The browser then brings the keyboard, the screen reader's announcement, find-in-page and the jump to an
anchor inside, without a script. The same pass gives every block an id of its own, where the extensions
repeat one on each page.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator
from sphinx_exercise.nodes import solution_node

logger = logging.getLogger(__name__)

REPEATED_IDS = {"proof-content", "exercise-content", "solution-content", "proof"}


class disclosure(nodes.General, nodes.Element):
    """A block that is closed at first."""


class disclosure_summary(nodes.Part, nodes.TextElement):
    """The line that stays in view and opens the block."""


class Disclose(SphinxPostTransform):
    """Replace `dropdown` blocks by disclosures, after their titles have been resolved."""

    default_priority = 500
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(nodes.Element)):
            if REPEATED_IDS.intersection(node.get("ids", ())):
                node["ids"] = [name for name in node["ids"] if name not in REPEATED_IDS]
            if "dropdown" in node.get("classes", ()) and isinstance(node, nodes.Admonition | solution_node):
                self.disclose(node)

    def disclose(self, node: nodes.Element) -> None:
        title = node.next_node(nodes.title)
        if title is None or title.parent is not node:
            logger.warning("a dropdown needs a title to open it by", location=node, type="disclosure")
            return
        summary = disclosure_summary("", "", *title.children, classes=["admonition-title"])
        classes = ["admonition", *(name for name in node["classes"] if name != "admonition")]
        closed = disclosure("", summary, *(child for child in node.children if child is not title), classes=classes)
        closed["ids"] = node["ids"]
        closed.source, closed.line = node.source, node.line
        node.replace_self(closed)


def visit_disclosure(translator: HTML5Translator, node: disclosure) -> None:
    translator.body.append(translator.starttag(node, "details"))


def depart_disclosure(translator: HTML5Translator, node: disclosure) -> None:
    translator.body.append("</div>\n</details>\n")


def visit_summary(translator: HTML5Translator, node: disclosure_summary) -> None:
    translator.body.append(translator.starttag(node, "summary", ""))


def depart_summary(translator: HTML5Translator, node: disclosure_summary) -> None:
    translator.body.append('</summary>\n<div class="disclosed">\n')


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx_exercise")
    app.add_node(disclosure, html=(visit_disclosure, depart_disclosure))
    app.add_node(disclosure_summary, html=(visit_summary, depart_summary))
    app.add_post_transform(Disclose)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
