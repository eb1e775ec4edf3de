"""What surrounds a chapter: the buttons to take it along as a notebook or on paper; and small repairs."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from plain_notebooks import write_all
from sphinx.application import Sphinx

FOLDER = "notebooks"


def add_buttons(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    """Offer the executed chapter as a notebook, and the page on paper."""
    if doctree is None:
        return
    buttons = context["header_buttons"]
    if executed(app, pagename).is_file():
        buttons.append(
            {
                "type": "link",
                "url": context["pathto"](posixpath.join(FOLDER, f"{notebook_name(pagename)}.ipynb"), 1),
                "text": "",
                "tooltip": "Download this chapter as a notebook",
                "icon": "fas fa-download",
                "label": "download-notebook-button",
            }
        )
    buttons.append(
        {
            "type": "javascript",
            "javascript": "window.print()",
            "text": "",
            "tooltip": "Print this page",
            "icon": "fas fa-print",
            "label": "print-button",
        }
    )


def name_citations(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Call the entries of a list of works list items: the role they get is withdrawn and hides them."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def skip_fields(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the entries that named tuples write for their fields: the class's docstring explains them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def keep_bars(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Have |x| in a docstring mean an absolute value, not a substitution; code in backticks stays as it is."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        lines[number] = "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def executed(app: Sphinx, pagename: str) -> Path:
    """Say where the executed notebook of a page lies, if the page has cells."""
    return Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"


def notebook_name(pagename: str) -> str:
    """Name a chapter's notebook after its topic."""
    return pagename.removeprefix("book/").replace("/", "-")


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Put every executed chapter, in plain Markdown, beside the pages."""
    chapters = Path(app.outdir).parent / "jupyter_execute" / "book"
    if exception is None and app.builder.format == "html" and chapters.is_dir():
        write_all(chapters, Path(app.outdir) / FOLDER)


def setup(app: Sphinx) -> dict[str, Any]:
    # jupyter-book passes this setting also where its extension, which this book does not use, is not loaded.
    app.add_config_value("comments_config", {}, "")
    app.connect("html-page-context", add_buttons, priority=501)
    app.connect("html-page-context", name_citations)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("build-finished", write_notebooks)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
