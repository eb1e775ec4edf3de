"""Figures drawn by a chapter's cells become part of the page, in the page's ink.

Notebooks draw SVG in one ink on white (`ldyn.plots`). Here each drawing is written into the HTML itself:
its ink becomes the text colour of the page, its white the page's ground, and each colour of the palette a
style sheet's variable, so that it reads in the light and in the dark; its ids are made unique; it carries
the cell's alternative text. A figure without alternative text or caption is a warning (and so, in this
book's build, an error).
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

from ldyn.plots import INK, PALETTE

logger = logging.getLogger(__name__)

EXECUTED = "jupyter_execute"
PIXELS_PER_POINT = 96 / 72

_ROOT = re.compile(r"<svg\b[^>]*>")
_SIZE = re.compile(r'\bwidth="([\d.]+)(?:pt)?"')
_VIEW = re.compile(r'\bviewBox="([^"]+)"')
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>|<defs>\s*</defs>|<!--.*?-->", re.DOTALL)
_ID = re.compile(r'\bid="([^"]+)"')
_USE = re.compile(r'href="#([^"]+)"|url\(#([^)]+)\)')


def inline_svg(source: str, *, prefix: str, label: str) -> str:
    """Rewrite an SVG file as an element of a page.

    `prefix` goes before each id that the drawing refers to (other ids are dropped), `label` is its
    alternative text.
    """
    root = _ROOT.search(source)
    if root is None or (view := _VIEW.search(root[0])) is None or (width := _SIZE.search(root[0])) is None:
        raise ValueError("source: expected an SVG drawing with a width and a view box")
    body = _DROPPED.sub("", _DROPPED.sub("", source[root.end() :]))
    used = {first or second for first, second in _USE.findall(body)}
    body = _ID.sub(lambda match: f'id="{prefix}{match[1]}"' if match[1] in used else "", body)
    body = body.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    body = re.sub(re.escape(INK), "currentColor", body, flags=re.IGNORECASE)
    body = re.sub(r"#ffffff\b|(?<=: )white\b", "var(--figure-ground)", body, flags=re.IGNORECASE)
    for name, colour in PALETTE.items():
        body = re.sub(re.escape(colour), f"var(--figure-{name})", body, flags=re.IGNORECASE)
    size = float(width[1]) * PIXELS_PER_POINT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(label)}" viewBox="{view[1]}" width="{size:.0f}" '
        f'stroke-linejoin="round" stroke-linecap="butt">'
    )
    return head + re.sub(r"\n\s*", "\n", body).strip()


class InlineFigures(SphinxPostTransform):
    """Replace the drawings of a chapter's cells by inline SVG."""

    default_priority = 300
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        drawn = [node for node in self.document.findall(nodes.image) if EXECUTED in node["uri"]]
        for number, image in enumerate(drawn, start=1):
            self.check(image)
            if image["uri"].endswith(".svg"):
                self.inline(image, f"drawing{number}-")

    def check(self, image: nodes.image) -> None:
        """Ask for alternative text and a caption."""
        if not image.get("alt", "").strip():
            logger.warning(
                "a figure has no alternative text: give its cell `mystnb: image: alt:`",
                location=image,
                type="figures",
            )
        holder = image.parent
        if not (isinstance(holder, nodes.figure) and any(isinstance(node, nodes.caption) for node in holder)):
            logger.warning(
                "a figure has no caption: give its cell `mystnb: figure: caption:`",
                location=image,
                type="figures",
            )

    def inline(self, image: nodes.image, prefix: str) -> None:
        """Put the drawing itself where the image was."""
        path = Path(self.app.srcdir) / image["uri"].lstrip("/")
        svg = inline_svg(path.read_text(encoding="utf-8"), prefix=prefix, label=image.get("alt", ""))
        image.replace_self(nodes.raw("", f'<div class="drawing">{svg}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_post_transform(InlineFigures)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
