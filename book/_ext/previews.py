"""What a cross-reference leads to is shown beside it: a statement, a formula, a figure, the start of a section.

sphinx-tippy collects the previews and writes them, one script for each page. Here they are made fit for this book:
only references in the running text have one; a preview carries no evidence, no link and no anchor of its own; its
script's name stays the same from build to build; what was collected is kept, so that a build that writes only the
pages that changed still knows what stands on the others; and the scripts are fetched when the page stands, not before.
"""

from __future__ import annotations

import pickle
import posixpath
import re
from pathlib import Path
from typing import Any

import sphinx_tippy
from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx

REFERENCE = "a.reference.internal"
LEFT_OUT = ".ldyn-badge, .headerlink, button, script"
CACHES = "tippy_*_cache.json"
SCRIPTS = "_static/tippy/"
LOADED = re.compile(r"window\.onload = function \(\) \{(.*?)console\.log\([^)]*\);\s*\};", re.DOTALL)


def clean(html: str) -> str:
    """Make a copy of a part of a page fit to stand on any page, beside the original."""
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.select(LEFT_OUT):
        tag.decompose()
    if soup.select_one(".tippy-header"):  # of a section, one paragraph: a second one may lead over to a list
        for tag in soup.find_all("p", recursive=False)[1:]:
            tag.decompose()
    for tag in soup.find_all(id=True):
        if tag.find_parent("svg") is None:
            del tag["id"]
        else:  # drawings refer to parts of themselves
            tag["id"] = f"preview-{tag['id']}"
    for svg in soup.find_all("svg"):
        for tag in svg.find_all(True):
            for name, value in tag.attrs.items():
                if isinstance(value, str) and name != "id":
                    tag[name] = re.sub(r"^#|(?<=url\()#", "#preview-", value)
    for tag in soup.find_all("a"):
        if tag.find_parent("svg") is None:
            tag.unwrap()
    return str(soup).strip()


def references(body: str, folder: str) -> set[tuple[str | None, str | None]]:
    """List where the references of a page's text lead: pages (`None` for this one) and the anchors on them."""
    found: set[tuple[str | None, str | None]] = set()
    for anchor in BeautifulSoup(body, "html.parser").select(REFERENCE):
        path, _, target = str(anchor.get("href", "")).partition("#")
        page = posixpath.normpath(posixpath.join(folder, path.removesuffix(".html"))) if path else None
        found.add((page, target or None))
    return found


def refine(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document) -> None:
    """Keep, of what sphinx-tippy has just collected on a page, what the book shows."""
    if doctree is None:
        return
    page = sphinx_tippy.get_tippy_data(app)["pages"][pagename]
    shown = page["refs_in_page"] & references(context["body"], posixpath.dirname(pagename))
    page["refs_in_page"] = sorted(shown, key=lambda place: (place[0] or "", place[1] or ""))  # a set has no order
    page["id_to_html"] = {name: clean(html) for name, html in page["id_to_html"].items()}


def postpone(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Take the scripts out of the page's head; its template fetches them once the page has loaded."""
    files = context.get("script_files", [])
    context["later_scripts"] = [file for file in files if str(getattr(file, "filename", "")).startswith(SCRIPTS)]
    context["script_files"] = [file for file in files if file not in context["later_scripts"]]


def start_at_once(script: str) -> str:
    """Let a page's script do its work when it is read: the load event it was written to wait for has gone by."""
    return LOADED.sub(r"{\1}", script)


def collected(app: Sphinx) -> Path:
    """Say where the previews of the pages that a build does not write are kept."""
    return Path(app.doctreedir) / "previews.pickle"


def recall(app: Sphinx) -> None:
    """Take up what earlier builds collected."""
    if app.builder.format == "html" and collected(app).is_file():
        pages = pickle.loads(collected(app).read_bytes())
        sphinx_tippy.get_tippy_data(app)["pages"].update(pages)


def forget(app: Sphinx, env: Any) -> None:
    """Drop pages that have left the book."""
    pages = sphinx_tippy.get_tippy_data(app)["pages"]
    for gone in set(pages) - set(env.found_docs):
        del pages[gone]


def keep(app: Sphinx, exception: Exception | None) -> None:
    """Keep what was collected for the next build, and take the caches of other sites' texts, all empty, away."""
    if exception is None and app.builder.format == "html":
        collected(app).write_bytes(pickle.dumps(sphinx_tippy.get_tippy_data(app)["pages"]))
        for cache in Path(app.outdir).glob(CACHES):
            cache.unlink()
        for script in (Path(app.outdir) / SCRIPTS).rglob("*.previews.js"):
            script.write_text(start_at_once(script.read_text(encoding="utf-8")), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx_tippy")
    # A random name would leave the scripts of earlier builds behind and make two builds of one text differ.
    sphinx_tippy.uuid4 = lambda: "previews"
    app.connect("builder-inited", recall)
    app.connect("env-updated", forget)
    app.connect("html-page-context", refine, priority=451)  # sphinx-tippy collects at 450
    app.connect("html-page-context", postpone, priority=900)  # after every script has been named
    app.connect("build-finished", keep, priority=501)  # sphinx-tippy writes at 500
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": False}
